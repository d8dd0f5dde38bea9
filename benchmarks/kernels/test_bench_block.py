"""A block of the Wan model beside diffusers' block: width 1536, 1,280 tokens, the same threads.

Runs are interleaved, and the figure is the median of paired ratios. The engine keeps a text's keys
and values for a whole run where diffusers' block computes them on every call, so the ratio is given
both ways: `times diffusers` as the engine runs, `with keys and values` computing them as well.
"""

from __future__ import annotations

import pytest
import torch
from block import wan_blocks
from shapes import ON_CPU, paired_ratio, synchronise


def test_wan_block(benchmark):
    pytest.importorskip("diffusers")
    tiny = not benchmark.enabled
    with torch.inference_mode():
        blocks = wan_blocks(tiny)

        def once() -> None:
            blocks.ours()
            synchronise()

        benchmark.pedantic(once, rounds=1 if tiny else 5, warmup_rounds=1)
        if tiny:
            return
        rounds = 15 if ON_CPU else 50
        benchmark.extra_info["times diffusers"] = round(
            paired_ratio(blocks.diffusers, blocks.ours, rounds), 3
        )
        benchmark.extra_info["with keys and values"] = round(
            paired_ratio(blocks.diffusers, blocks.with_keys_and_values, rounds), 3
        )
        print(benchmark.name, benchmark.extra_info)
