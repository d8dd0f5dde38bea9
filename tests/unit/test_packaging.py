"""What goes into archives, and what an installation without sources says of itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sora_kernels import csrc

ROOT = Path(__file__).parents[2]


def test_the_source_archive_has_what_its_readme_names(tmp_path):
    """`pip install -c constraints.txt .` and `make` are said to work in it."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    copy = tmp_path / "copy"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "out")]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=600)
    (archive,) = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for name in ("constraints.txt", "Makefile", "CHANGELOG.md", "README.md", "pyproject.toml"):
        assert name in names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources <= names


@pytest.fixture
def unbuilt(tmp_path, monkeypatch):
    monkeypatch.setattr(csrc, "PACKAGE", tmp_path)
    csrc.problem.cache_clear()
    yield tmp_path
    csrc.problem.cache_clear()


def test_a_wheel_is_not_told_to_run_what_it_does_not_have(unbuilt, monkeypatch):
    monkeypatch.setattr(csrc, "SOURCES", unbuilt / "no" / "csrc")
    assert "setup.py" not in csrc.problem()
    assert "`pip install --no-build-isolation .` in the project's sources" in csrc.problem()
    csrc.problem.cache_clear()
    (unbuilt / "_native.so").write_bytes(b"no library")
    assert "does not load" in csrc.problem()
    assert "setup.py" not in csrc.problem()


def test_a_source_tree_is_told_its_own_command(unbuilt, monkeypatch):
    (unbuilt / "csrc").mkdir()
    monkeypatch.setattr(csrc, "SOURCES", unbuilt / "csrc")
    assert csrc.problem().endswith("run `python setup.py build_ext --inplace`")
