"""Cross-attention over padded texts: what padding means there, and what memory it takes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sora_engine.denoise.conditioning import Context, KeyValues
from sora_engine.denoise.packing import ContextRuns, Packer, Segment
from sora_engine.distributed.sharder import _cut_runs
from sora_engine.models.attention import cross_attention
from sora_engine.vae.meter import StorageMeter

HEADS, WIDTH = 3, 8
PADDING = torch.randn(2, 1, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
"""The model's: one key and one value."""


def a_context(words: int, padding: int, device: str = "cpu") -> Context:
    rng = torch.Generator().manual_seed(words)
    keys, values = torch.randn(2, 1, words, HEADS, WIDTH, generator=rng).to(device)
    return Context({"text": KeyValues(keys, values, padding, *PADDING.to(device))})


def runs_of(contexts: list[Context], sizes: list[int], device: str = "cpu") -> ContextRuns:
    segments = [
        Segment(torch.zeros(1, 1, size, 1, device=device), torch.zeros(1), ((context, 1),))
        for context, size in zip(contexts, sizes, strict=True)
    ]
    return Packer((1, 1, 1), torch.device(device)).pack(segments).contexts["text"]


def padded(q: Tensor, context: Context) -> Tensor:
    """As a padded text is attended to: padding's key and value as often as they count."""
    source = context.sources["text"]
    assert source.padding_keys is not None
    assert source.padding_values is not None
    keys, values = (
        torch.cat([own[0], *[one] * source.padding])
        for own, one in (
            (source.keys, source.padding_keys),
            (source.values, source.padding_values),
        )
    )
    out = scaled_dot_product_attention(*(x.double().transpose(0, 1) for x in (q, keys, values)))
    return out.transpose(0, 1).float()


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_each_segment_sees_its_own_text_and_the_padding_that_fills_it(backend: str) -> None:
    contexts = [a_context(3, 9), a_context(4, 508), a_context(12, 0)]
    sizes = [5, 70, 2]
    q = torch.randn(sum(sizes), HEADS, WIDTH, generator=torch.Generator().manual_seed(2))
    out = cross_attention(q, runs_of(contexts, sizes), 0, backend=backend)
    expected = [padded(part, c) for part, c in zip(q.split(sizes), contexts, strict=True)]
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_a_stretch_of_the_tokens_has_the_padding_of_its_runs() -> None:
    """As ranks cut them: within a run, across two, and past the end of one."""
    contexts, sizes = [a_context(3, 9), a_context(4, 508), a_context(12, 0)], [5, 7, 2]
    q = torch.randn(sum(sizes), HEADS, WIDTH, generator=torch.Generator().manual_seed(3))
    runs = runs_of(contexts, sizes)
    whole = cross_attention(q, runs, 0, backend="auto")
    for first, last in ((0, 3), (3, 8), (8, 12), (12, 14), (0, 14)):
        mine = slice(first, last)
        cut = _cut_runs({"text": runs}, mine)["text"]
        torch.testing.assert_close(cross_attention(q[mine], cut, 0, backend="auto"), whole[mine])


def test_padding_takes_no_memory() -> None:
    """Cross-attention makes its result and nothing else: at 720p a pass over the tokens of a 14B
    model is 0.77 GB."""
    sizes = [300, 500]
    runs = runs_of([a_context(3, 509, "meta"), a_context(4, 508, "meta")], sizes, "meta")
    q = torch.empty(sum(sizes), HEADS, WIDTH, dtype=torch.bfloat16, device="meta")
    names = ("keys", "values", "padding_keys", "padding_values")
    runs = replace(runs, **{name: getattr(runs, name).bfloat16() for name in names})
    had = [q, *(getattr(runs, field.name) for field in fields(runs))]
    there = [tensor for tensor in had if isinstance(tensor, Tensor)]
    with torch.inference_mode(), StorageMeter(there) as meter:
        out = cross_attention(q, runs, 0, backend="auto")
    assert meter.peak == out.nbytes == q.nbytes
