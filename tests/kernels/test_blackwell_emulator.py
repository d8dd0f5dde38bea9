"""The Blackwell kernel's own source on the emulator: packed batches against fp64, and planted bugs.

As for the Hopper kernel (`test_gluon_emulator.py`), which has the emulator's own cases.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_gluon_emulator import QUICK, STEEP, one_thread  # noqa: F401

from sora_kernels.attention import plan
from sora_kernels.dispatch import Op
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
from sora_kernels.testing.gluon.language import Emulator, kernel_source
from sora_kernels.testing.gluon.machine import Machine
from sora_kernels.testing.gluon.memory import Operations
from sora_kernels.testing.gluon.registers import Tile
from sora_kernels.testing.gluon.tensor_memory import TensorMemory

pytest.importorskip("triton.experimental.gluon")

KERNEL = "blackwell"


@pytest.mark.parametrize("number", range(QUICK))
def test_a_packed_batch_is_right(number):
    *_, case = cases(number + 1, KERNEL)
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
    for case in list(cases(QUICK + 25 * (part + 1), KERNEL))[-25:]:
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FIXED)))
def test_a_batch_is_right_under_many_schedules(number):
    check_schedules(replace(FIXED[number], seed=100, kernel=KERNEL), 12)


def test_the_schedule_changes_nothing():
    """Bit for bit: no result depends on who goes first or when a copy lands."""
    case = Case((200, 37, 300), (130, 300, 5), heads=2, kernel=KERNEL)
    operands = inputs(case)
    first, lse, _ = attend(case, operands)
    for other in schedules(replace(case, processors=2), 6):
        again, lse_again, _ = attend(other, operands)
        assert torch.equal(first, again)
        assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("kernel", ["gluon", "blackwell"])
def test_company_changes_no_bit(kernel):
    """A segment's result is the same alone and packed beside others, though one group's rows of a
    tile may be scaled where another's are not."""
    case = Case(
        (200, 37, 300), (390, 300, 140), heads=2, width=128, counts=(3, 0, 500), magnitude=10.0,
        kernel=kernel,
    )  # fmt: skip
    operands = inputs(case)
    out, lse, _ = attend(case, operands)
    parts = zip(*(x.split(list(lens)) for x, lens in zip(
        (*operands, out, lse),
        (case.q_lens, case.k_lens, case.k_lens, case.q_lens, case.q_lens), strict=True,
    )), strict=True)  # fmt: skip
    for i, (q, k, v, due, due_lse) in enumerate(parts):
        lens = {"q_lens": (len(q),), "k_lens": (len(k),), "counts": (case.counts[i],)}
        alone, lse_alone, _ = attend(replace(case, **lens), (q, k, v))
        assert torch.equal(alone, due)
        assert torch.equal(lse_alone, due_lse)


def test_the_command_runs_it(capsys):
    assert command.main(["--first", "7", "--cases", "2", "--kernel", KERNEL]) == 0
    assert "2 of 2 cases right" in capsys.readouterr().out


LONG = Case((300, 20), (640, 300), heads=2, processors=1, kernel=KERNEL)
"""Several items a program, and several blocks an item."""
RISING = replace(LONG, magnitude=10.0)
"""With scores that pass far over those before them, so that sums are scaled."""
TAIL = Case((130, 20, 270), (200, 60, 150), spoilt=1, processors=2, kernel=KERNEL)
PADDED = Case(
    (330, 20, 70), (200, 0, 300), heads=2, counts=(472, 9, 0), processors=1, kernel=KERNEL
)
STEEP = replace(STEEP, kernel=KERNEL)  # scores whose exponentials overflow
CLEARED = (
    "                mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)\n"
    "                clear_rows(v_tiles.index(stage), left, WIDTH)\n"
)
STORED = "            p_tile.store(gl.convert_layout(weights.to(dtype), p_layout))\n"
SCALED = (
    "            if gl.min(shrink, axis=0) < 1.0:\n"
    "                acc = o_tile.load(o_layout)\n"
    "                o_tile.store(acc * gl.convert_layout(shrink, out_rows)[:, None])\n"
)
TOLD = "            mbarrier.arrive(p_ready.index(GROUP), count=1)\n"
VALUES_FREE = (
    "sums.index(group), use_acc=(i > 1) | HAS_PADDING,\n"
    "                    mbarriers=[v_free.index(stage)],\n"
)
BUGS = {
    # barriers
    "keys are given back after one group's product": (
        "mbarrier.init(k_free.index(i), count=2)", "mbarrier.init(k_free.index(i), count=1)", LONG),
    "values are given back after one group's product": (
        "mbarrier.init(v_free.index(i), count=2)", "mbarrier.init(v_free.index(i), count=1)", LONG),
    "queries are given back while padding is read": (
        "mbarrier.init(q_free, count=3)", "mbarrier.init(q_free, count=1)", PADDED),
    "padding does not give queries back": (
        "            mbarrier.arrive(q_free, count=1)\n", "", PADDED),
    "initialised barriers are not fenced": (
        "    fence_async_shared()\n    gl.warp_specialize(", "    gl.warp_specialize(", LONG),
    "copies wait in the phase of the products": (
        "mbarrier.wait(k_free.index(stage), phase ^ 1)",
        "mbarrier.wait(k_free.index(stage), phase)", LONG),
    "the bytes of one tile of queries are expected, two come": (
        "2 * q_source.block_type.nbytes", "q_source.block_type.nbytes", LONG),
    "products do not wait for queries": (
        "        mbarrier.wait(q_ready, turn & 1)\n        stage", "        stage", LONG),
    "padding does not wait for queries": (
        "            mbarrier.wait(q_ready, turn & 1)\n            repeats",
        "            repeats", PADDED),
    "products do not wait for the next keys": (
        "            mbarrier.wait(k_ready.index(next_stage), (next_count // STAGES) & 1)\n", "",
        LONG),
    "products do not wait for values in the loop": (
        "            mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)\n            mb",
        "            mb", LONG),
    "products do not wait for the last values": (
        "        mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)\n        for",
        "        for", LONG),
    "products do not wait for weights": (
        "                mbarrier.wait(p_ready.index(group), issued & 1)\n", "", LONG),
    "products do not wait for the last weights": (
        "            mbarrier.wait(p_ready.index(group), issued & 1)\n            tc",
        "            tc", LONG),
    "stages are not counted over items": (
        "        issued += 1\n        count += 1\n", "        issued += 1\n", LONG),
    "weights are not counted over items": (
        "        issued += 1\n        count += 1\n", "        count += 1\n", LONG),
    "queries are given back before the loop": (
        "        tcgen05_commit(q_free)\n        stage = count % STAGES\n",
        "        stage = count % STAGES\n", LONG),
    "queries are given back with the first scores": (
        "        for i in range(1, blocks):\n            next",
        "        tcgen05_commit(q_free)\n        for i in range(1, blocks):\n            next",
        LONG),
    "the first weights are not told of": (
        "        mbarrier.arrive(p_ready.index(GROUP), count=1)\n        issued",
        "        issued", LONG),
    # tensor memory
    "scores are read before their product ends": (
        "            mbarrier.wait(s_ready.index(GROUP), issued & 1)\n", "", LONG),
    "the result is read before its product ends": (
        "        mbarrier.wait(o_ready.index(GROUP), turn & 1)\n", "", LONG),
    "weights are told of before the sum is scaled": (SCALED + TOLD, TOLD + SCALED, RISING),
    "weights are told of before they are there": (
        STORED + SCALED + TOLD, SCALED + TOLD + STORED, LONG),
    "weights are the other group's": (
        "                    weights_in(scores.index(group), dtype), v_tiles.index(stage),\n",
        "                    weights_in(scores.index(1 - group), dtype), v_tiles.index(stage),\n",
        LONG),
    "the groups share a sum": ("o_tile = sums.index(GROUP)", "o_tile = sums.index(0)", LONG),
    "the groups share scores": ("s_tile = scores.index(GROUP)", "s_tile = scores.index(0)", LONG),
    "an item adds to the sum of the one before": (
        "use_acc=(i > 1) | HAS_PADDING", "use_acc=True", LONG),
    "an item of one block adds to the sum of the one before": (
        "use_acc=(blocks > 1) | HAS_PADDING", "use_acc=True",
        Case((300, 20), (60, 128), processors=1, kernel=KERNEL)),
    "the second block's product forgets the first's": ("(i > 1)", "(i > 2)", LONG),
    "padding's sum is forgotten": ("use_acc=(i > 1) | HAS_PADDING", "use_acc=i > 1", PADDED),
    "scores are scaled twice": (
        "weights = gl.exp2(weights * scale2 - new_top[:, None])",
        "weights = gl.exp2(weights * scale2 * scale2 - new_top[:, None])", LONG),
    "more tensor memory than there is": (
        "allocate_tensor_memory(gl.float32, [2, ROWS, BLOCK_N], s_layout)",
        "allocate_tensor_memory(gl.float32, [4, ROWS, BLOCK_N], s_layout)", LONG),
    # shared memory
    "cleared rows are not fenced": (
        ".to(tile.dtype))\n    fence_async_shared()\n", ".to(tile.dtype))\n", TAIL),
    "rows past the end are not cleared": (CLEARED, "                stage = stage\n", TAIL),
    "rows are cleared before they come": (
        CLEARED, CLEARED.splitlines(keepends=True)[1], TAIL),
    "rows are cleared for the second group alone": ("if GROUP == 0:", "if GROUP == 1:", TAIL),
    "values are given back before their product": (
        VALUES_FREE, VALUES_FREE.replace("[v_free.index(stage)]", "[]"), LONG),
    # values
    "a key of the next segment counts": ("(key < left)", "(key <= left)", TAIL),
    "the second group has the first one's queries": (
        "[q_first + ROWS, column]", "[q_first, column]", LONG),
    "every head reads the first": ("column = head * WIDTH", "column = 0", LONG),
    "the sum is not scaled down": (SCALED, "", RISING),
    "a greatest score that rises is not taken": (
        "gl.where(new_top > top + RISE, new_top, top)", "top", RISING),
    "each block halves the sum": (
        "shrink = gl.exp2(top - new_top)", "shrink = gl.exp2(top - new_top) * 0.5", LONG),
    "queries of the next segment are stored to": (
        "mask=(row < q_last)[:, None]", "mask=(row < q_last + 1)[:, None]", TAIL),
    "the last item is left out": (
        "range(gl.program_id(0), items, gl.num_programs(0))",
        "range(gl.program_id(0), items - 1, gl.num_programs(0))", LONG),
    "the log-sum-exp is in powers of two": (" * 0.6931471805599453", "", LONG),
    "a segment of padding alone sees nothing": (
        "            seen = seen | (repeats > 0)\n", "", STEEP),
    "padding is not in the greatest score": (
        "            top = gl.maximum(top, before)\n", "", STEEP),
    "padding is not in the sum of weights": (
        "            total = total + shrink\n", "", PADDED),
}  # fmt: skip


def mutant(bug: str) -> tuple[str, Case]:
    old, new, case = BUGS[bug]
    source = kernel_source(KERNEL)
    if old not in source:
        pytest.fail(f"the place of {bug!r} is gone: write it anew")
    return source.replace(old, new), case


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    """Under one of six schedules. Most are caught under each."""
    source, case = mutant(bug)
    with pytest.raises(AssertionError):
        check_schedules(case, 6, source)


@pytest.mark.parametrize("case", [LONG, RISING, TAIL, PADDED, STEEP])
def test_the_cases_of_the_bugs_pass_without_them(case):
    check_schedules(case, 6)


@pytest.mark.parametrize(
    ("bug", "told"),
    [
        ("the first weights are not told of", "deadlock"),
        ("initialised barriers are not fenced", "no fence made visible"),
        ("scores are read before their product ends", "that a product in flight writes"),
        ("weights are told of before the sum is scaled", "that a product in flight"),
        ("more tensor memory than there is", "640 columns of tensor memory of 512"),
        ("cleared rows are not fenced", "did not fence"),
    ],
)
def test_a_fault_is_told_by_its_kind(bug, told):
    source, case = mutant(bug)
    with pytest.raises(FaultError, match=told):
        check_schedules(case, 6, source)


def test_narrow_elements_lie_in_the_cells_of_wide_ones():
    """Weights take the first half of the cells of their scores, and leave the rest."""
    from triton.experimental.gluon.language.nvidia.blackwell import TensorMemoryLayout

    operations = Operations(Machine(0, 0, 1, "any"))
    layout = TensorMemoryLayout((128, 128), col_stride=1)
    scores = TensorMemory.allocate(operations, torch.float32, [2, 128, 128], layout).index(1)
    weights = scores._reinterpret(torch.bfloat16, [128, 128], layout)
    with pytest.raises(FaultError, match="nothing has come"):
        scores.load(None)
    scores.store(Tile(torch.ones(128, 128)))
    weights.store(Tile(torch.full((128, 128), 2.0, dtype=torch.bfloat16)))
    left, right = scores.load(None).values.chunk(2, dim=1)
    assert bool((left != 1).all())
    assert bool((right == 1).all())
    assert bool((weights.load(None).values == 2).all())
    with pytest.raises(FaultError, match="where there is less room"):
        scores._reinterpret(torch.float64, [128, 128], layout)
    with pytest.raises(FaultError, match="a store of"):
        weights.store(Tile(torch.ones(128, 128)))


def test_a_plan_has_the_tiles_of_the_backend_that_it_is_for(monkeypatch):
    """Blackwell's are wider than those of the portable kernel and Hopper's."""
    from sora_kernels.attention import blackwell, gluon, triton

    modules = {"blackwell": blackwell, "gluon": gluon, "triton": triton}
    monkeypatch.setattr(Op, "resolve", lambda self, backend, case: modules[backend])
    monkeypatch.setattr(plan, "architecture", lambda device: 100)
    card = torch.device("cuda", 0)
    blocks = {name: plan._tile_of(name, card, torch.bfloat16, 128) for name in modules}
    assert blocks == {"blackwell": 256, "gluon": 128, "triton": 128}


def test_a_plan_is_taken_as_it_is(monkeypatch):
    """And none is made anew; one of other tiles is not taken."""
    case = Case((200, 37, 300), (130, 300, 5), block=256, kernel=KERNEL)
    operands = inputs(case)
    expected, _, _ = attend(replace(case, block=0), operands)
    planned, made = plan.plan_tiles, []
    monkeypatch.setattr(plan, "plan_tiles", lambda *args: made.append(args) or planned(*args))
    for block, times in ((256, 0), (128, 1)):
        out, _, _ = attend(replace(case, block=block), operands)
        assert len(made) == times
        assert torch.equal(out, expected)


def test_an_emulator_outside_a_kernel_has_no_tensor_memory():
    with pytest.raises(FaultError, match="outside a kernel"):
        _ = Emulator().ops
