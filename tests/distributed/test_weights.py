"""Weights that ranks share out: the same video, a share of the memory, a share of the file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sora_engine.cli.options import parse_parallel
from sora_engine.config import ParallelConfig
from sora_engine.distributed.layout_cost import (
    H200,
    TransformerCost,
    VideoCost,
    cost,
    layouts_by_cost,
    sent_bytes,
)
from sora_engine.io.safetensors import SafetensorsFile
from tests.distributed.test_planner import FIVE_S, TINY, WAN_14B
from tests.distributed.tiny import tiny_transformer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "transformer.safetensors"
    save_file(tiny_transformer().state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("layout", "request_name"),
    [
        ({"ulysses": 2}, "guided"),
        ({"ulysses": 2, "ring": 2}, "mixed"),
        ({"ring": 3, "guidance": 2}, "windows"),
        ({"ulysses": 4, "ring": 2}, "few"),  # ranks without tokens gather all the same
    ],
    ids=str,
)
def test_latents_bytes_and_memory(fleet, weights, layout, request_name):
    config = ParallelConfig(**layout, shard_weights=True)
    ranks = fleet.run(
        "denoise",
        layout={**layout, "shard_weights": True},
        request=request_name,
        weights=str(weights),
    )[: config.num_ranks]
    assert ranks[0]["error"] < 1e-5
    assert len({rank["digest"] for rank in ranks}) == 1

    blocks = dict(tiny_transformer().blocks.named_parameters())
    tables = sum(p.nbytes for n, p in blocks.items() if n.endswith("scale_shift_table"))
    whole = sum(p.nbytes for p in blocks.values()) - tables
    others = sum(p.nbytes for p in tiny_transformer().parameters()) - whole
    # Of the blocks every byte is read by one rank of a cell, and the tables by all.
    assert sum(rank["read"] - tables for rank in ranks) == config.cells * whole
    each = TINY.layers * TINY.shard_bytes(config.sequence)
    assert whole <= config.sequence * each < 1.1 * whole
    for rank in ranks:
        assert rank["read"] - tables <= each
        # Nothing that was gathered is still held.
        assert each <= rank["live"] - others < 1.01 * each


def test_weights_of_two_dtypes_cross_together(fleet, weights):
    """bfloat16, and norms that stay float32: within bfloat16's rounding of one rank's."""
    layout = {"ulysses": 2, "shard_weights": True}
    run = {"layout": layout, "request": "guided", "weights": str(weights), "dtype": "bfloat16"}
    assert fleet.run("denoise", **run)[0]["error"] < 2e-2


def test_bytes_are_those_of_the_planner(fleet, weights):
    config = ParallelConfig(ulysses=2, ring=2, shard_weights=True)
    layout = {"ulysses": 2, "ring": 2, "shard_weights": True}
    ranks = fleet.run("denoise", layout=layout, request="guided", weights=str(weights))[:4]
    video = VideoCost(frames=3, height=6, width=10, channels=4, batch_tokens=10**6)
    for rank, sent in zip(ranks, sent_bytes(config, TINY, video), strict=True):
        # One gathering more than there are steps: the texts are encoded once.
        gathered = sent.pop("weights")
        assert rank["sent"].pop("weights") == pytest.approx(
            gathered * (rank["steps"] + 1), rel=0.01
        )
        for purpose, n in sent.items():
            assert rank["sent"][purpose] / rank["steps"] == pytest.approx(n, rel=0.01)


def test_rows_of_a_tensor_are_read_alone(weights):
    name = "blocks.1.ffn.net.2.weight"
    with SafetensorsFile(weights) as file:
        whole = file.read(name)
        assert torch.equal(file.read(name, rows=range(7, 20)), whole[7:20])
        assert file.read(name, rows=range(60, 60)).shape == (0, *whole.shape[1:])
        assert torch.equal(file.read(name, rows=range(len(whole))), whole)


def test_the_planner_counts_a_share_of_the_weights():
    whole = cost(ParallelConfig(ulysses=8), WAN_14B, FIVE_S, H200)
    shared = cost(ParallelConfig(ulysses=8, shard_weights=True), WAN_14B, FIVE_S, H200)
    weights = WAN_14B.parameters * 2
    saved = weights - weights / 8 - 2 * weights / 40
    assert whole.memory_bytes - shared.memory_bytes == pytest.approx(saved, rel=1e-3)
    sent = shared.sent_bytes[0]["weights"]
    passes = 2  # 75,600 tokens a branch: each alone
    assert sent == pytest.approx(passes * 7 / 8 * weights, rel=0.01)
    assert shared.step_s < 1.05 * whole.step_s  # it crosses under the work


def test_weights_are_shared_out_where_nothing_else_fits():
    vast = TransformerCost(layers=128, heads=64, head_dim=128, ffn=32768, patch_channels=64)
    assert vast.parameters * 2 > H200.memory_bytes
    small = VideoCost(frames=5, height=30, width=52)
    assert not any(c.layout.shard_weights for c in layouts_by_cost(4, WAN_14B, small))
    best = layouts_by_cost(4, vast, small)[0]
    assert best.layout.shard_weights
    assert best.memory_bytes < H200.memory_bytes


def test_a_layout_of_one_rank_a_pass_has_nothing_to_share_out():
    with pytest.raises(ValueError, match=r"shard_weights .* ulysses=2 or ring=2 would work"):
        ParallelConfig(guidance=2, shard_weights=True)
    assert parse_parallel("ulysses=2, shard_weights") == ParallelConfig(
        ulysses=2, shard_weights=True
    )
    assert str(ParallelConfig(ulysses=2, shard_weights=True)) == "ulysses=2 shard_weights"
