"""Backends that `auto` takes because a card was measured: what is needed for it, and what is not
enough."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sora_kernels import admission, launch
from sora_kernels.admission import Admission, admitted
from sora_kernels.attention import api, gluon
from sora_kernels.attention import triton as portable
from sora_kernels.dispatch import Case

ROOT = Path(__file__).parents[2]
GLUON = Admission(
    op="packed_attention",
    backend="gluon",
    architecture=90,
    head_dims=(64, 128),
    dtypes=("bfloat16",),
    triton="3.6",
    gain=1.4,
    device="a card",
    commit="abc",
)
CARD = torch.device("cuda", 0)
CASE = Case("cuda", 0, torch.bfloat16, 128)


@pytest.fixture(scope="module")
def of_lines():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield runpy.run_path(str(ROOT / "benchmarks/gpu/admission.py"))["admissions"]
    sys.path.remove(str(ROOT / "benchmarks"))


def lines(**changes):
    """A run in which gluon is right, and 1.5 and 1.4 times as fast as triton at two shapes."""
    settings = {"triton": "3.6.0", "right": True, "fast": 1.4, "op": "packed_attention"}
    settings |= changes
    yield {"stage": "rates", "what": "commit", "figure": "abc"}
    for what, told in (
        ("device", "a card"),
        ("architecture", "90"),
        ("triton", settings["triton"]),
    ):
        yield {"stage": "rates", "what": what, "figure": told}
    for backend in ("triton", "gluon"):
        for at, right in (("one", True), ("two", settings["right"] or backend == "triton")):
            yield {"what": at, "figure": "", "op": settings["op"], "backend": backend,
                   "dtype": "bfloat16", "right": right}  # fmt: skip
        for shape, width, gain in (("small", 64, 1.5), ("large", 128, settings["fast"])):
            rate = 400.0 * (gain if backend == "gluon" else 1)
            yield {"what": shape, "figure": "", "op": settings["op"], "backend": backend,
                   "shape": shape, "head_dim": width, "tflops": rate}  # fmt: skip


def test_what_is_right_and_faster_everywhere_is_admitted(of_lines):
    assert list(of_lines(list(lines()))) == [GLUON]


@pytest.mark.parametrize(
    "changes",
    [{"right": False}, {"fast": 1.02}, {"fast": 0.7}, {"op": "temporal_attention"}],
)
def test_what_is_wrong_once_or_slower_once_is_not(of_lines, changes):
    assert list(of_lines(list(lines(**changes)))) == []


def test_what_was_not_checked_or_not_timed_is_not(of_lines):
    every = list(lines())
    gluon_lines = [line for line in every if line.get("backend") == "gluon"]
    unchecked = [line for line in every if line not in gluon_lines or "right" not in line]
    untimed = [line for line in every if line not in gluon_lines or "tflops" not in line]
    assert list(of_lines(unchecked)) == list(of_lines(untimed)) == list(of_lines([])) == []


def test_the_last_run_counts_alone(of_lines):
    assert list(of_lines([*lines(), *lines(right=False)])) == []
    assert list(of_lines([*lines(right=False), *lines()])) == [GLUON]


def test_written_and_read_again(tmp_path):
    entries = [GLUON, replace(GLUON, backend="flash", gain=1.6)]
    admission.write(entries, tmp_path / "some.json")
    assert admission.read(tmp_path / "some.json") == (entries[1], entries[0])
    admission.write([], tmp_path / "none.json")
    assert admission.read(tmp_path / "none.json") == ()


def test_what_ships_was_measured():
    """Every entry has its run among the committed results."""
    results = ROOT / "benchmarks/results/gpu.jsonl"
    kept = results.read_text().splitlines() if results.exists() else []
    commits = {line["figure"] for line in map(json.loads, kept) if line.get("what") == "commit"}
    assert {entry.commit for entry in admission.read()} <= commits


@pytest.fixture
def on_a_card(monkeypatch):
    """Of sm_90 under Triton 3.6, on which gluon was admitted, and every backend could serve."""
    monkeypatch.setattr(admission, "read", lambda: (GLUON,))
    monkeypatch.setattr(admission, "triton_version", lambda: "3.6")
    monkeypatch.setattr(launch, "_cuda_architecture", lambda index: 90)
    for backend in (gluon, portable):
        monkeypatch.setattr(backend, "unsupported", lambda case: None)
    api.OP._chosen.clear()
    yield monkeypatch
    api.OP._chosen.clear()


def test_auto_takes_it_there(on_a_card):
    assert list(admitted("packed_attention", CARD, torch.bfloat16, 128)) == ["gluon"]
    assert api.OP.resolve("auto", CASE) is gluon


@pytest.mark.parametrize(
    "case",
    [
        replace(CASE, width=72),
        replace(CASE, dtype=torch.float16),
        replace(CASE, dtype=torch.float32),
    ],
)
def test_auto_takes_its_own_where_it_was_not_measured(on_a_card, case):
    assert api.OP.resolve("auto", case) is portable


def test_another_card_or_another_compiler_is_not_the_one(on_a_card):
    on_a_card.setattr(admission, "triton_version", lambda: "3.7")
    assert api.OP.resolve("auto", CASE) is portable
    on_a_card.setattr(admission, "triton_version", lambda: "3.6")
    on_a_card.setattr(launch, "_cuda_architecture", lambda index: 100)
    assert list(admitted("packed_attention", CARD, torch.bfloat16, 128)) == []
    on_a_card.setattr(launch, "_cuda_architecture", lambda index: 90)
    assert list(admitted("packed_attention", torch.device("cpu"), torch.bfloat16, 128)) == []
    assert list(admitted("temporal_attention", CARD, torch.bfloat16, 128)) == []


def test_one_that_cannot_serve_is_passed_over(on_a_card):
    on_a_card.setattr(gluon, "unsupported", lambda case: "no such luck")
    assert api.OP.resolve("auto", CASE) is portable
