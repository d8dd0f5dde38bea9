"""What the service's tests share: one process that forks servers, and a server for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.servers import Nursery, Server


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without faults."""
    data: Path = tmp_path_factory.mktemp("serve") / "data"
    with Server(nursery, data) as made:
        yield made
