"""The Hopper kernel's own source on the emulator: packed batches against fp64, and planted bugs.

Each bug is an edit of the source that a GPU would answer with a hang, wrong values or undefined
behaviour. The emulator must catch every one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sora_kernels.attention import plan as plan_module
from sora_kernels.launch import find
from sora_kernels.testing.faults import FaultError
from sora_kernels.testing.gluon import __main__ as command
from sora_kernels.testing.gluon.cases import (
    FIXED,
    Case,
    attend,
    cases,
    check,
    check_schedules,
    inputs,
    schedules,
)
from sora_kernels.testing.gluon.language import kernel_source
from sora_kernels.testing.gluon.traffic import bytes_from_memory, items_of

pytest.importorskip("triton.experimental.gluon")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiles are small: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


QUICK = 40  # cases of the quick tests; the slow ones go on from there


@pytest.mark.parametrize("number", range(QUICK))
def test_a_packed_batch_is_right(number):
    *_, case = cases(number + 1)
    launched = check(case)
    if launched is None:  # no keys at all: nothing is launched
        assert sum(case.k_lens) == 0
        assert case.counts is None
        return
    assert launched.counts["products"] > 0
    assert launched.grid == min(case.processors, launched.arguments["items"])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_more_packed_batches_are_right(part):
    """200 more, 25 a part."""
    for case in list(cases(QUICK + 25 * (part + 1)))[-25:]:
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FIXED)))
def test_a_batch_is_right_under_many_schedules(number):
    check_schedules(replace(FIXED[number], seed=100), 12)


def test_the_schedule_changes_nothing():
    """Bit for bit: no result depends on who goes first or when a copy lands."""
    case = Case((200, 37, 129), (130, 300, 5), heads=2)
    operands = inputs(case)
    first, lse, _ = attend(case, operands)
    for other in schedules(replace(case, processors=2), 6):
        again, lse_again, _ = attend(other, operands)
        assert torch.equal(first, again)
        assert torch.equal(lse, lse_again)


def test_the_command_counts_its_cases(capsys):
    assert command.main(["--first", "7", "--cases", "2"]) == 0
    assert "2 of 2 cases right" in capsys.readouterr().out


LONG = Case((300, 20), (640, 300), heads=2, processors=1)
"""Several items a program, and several blocks an item."""
TAIL = Case((130, 20, 70), (200, 60, 150), spoilt=1, processors=2)
PADDED = Case((130, 20, 70), (200, 0, 300), heads=2, counts=(472, 9, 0), processors=2)
"""One segment of padding alone, and one without any."""
STEEP = replace(PADDED, magnitude=10.0)
"""With scores whose exponentials overflow."""
BUGS = {
    # barriers
    "keys are given back by one warpgroup alone": (
        "mbarrier.init(k_free.index(i), count=2)", "mbarrier.init(k_free.index(i), count=1)", LONG),
    "values are given back by one warpgroup alone": (
        "mbarrier.init(v_free.index(i), count=2)", "mbarrier.init(v_free.index(i), count=1)", LONG),
    "queries are given back by one warpgroup alone": (
        "mbarrier.init(q_free, count=2)", "mbarrier.init(q_free, count=1)", LONG),
    "initialised barriers are not fenced": (
        "    fence_async_shared()\n    gl.warp_specialize(", "    gl.warp_specialize(", LONG),
    "the producer waits in the phase of the consumers": (
        "mbarrier.wait(k_free.index(stage), phase ^ 1)",
        "mbarrier.wait(k_free.index(stage), phase)", LONG),
    "the bytes of one tile of queries are expected, two come": (
        "2 * q_source.block_type.nbytes", "q_source.block_type.nbytes", LONG),
    "no one waits for queries": (
        "        mbarrier.wait(q_ready, turn & 1)\n", "", LONG),
    "no one waits for the next keys": (
        "            mbarrier.wait(k_ready.index(next_stage), (next_count // STAGES) & 1)\n", "",
        LONG),
    "no one waits for values in the loop": (
        "            mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)\n", "", LONG),
    "stages are not counted over items": (
        "        mbarrier.arrive(v_free.index(stage), count=1)\n        count += 1\n",
        "        mbarrier.arrive(v_free.index(stage), count=1)\n", LONG),
    "the turn is not handed on": (
        "            mbarrier.arrive(turns.index(1 - GROUP), count=1)\n", "", LONG),
    "both warpgroups wait for a first turn": (
        "(issued & 1) ^ (1 - GROUP)", "issued & 1", LONG),
    # products and shared memory
    "values are given back before their product ends": (
        "            acc = warpgroup_mma_wait(0, (acc_token,))\n"
        "            mbarrier.arrive(v_free.index(stage), count=1)\n",
        "            mbarrier.arrive(v_free.index(stage), count=1)\n"
        "            acc = warpgroup_mma_wait(0, (acc_token,))\n", LONG),
    "queries are given back before the loop": (
        "        for _ in range(1, blocks):\n",
        "        mbarrier.arrive(q_free, count=1)\n        for _ in range(1, blocks):\n", LONG),
    "scores are read before their product ends": (
        "warpgroup_mma_wait(1, (scores_token,))", "warpgroup_mma_wait(2, (scores_token,))", LONG),
    "the sum is scaled before its product ends": (
        "            acc = warpgroup_mma_wait(0, (acc_token,))\n            mbarrier",
        "            acc = warpgroup_mma_wait(1, (acc_token,))\n            mbarrier", LONG),
    "the wait for the sum is left out": (
        "            acc = warpgroup_mma_wait(0, (acc_token,))\n            mbarrier",
        "            acc = acc_token\n            mbarrier", LONG),
    "cleared rows are not fenced": (
        ".to(tile.dtype))\n    fence_async_shared()\n", ".to(tile.dtype))\n", TAIL),
    "rows past the end are not cleared": (
        "        if left < BLOCK_N:\n", "        if left < -BLOCK_N:\n", TAIL),
    # values
    "a key of the next segment counts": ("(key < left)", "(key <= left)", TAIL),
    "the second warpgroup has the first one's queries": (
        "[q_first + ROWS, column]", "[q_first, column]", LONG),
    "every head reads the first": ("column = head * WIDTH", "column = 0", LONG),
    "the sum is not scaled down": (
        "            acc = acc * gl.convert_layout(shrink, out_rows)[:, None]\n", "", LONG),
    "queries of the next segment are stored to": (
        "mask=(row < q_last)[:, None]", "mask=(row < q_last + 1)[:, None]", TAIL),
    "the last item is left out": (
        "range(gl.program_id(0), items, gl.num_programs(0))",
        "range(gl.program_id(0), items - 1, gl.num_programs(0))", LONG),
    "the log-sum-exp is in powers of two": (" * 0.6931471805599453", "", LONG),
    # padding
    "queries are read for padding before they are there": (
        "        mbarrier.wait(q_ready, turn & 1)\n        if HAS_PADDING:\n",
        "        if HAS_PADDING:\n", PADDED),
    "padding counts once": (
        "gl.log2(gl.maximum(repeats, 1).to(gl.float32))", "0.0", PADDED),
    "padding's score is not scaled": (
        "[None, :], axis=1) * scale2\n    log", "[None, :], axis=1)\n    log", PADDED),
    "padding has the first segment's count": (
        "gl.load(counts_ptr + segment)", "gl.load(counts_ptr)", PADDED),
    "padding has the first head's key": (
        "pointer + head * WIDTH + column", "pointer + column", PADDED),
    "padding that counts for nothing is read": (
        "gl.where(repeats > 0, WIDTH, 0)", "WIDTH",
        Case((70, 130), (200, 140), counts=(0, 9), spoilt=1)),
    "a segment of padding alone sees nothing": (
        "            seen = seen | (repeats > 0)\n", "", STEEP),
    "padding is not in the greatest score": (
        "            top = gl.maximum(top, before)\n", "", STEEP),
    "padding is not in the sum of weights": (
        "            total = total + shrink\n", "", PADDED),
    "padding's value has all of the weight": (
        "padding_sums(shrink, ", "padding_sums(shrink * 0.0 + 1.0, ", STEEP),
    "padding's count is the count of blocks": (
        "            repeats = gl.load(counts_ptr + segment)\n",
        "            count = repeats = gl.load(counts_ptr + segment)\n", PADDED),
}  # fmt: skip


def mutant(bug: str) -> tuple[str, Case]:
    old, new, case = BUGS[bug]
    source = kernel_source()
    assert old in source, "the bug's place is gone: write it anew"
    return source.replace(old, new), case


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    """Under one of six schedules. Most are caught under each."""
    source, case = mutant(bug)
    with pytest.raises(AssertionError):
        check_schedules(case, 6, source)


@pytest.mark.parametrize("case", [LONG, TAIL, PADDED, STEEP])
def test_the_cases_of_the_bugs_pass_without_them(case):
    check_schedules(case, 6)


@pytest.mark.parametrize(
    ("bug", "told"),
    [
        ("the turn is not handed on", "deadlock"),
        ("cleared rows are not fenced", "did not fence"),
        ("initialised barriers are not fenced", "no fence made visible"),
        ("values are given back before their product ends", "that a product in flight reads"),
        ("the wait for the sum is left out", "before the wait for it"),
        ("the last item is left out", "elements stored to"),
    ],
)
def test_a_fault_is_told_by_its_kind(bug, told):
    source, case = mutant(bug)
    with pytest.raises(FaultError, match=told):
        check_schedules(case, 6, source)


# Wan 14B at 720p, 81 frames: 21 x 45 x 80 tokens, 40 heads of 128.
TOKENS, HEADS, WIDTH = 21 * 45 * 80, 40, 128
BLOCK_BYTES = 2 * 128 * WIDTH * 2


def test_keys_come_from_memory_few_times():
    """A head's keys and values are 39 MB, and the second-level cache 50: they come once for the
    rounds that have this head alone, and once in each of the two that it shares with a neighbour.
    """
    items = items_of([TOKENS], HEADS)
    assert len(items) == HEADS * (TOKENS // 128 + 1)
    all_of_them = 2 * TOKENS * HEADS * WIDTH * 2
    taken = bytes_from_memory(items, BLOCK_BYTES)
    assert all_of_them <= taken <= 3 * all_of_them  # 3.7 GB of 1.5


def test_a_plan_is_taken_as_it_is(monkeypatch):
    """The tiles that `plan_attention` makes for Hopper are the kernel's, and none are made anew."""
    for width in gluon_widths():
        assert find("packed_attention", 90, torch.bfloat16, width).block_m == 128
    case = Case((200, 37), (130, 300), block=128)
    operands = inputs(case)
    expected, _, _ = attend(replace(case, block=0), operands)
    planned = plan_module.plan_tiles
    made = []
    monkeypatch.setattr(
        plan_module, "plan_tiles", lambda *args: made.append(args) or planned(*args)
    )
    out, _, _ = attend(case, operands)
    assert made == []
    assert torch.equal(out, expected)


def gluon_widths():
    from sora_kernels.attention import gluon

    assert gluon.TAKES_PLAN
    return gluon.WIDTHS


@pytest.mark.slow
def test_with_heads_fastest_all_keys_come_again_in_every_round():
    """The order that was before: 179 rounds of 132 programs, each with all 40 heads."""
    source = kernel_source()
    for new, old in (("head = item // tiles", "head = item % 40"), ("item % tiles", "item // 40")):
        assert new in source
        source = source.replace(new, old)
    taken = bytes_from_memory(items_of([TOKENS], HEADS, source), BLOCK_BYTES)
    rounds = math.ceil(HEADS * (TOKENS // 128 + 1) / 132)
    all_of_them = 2 * TOKENS * HEADS * WIDTH * 2
    assert 0.95 * rounds <= taken / all_of_them <= 1.05 * rounds  # 277 GB
