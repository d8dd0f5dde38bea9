"""The planner's bytes are those that a run sends; its choices follow from its figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sora_engine.config import ParallelConfig
from sora_engine.distributed.auto_layout import describe
from sora_engine.distributed.executor import settle_layout
from sora_engine.distributed.layout_cost import (
    H200,
    TransformerCost,
    VideoCost,
    cost,
    layouts_by_cost,
    sent_bytes,
    with_link,
)
from sora_engine.errors import LayoutError

TINY = TransformerCost(
    layers=2, heads=5, head_dim=12, ffn=32, patch_channels=16, text_tokens=16, bytes_each=4
)
VIDEOS = {
    "guided": VideoCost(frames=3, height=6, width=10, channels=4),
    "windows": VideoCost(frames=7, height=4, width=6, channels=4, window=3, overlap=1),
    "shots": VideoCost(frames=3, height=6, width=10, channels=4),
}
WAN_14B = TransformerCost(layers=40, heads=40, head_dim=128, ffn=13824, patch_channels=64)
FIVE_S = VideoCost(frames=21, height=90, width=160)


def test_bytes_of_small_batches(fleet):
    """Batches that a limit cuts: over a ring, what crosses depends on what shares a pass."""
    layout = {"ring": 2, "guidance": 2}
    ranks = fleet.run("denoise", layout=layout, request="windows", max_tokens=40)[:4]
    planned = sent_bytes(
        ParallelConfig(**layout), TINY, replace(VIDEOS["windows"], batch_tokens=40)
    )
    for rank, sent in zip(ranks, planned, strict=True):
        assert {k: n / rank["steps"] for k, n in rank["sent"].items() if n} == sent


@pytest.mark.parametrize("request_name", VIDEOS)
@pytest.mark.parametrize(
    "layout",
    [
        {"ulysses": 4},
        {"ring": 3},
        {"ulysses": 2, "ring": 2, "guidance": 2},
        {"ulysses": 2, "ring": 4},
        {"ulysses": 2, "guidance": 2, "window": 2},
        {"window": 3, "ring": 2},
    ],
    ids=str,
)
def test_bytes_are_those_of_a_run(fleet, layout, request_name):
    config = ParallelConfig(**layout)
    ranks = fleet.run("denoise", layout=layout, request=request_name)[: config.num_ranks]
    planned = sent_bytes(config, TINY, replace(VIDEOS[request_name], batch_tokens=10**6))
    assert len(planned) == len(ranks)
    for rank, sent in zip(ranks, planned, strict=True):
        ran = {purpose: n / rank["steps"] for purpose, n in rank["sent"].items() if n}
        assert set(ran) == set(sent)
        for purpose, n in sent.items():
            assert ran[purpose] == pytest.approx(n, rel=0.01)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ulysses_sends_under_four_shares_of_the_tokens(ranks):
    tokens = FIVE_S.tokens(21) * WAN_14B.width * WAN_14B.bytes_each
    unguided = VideoCost(frames=21, height=90, width=160, guided=False)
    for sent in sent_bytes(ParallelConfig(ulysses=ranks), WAN_14B, unguided):
        assert sent["ulysses"] <= WAN_14B.layers * 4 / ranks * tokens


def test_work_is_that_of_the_published_model():
    """Wan 14B at 720p for 5 s: 75,600 tokens, 14 B parameters; attention outweighs the rest."""
    assert FIVE_S.tokens(21) == 75_600
    assert WAN_14B.parameters == pytest.approx(14.29e9, rel=0.04)
    one = cost(ParallelConfig(), WAN_14B, FIVE_S, H200)
    by_hand = 2 * 40 * (4 * 75_600**2 * 5120 + 75_600 * 2 * (6 * 5120**2 + 2 * 5120 * 13824))
    assert one.flops == pytest.approx(by_hand, rel=0.03)  # and cross-attention
    assert one.exchange_s == 0
    assert 10 < one.step_s < 30


def test_more_ranks_are_faster_and_the_first_is_the_fastest():
    times = [layouts_by_cost(n, WAN_14B, FIVE_S)[0].step_s for n in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    eight = layouts_by_cost(8, WAN_14B, FIVE_S)
    assert eight[0].step_s == min(c.step_s for c in eight)
    assert eight[0].layout.guidance == 2  # branches cost nothing to part
    assert len({c.layout for c in eight}) == len(eight)


def test_slow_links_and_small_memory_change_the_choice():
    fast = cost(ParallelConfig(ulysses=8), WAN_14B, FIVE_S, H200)
    slow = cost(ParallelConfig(ulysses=8), WAN_14B, FIVE_S, with_link(H200, "ethernet"))
    assert slow.exchange_s > 10 * fast.exchange_s
    with pytest.raises(LayoutError, match="'token ring' is not known; nvlink, pcie"):
        with_link(H200, "token ring")
    with pytest.raises(LayoutError, match="0 ranks; at least 1"):
        layouts_by_cost(0, WAN_14B, FIVE_S)


def test_a_checkpoint_is_described_from_its_configuration():
    model, video = describe("sprites", None, 64, 64, 33, 1.0)
    assert (model.layers, model.heads, model.head_dim) == (6, 4, 48)
    # Nine latent frames, in chained windows of five beside two anchors: a step is of one.
    assert (video.frames, video.height, video.width) == (7, 8, 8)
    assert (video.window, video.guided) == (None, False)
    assert [length for _, length in video.spans()] == [7]


def test_auto_is_the_planners_choice(monkeypatch):
    """For all ranks of torchrun; by itself it starts none on a CPU."""
    assert settle_layout("auto", "sprites", None, "cpu") is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    model, video = describe("sprites", None, None, None, None, None)
    chosen = settle_layout("auto", "sprites", None, "cpu")
    assert chosen == layouts_by_cost(4, model, video)[0].layout
    assert chosen.num_ranks == 4
