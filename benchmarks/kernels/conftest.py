"""The machine's copy and GEMM rates, measured once a run."""

from __future__ import annotations

import pytest
from shapes import copy_rate, gemm_rate


@pytest.fixture(scope="session")
def machine() -> dict[str, float]:
    return {"copy": copy_rate(), "gemm": gemm_rate()}
