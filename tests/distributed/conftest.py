"""Ranks that all tests of this folder share."""

from __future__ import annotations

import pytest

from tests.distributed.fleet import Fleet


@pytest.fixture(scope="package")
def fleet():
    ranks = Fleet(8)
    yield ranks
    ranks.close()
