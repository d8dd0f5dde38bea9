"""A block of the Wan model beside diffusers' block: width 1536, 1,280 tokens, the same threads.

Runs are interleaved, and the figure is the median of paired ratios. The engine keeps a text's keys
and values for a whole run where diffusers' block computes them on every call, so the ratio is given
both ways: `times diffusers` as the engine runs, `with keys and values` computing them as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import DEVICE, DTYPE, ON_CPU, paired_ratio, synchronise

GRID = (5, 16, 16)
TEXT = 512


def captured(module: torch.nn.Module, run: Callable[[], object]) -> Callable[[], Any]:
    """A call of `module` with what it is given while `run` runs."""
    calls: list[Any] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run()
    hook.remove()
    args, kwargs = calls[0]
    return lambda: module(*args, **kwargs)


def test_wan_block(benchmark):
    diffusers = pytest.importorskip("diffusers")
    from sora_engine.bench.models import WanShape
    from sora_engine.bench.ops import packed
    from sora_engine.models.wan.config import WanConfig
    from sora_engine.models.wan.model import WanTransformer

    tiny = not benchmark.enabled
    shape = WanShape(heads=2, head_dim=12, ffn_dim=32, text_dim=16) if tiny else WanShape()
    t, h, w = (1, 2, 2) if tiny else GRID
    config = {**shape.transformer_config(), "num_layers": 1}
    torch.manual_seed(0)
    with torch.inference_mode():
        theirs = diffusers.WanTransformer3DModel(**config).to(DEVICE, DTYPE).eval()
        ours = WanTransformer(WanConfig(**config)).to(DEVICE, DTYPE).eval().requires_grad_(False)
        ours.load_state_dict(theirs.state_dict(), strict=False)
        ours.prepare()
        latents = torch.randn(shape.channels, t, 2 * h, 2 * w, device=DEVICE, dtype=DTYPE)
        text = torch.randn(TEXT, shape.text_dim, device=DEVICE, dtype=DTYPE)
        level = torch.full((1,), 500.0, device=DEVICE)
        batch = packed(ours, [(latents, text)])
        their_block = captured(
            theirs.blocks[0], lambda: theirs(latents[None], level, text[None], return_dict=False)
        )
        our_block = captured(ours.blocks[0], lambda: ours(batch))
        # diffusers' block returns the residual stream, which is the first of the engine's two.
        torch.testing.assert_close(our_block()[0], their_block()[0], rtol=2e-2, atol=2e-2)
        embedded = torch.randn(TEXT, shape.width, device=DEVICE, dtype=DTYPE)
        attention = ours.blocks[0].attn2

        def with_keys_and_values() -> None:
            attention.keys_values(embedded, "text", ours.backends)
            our_block()

        def once() -> None:
            our_block()
            synchronise()

        benchmark.pedantic(once, rounds=1 if tiny else 5, warmup_rounds=1)
        if tiny:
            return
        rounds = 15 if ON_CPU else 50
        benchmark.extra_info["times diffusers"] = round(
            paired_ratio(their_block, our_block, rounds), 3
        )
        benchmark.extra_info["with keys and values"] = round(
            paired_ratio(their_block, with_keys_and_values, rounds), 3
        )
        print(benchmark.name, benchmark.extra_info)
