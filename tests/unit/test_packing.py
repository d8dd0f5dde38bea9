"""Packing: tokens end to end, rows of noise levels, runs of texts, layouts that are kept."""

from __future__ import annotations

import math

import pytest
import torch

from sora_engine.denoise.conditioning import Context, KeyValues
from sora_engine.denoise.packing import ANCHOR_GAP, Packer, Segment, patchify, unpatchify

CPU = torch.device("cpu")


def a_context(tokens: int, padding: int = 0) -> Context:
    keys = torch.randn(2, tokens, 3, 4)
    pad = torch.randn(2, 3, 4)
    return Context({"text": KeyValues(keys, torch.randn_like(keys), padding, pad, pad)})


def a_segment(size, context, level=500.0):
    latents = torch.randn(5, *size)
    return Segment(latents, torch.full((size[0],), level), ((context, size[0]),))


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1), (2, 1, 3)])
def test_patches_are_those_of_a_strided_convolution(patch):
    latents = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    conv = torch.nn.Conv3d(5, 7, patch, patch, dtype=torch.float64)
    expected = conv(latents[None])[0].flatten(1).T
    actual = patchify(latents, patch) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(actual, expected)


def test_unpatchify_puts_channel_last_tokens_in_their_place():
    grid, patch = (2, 3, 4), (1, 2, 2)
    tokens = torch.arange(math.prod(grid) * 4 * 5).reshape(-1, 20)
    latents = unpatchify(tokens, grid, patch, 5)
    assert latents.shape == (5, 2, 6, 8)
    # Token (t, h, w), place (i, j) within its patch, channel c.
    assert latents[3, 1, 2 * 2 + 1, 3 * 2] == tokens[(1 * 3 + 2) * 4 + 3].reshape(2, 2, 5)[1, 0, 3]


def test_anchors_stand_apart_in_time():
    context = a_context(3)
    packer = Packer((2, 1, 1), CPU)
    latents, levels = torch.randn(5, 6, 1, 2), torch.zeros(6)
    plain, anchored, again = (
        Segment(latents, levels, ((context, 6),), num_anchors=anchors) for anchors in (0, 2, 4)
    )
    coords = packer.pack([plain, anchored, again]).video.coords.view(3, 3, 2, 3)
    gap = ANCHOR_GAP
    assert coords[:, :, 0, 0].tolist() == [[0, 1, 2], [0, 1 + gap, 2 + gap], [0, 1, 2 + gap]]
    assert coords[0, :, :, 1:].equal(coords[1, :, :, 1:])
    # A layout that is kept is not another one's.
    assert packer.pack([plain, again, anchored]).video.coords.view(3, -1)[1, 6] == 1
    for bad in (1, 6, 8, -2):
        with pytest.raises(ValueError, match=f"multiple of 2 from 0 to below 6 .*, got {bad}"):
            packer.pack([Segment(latents, levels, ((context, 6),), num_anchors=bad)])


def test_a_batch_of_segments():
    a, b = a_context(3, padding=9), a_context(4, padding=8)
    packer = Packer((1, 2, 2), CPU)
    segments = [a_segment((2, 4, 4), a), a_segment((1, 2, 6), a, 250.0), a_segment((3, 2, 2), b)]
    batch = packer.pack(segments)
    video = batch.video
    assert video.tokens.shape == (8 + 3 + 3, 20)
    assert video.cu_seqlens.tolist() == [0, 8, 11, 14]
    assert video.cu_seqlens.dtype == torch.int32
    assert video.max_seqlen == 8
    assert video.coords[:3].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert video.coords[8:11].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    assert batch.timesteps.tolist() == [250.0, 500.0]
    assert video.rows.tolist() == [1] * 8 + [0] * 3 + [1] * 3
    text = batch.contexts["text"]
    # The first two segments read one text: one run, one copy of its keys.
    assert text.cu_seqlens_q.tolist() == [0, 11, 14]
    assert text.cu_seqlens_k.tolist() == [0, 3, 7]
    assert text.padding.tolist() == [9, 8]
    assert text.padding.dtype == torch.int32
    parts = packer.unpack(video.tokens, batch, 5)
    assert [tuple(part.shape) for part in parts] == [(5, 2, 4, 4), (5, 1, 2, 6), (5, 3, 2, 2)]


def test_one_noise_level_needs_no_rows_and_one_text_no_copy():
    context = a_context(3)
    batch = Packer((1, 2, 2), CPU).pack([a_segment((2, 4, 4), context) for _ in range(2)])
    assert batch.video.rows is None
    assert batch.contexts["text"].keys is context.sources["text"].keys
    assert batch.contexts["text"].padding is None


def test_a_noise_level_for_each_token():
    context = a_context(3)
    levels = torch.tensor([[[0.0, 700.0]], [[700.0, 0.0]]])
    segment = Segment(torch.randn(5, 2, 2, 4), levels, ((context, 2),))
    batch = Packer((1, 2, 2), CPU).pack([segment])
    assert batch.timesteps[batch.video.rows].tolist() == [0.0, 700.0, 700.0, 0.0]


def test_layouts_are_built_once_for_a_composition():
    context, other = a_context(3), a_context(3)
    packer = Packer((1, 2, 2), CPU)
    first = packer.pack([a_segment((2, 4, 4), context)])
    again = packer.pack([a_segment((2, 4, 4), context, 10.0)])
    assert again.video.coords is first.video.coords
    assert again.contexts["text"] is first.contexts["text"]
    assert packer.pack([a_segment((2, 4, 4), other)]).contexts["text"] is not first.contexts["text"]
    packer.clear()
    assert packer.pack([a_segment((2, 4, 4), context)]).video.coords is not first.video.coords


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "at least one segment"),
        ([Segment(torch.randn(5, 2, 4, 5), torch.zeros(2), ())], r"\(2, 4, 5\) is not a positive"),
        ([Segment(torch.randn(5, 0, 4, 4), torch.zeros(0), ())], r"\(0, 4, 4\) is not a positive"),
        ([Segment(torch.randn(2, 4, 4), torch.zeros(2), ())], r"must be \[channels, T, H, W\]"),
        ([Segment(torch.randn(5, 2, 4, 4), torch.zeros(2), ())], r"contexts of \[\] .* fill 2"),
    ],
)
def test_what_does_not_fit_is_named(segments, message):
    with pytest.raises(ValueError, match=message):
        Packer((1, 2, 2), CPU).pack(segments)


def test_attention_is_planned_once_for_offsets(monkeypatch):
    """Layers and steps share a plan; other offsets get their own, even through a shared store."""
    from dataclasses import replace

    from sora_engine.models import attention

    made = []
    monkeypatch.setattr(attention, "takes_plan", lambda q, backend: True)
    plan = attention.plan_attention

    def counted(cu_seqlens, **kwargs):
        made.append(cu_seqlens)
        return plan(cu_seqlens, **kwargs)

    monkeypatch.setattr(attention, "plan_attention", counted)
    context = a_context(3)
    packer = Packer((1, 2, 2), CPU)
    segments = [a_segment((2, 4, 4), context), a_segment((1, 2, 6), context)]
    q = torch.randn(11, 3, 4)
    for _ in range(2):
        stream = packer.pack(segments).video
        attention.self_attention(q, q, q, stream, backend="reference")
    assert len(made) == 1
    cut = replace(stream, cu_seqlens=torch.tensor([0, 3, 11], dtype=torch.int32))
    expected = attention.packed_attention(
        q, q, q, cut.cu_seqlens, cut.cu_seqlens, max_seqlen_q=8, max_seqlen_k=8, backend="reference"
    )
    torch.testing.assert_close(
        attention.self_attention(q, q, q, cut, backend="reference"), expected
    )
    assert [offsets.tolist() for offsets in made] == [[0, 8, 11], [0, 3, 11]]
