"""Calls that are launched again: with the same kernel and arguments as Triton's own launch has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
OPS = (
    "norm", "norm of several levels", "gated", "gated, affine", "rope", "norm of q", "attention",
    "cross-attention", "causal",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `replays.py` says, from a process in which kernels are compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    roots = [str(HERE.parents[1] / "kernels"), *sys.path]
    done = subprocess.run(
        [sys.executable, str(HERE / "replays.py")],
        env={**environment, "PYTHONPATH": os.pathsep.join(roots)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", OPS)
def test_a_call_like_one_before_is_the_launch_that_triton_would_make(found, op):
    """The kernel, the grid, each number, and each tensor by the operand that it is."""
    assert found[f"{op}: replays"] == 1
    assert found[f"{op}: the same launch"]
    assert found[f"{op}: the same kind of results"]


def test_what_the_kernel_depends_on_is_part_of_the_kind(found):
    assert found["another kernel where rows begin elsewhere"]
    assert found["and so when it is seen again"]
    assert found["fewer tokens have a grid of their own"]
    assert found["refused each time"] == 2


def test_a_call_that_does_more_than_to_launch_is_looked_at_each_time(found):
    assert found["a call that computes is not replayed"]
    assert found["nor is one that goes on to compute"]
    assert found["though its launch alone would be"]


def test_no_tensor_of_a_call_is_kept(found):
    assert found["it was kept as a kind"] == 1
    assert found["tensors of a call that are kept"] == 0


def test_kinds_are_forgotten_before_they_are_too_many(found):
    assert 0 < found["kinds that are kept of many"] <= 3


def test_who_looks_on_sees_the_call(found):
    """Modes as those of a rehearsal, torch's profiler, and the hooks of Triton's."""
    assert found["a mode sees the op"] == ["sora::norm_modulate"]
    assert found["a profiler sees the op"]
    assert found["a hook of Triton's stops replays"]
