"""The benchmarks themselves: rivals do the same work in turns, and profiles run to their end."""

from __future__ import annotations

import random
import threading
import time

import pytest

from sora_engine.bench import h200, serving
from sora_engine.bench.intervals import ratio_interval
from sora_engine.bench.profiles import run
from sora_engine.bench.results import Result, ResultError
from sora_engine.bench.timing import Turns, interleaved
from sora_engine.cli import main


def test_rounds_turn_around():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(values) for values in times.values()] == [3, 3]


def drive(turns: Turns, name: str, stretches: int, log: list[str], fail: bool = False) -> None:
    turns.start(name)
    try:
        for i in range(stretches):
            log.append(f"{name}{i}")
            time.sleep(0.002)
            if fail:
                raise RuntimeError
            if i < stretches - 1:
                turns.boundary(name)
    except RuntimeError:
        pass
    finally:
        turns.end(name)


@pytest.mark.parametrize(
    ("counts", "fails", "order"),
    [
        ((3, 3), False, "a0 b0 b1 a1 a2 b2"),
        ((1, 3), False, "a0 b0 b1 b2"),
        ((3, 3), True, "a0 b0 b1 b2"),
    ],
)
def test_two_runs_alternate_stretch_by_stretch(counts, fails, order):
    turns, log = Turns("a", "b"), []
    threads = [
        threading.Thread(target=drive, args=(turns, "a", counts[0], log, fails)),
        threading.Thread(target=drive, args=(turns, "b", counts[1], log)),
    ]
    for thread in reversed(threads):  # whoever comes first
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert " ".join(log) == order
    assert len(turns.stretches["b"]) == 3
    assert all(0.002 <= s < 5 for values in turns.stretches.values() for s in values)


def test_arrivals_keep_their_shares_and_mean():
    trace = serving.arrivals(serving.MIXED, 1000, 0.5, seed=3)
    assert sum(not a.kind.small for a in trace) == 100
    assert 0.45 < trace[-1].at_s / len(trace) < 0.55
    assert [a.at_s for a in trace] == sorted(a.at_s for a in trace)
    assert trace == serving.arrivals(serving.MIXED, 1000, 0.5, seed=3)
    assert [a.kind for a in trace] != [
        a.kind for a in serving.arrivals(serving.MIXED, 1000, 0.5, 4)
    ]


def test_latency_counts_from_the_arrival():
    """A server that takes 20 ms a request, of which three arrive at once."""
    kind = serving.MIXED[0]
    trace = [serving.Arrival(0.05, kind, seed) for seed in range(3)]
    lock = threading.Lock()

    def work(done):
        with lock:
            time.sleep(0.02)
        done()

    def serve(_arrival, done):
        threading.Thread(target=work, args=(done,)).start()

    took = sorted(serving.replay(trace, serve))
    assert [round(s / 0.02) >= i + 1 for i, s in enumerate(took)] == [True] * 3
    assert took[0] < 5


def test_an_interval_covers_the_ratio_nine_times_in_ten():
    """Traces of known medians, 1 and 2, each trace slower or faster by a factor of its own."""
    covered = 0
    for seed in range(30):
        rng = random.Random(seed)
        pace = [rng.lognormvariate(0, 0.3) for _ in range(6)]
        ours, theirs = (
            [[p * m * rng.lognormvariate(0, 0.5) for _ in range(30)] for p in pace] for m in (1, 2)
        )
        low, high = ratio_interval(ours, theirs, seed=seed, draws=200)
        covered += low <= 2 <= high
        assert low < high
    # Of 30, 27 are due; below 21 is a chance of 1 in 1,000 (binomial), were it so.
    assert covered >= 21
    one = [[1.0] * 5], [[3.0] * 5]
    assert ratio_interval(*one) == (3.0, 3.0)
    with pytest.raises(ValueError, match="1 traces beside 2"):
        ratio_interval([[1.0]], [[1.0], [2.0]])


def test_the_cpu_profile_runs_tiny(tmp_path, capsys):
    pytest.importorskip("diffusers")
    path = tmp_path / "r.json"
    assert main(["bench", "--tiny", "-o", str(path)]) == 0
    found = Result.read(path)
    assert found.profile == "cpu-tiny"
    groups = {m.name.partition(":")[0] for m in found.measurements}
    assert groups == {"op", "block", "linear", "end to end", "serving"}
    (whole,) = [m for m in found.measurements if "whole run" in m.name]
    assert 0 < whole.figures["relative difference of latents"] < 1e-4
    (block,) = [m for m in found.measurements if m.name.startswith("block")]
    assert 0 < block.figures["relative difference"] < 1e-4
    (step,) = [m for m in found.measurements if ": step" in m.name]
    assert [len(values) for values in step.samples.values()] == [3, 3]
    (small,) = [m for m in found.measurements if "latency of small" in m.name]
    assert set(small.samples) == {"sora", serving.FIFO, serving.DIFFUSERS}
    assert " to " in small.figures[f"times better than {serving.FIFO}, 90% interval"]
    (by_trace,) = [m for m in found.measurements if "by trace" in m.name]
    assert {len(values) for values in by_trace.samples.values()} == {1}
    assert small.figures["p50 of sora"] <= small.figures["p95 of sora"]
    assert "whole run" in capsys.readouterr().out


def test_the_h200_profile_dry_runs_on_the_cpu():
    pytest.importorskip("diffusers")
    said = []
    found = run("h200", tiny=True, say=said.append)
    steps = {m.name: m for m in found.measurements if "step" in m.name}
    for i, case in enumerate(h200.CASES):
        for rival in ("diffusers eager", "diffusers compiled"):
            step = steps[f"h200: step with guidance, {case.name}, beside {rival}"]
            assert set(step.samples) == {"sora", rival}
            assert step.figures["relative difference"] < 1e-4
            assert step.figures.get("scaled to blocks") == (None if i == 0 else 4)


def test_depths_scale_by_the_difference():
    times = {2: {"sora": [3.0]}, 6: {"sora": [7.0]}}
    assert h200.scale(times, 40) == {"sora": [41.0]}
    assert h200.scale({30: {"sora": [5.0]}}, 30) == {"sora": [5.0]}


def test_flops_are_those_that_torch_counts(monkeypatch):
    """The formula against torch's own count over a reference forward pass."""
    diffusers = pytest.importorskip("diffusers")
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    case = h200.tiny(h200.CASES[0])
    model = diffusers.WanTransformer3DModel(**case.shape.transformer_config())
    T, H, W = case.grid
    x = torch.randn(1, case.shape.channels, T, 2 * H, 2 * W)
    text = torch.randn(1, h200.TEXT_TOKENS, case.shape.text_dim)
    totals = {}
    # The fused attention of a CPU is not counted; its products, written out, are.
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **_: (query @ key.mT).softmax(-1) @ value,
    )
    with torch.no_grad():
        for layers in (1, 2):
            blocks = model.blocks
            model.blocks = blocks[:layers]
            with FlopCounterMode(display=False) as counter:
                model(x, torch.tensor([5.0]), text)
            model.blocks, totals[layers] = blocks, counter.get_total_flops()
    a_block = totals[2] - totals[1]
    texts_keys = 4 * h200.TEXT_TOKENS * case.shape.width**2
    assert a_block - texts_keys == case.flops() / 2 / case.shape.layers


def test_no_budget_no_cases():
    found = h200.h200(device="cpu", dry_run=True, budget_s=0.0, say=lambda _: None)
    assert [m.name for m in found] == ["h200: GEMM rate"]


def test_wrong_names_are_refused(capsys):
    with pytest.raises(ResultError, match="no profile 'tpu'"):
        run("tpu")
    with pytest.raises(ResultError, match="no group 'opps'"):
        run("cpu", only=["opps"])
    assert main(["bench", "--profile", "tpu"]) == 2
    assert main(["bench", "--output", "r.txt"]) == 2
    assert "--output: r.txt must end in .json" in capsys.readouterr().err
