"""Builds the native library where it is missing or old; sets how many random cases are tried."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[2]


hypothesis.settings.register_profile(
    "quick", max_examples=10, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile(
    "slow", max_examples=50, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("thorough", max_examples=400, deadline=None)
hypothesis.settings.load_profile(os.environ.get("SORA_HYPOTHESIS", "quick"))


@pytest.fixture(scope="session")
def native_library() -> None:
    """The library from csrc, built first where it is missing or stale (20 s); skips where there is
    no compiler."""
    from sora_kernels import csrc

    with (ROOT / "setup.py").open() as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)  # another worker may be building it
        csrc.problem.cache_clear()
        if csrc.problem() is not None:
            if shutil.which("c++") is None and shutil.which("g++") is None:
                pytest.skip("no C++ compiler to build the native library")
            subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                cwd=ROOT,
                check=True,
                env={**os.environ, "SORA_REQUIRE_NATIVE": "1"},
                capture_output=True,
            )
            csrc.problem.cache_clear()
    assert csrc.problem() is None


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """Kernels divide their work among threads, of which a worker of `-n 2` may have but one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def poisoned_outputs() -> Iterator[None]:
    """New tensors are full of NaN, in Python and in C++: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.empty(2, 2, dtype=torch.bfloat16).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton's interpreter, its faults with bf16 mended."""
    pytest.importorskip("triton")
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("triton was imported without TRITON_INTERPRET=1")
    from interpreter import mend

    mend()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Minutes of compiling are for a run that asks for them: `-m slow`."""
    if "slow" in config.option.markexpr:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
