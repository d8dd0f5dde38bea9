"""The house's habits that a reader cannot see in one file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {".py", ".cpp", ".cu", ".h", ".cuh"}
MOST_LINES = 450
# Still to be split: no file joins them.
LONG = {"sora_engine/runtime/memory.py", "tests/unit/test_io_video.py"}


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("which files are tracked is known in a git checkout alone, with git installed")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip(f"git cannot list the files here: {listed.stderr.strip()}")
    return listed.stdout.rstrip("\0").split("\0")


def test_no_source_file_is_long() -> None:
    sources = [
        name for name in tracked_files() if Path(name).suffix in SOURCES and (ROOT / name).is_file()
    ]
    assert Path(__file__).relative_to(ROOT).as_posix() in sources
    lengths = {name: len((ROOT / name).read_bytes().splitlines()) for name in sources}
    long = {name: n for name, n in lengths.items() if n > MOST_LINES and name not in LONG}
    assert not long, f"over {MOST_LINES} lines, each to be split at a seam: {long}"
