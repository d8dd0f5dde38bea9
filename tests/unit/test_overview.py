"""The table of families in the docs is what the registry says, and what it says is so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sora_engine.config import ParallelConfig
from sora_engine.models.overview import HEAD, family_table
from sora_engine.models.registry import families

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_page_holds_the_table() -> None:
    assert "\n".join(family_table()) in PAGE


def test_the_command_prints_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sora_engine", "families"], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == family_table(), done.stderr


def test_a_family_has_a_row() -> None:
    lines = family_table(families()[:1])
    assert len(lines) == 3
    assert lines[0].count("|") == lines[2].count("|") == len(HEAD) + 1
    assert lines[2].startswith(f"| {families()[0].name} |")


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_what_a_row_names_is_there(family) -> None:
    can = family.capabilities
    assert set(can.ranks) <= set(ParallelConfig.__dataclass_fields__)
    assert set(can.windows) <= {"static", "moving", "chained", "sparse"}
    assert can.known_modes
    text = (ROOT / "docs" / can.page).read_text(encoding="utf-8")
    assert family.name in text.lower()
    assert PAGE.count(f"]({can.page})") >= 1
