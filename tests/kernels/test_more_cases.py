"""The random cases of the other files, five times as many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WITH_RANDOM_CASES = sorted(
    path.name for path in HERE.glob("test_*.py") if "\n@given(" in path.read_text(encoding="utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("file", WITH_RANDOM_CASES)
def test_more_random_cases(file: str) -> None:
    """In a process of its own: how many are tried is settled when a file is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE / file],
        cwd=HERE.parents[1],
        env={**os.environ, "SORA_HYPOTHESIS": "slow"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
