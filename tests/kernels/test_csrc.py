"""The native library and its sources: a stale library is told from a fresh one and left out."""

from __future__ import annotations

import logging
import shutil
import sys

import pytest
import torch

from sora_kernels import csrc
from sora_kernels.dispatch import Case
from sora_kernels.sources import digest

CASE = Case("cpu", None, torch.float32, 64)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A package and its sources, for the loader to find; and what it found here afterwards."""
    package, sources = tmp_path / "package", tmp_path / "csrc"
    package.mkdir()
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu" / "norm.cpp").write_text("int one;\n")
    monkeypatch.setattr(csrc, "PACKAGE", package)
    monkeypatch.setattr(csrc, "SOURCES", sources)
    csrc.problem.cache_clear()
    yield package, sources
    csrc.problem.cache_clear()


def build(package, built_from):
    (package / "_native.so").write_bytes(b"\x7fELF..sora_kernels csrc " + built_from + b"\0..")


def test_the_digest_follows_names_and_contents_of_sources(tmp_path):
    (tmp_path / "cpu").mkdir()
    source = tmp_path / "cpu" / "norm.cpp"
    source.write_bytes(b"int one;\n")
    first = digest(tmp_path)
    (tmp_path / "notes.txt").write_text("no source")
    assert digest(tmp_path) == first
    source.write_bytes(b"int one;\r\n")
    assert digest(tmp_path) == first
    source.write_bytes(b"int two;\n")
    assert digest(tmp_path) != first
    source.write_bytes(b"int one;\n")
    source.rename(source.with_suffix(".cu"))
    assert digest(tmp_path) != first


def test_a_stale_library_is_absent_and_says_so_once(folders, caplog):
    package, sources = folders
    build(package, digest(sources).encode())
    assert not csrc.is_stale(package / "_native.so", sources)
    (sources / "cpu" / "norm.cpp").write_text("int two;\n")
    with caplog.at_level(logging.WARNING, logger="sora_kernels"):
        why = csrc.unsupported(CASE)
        assert csrc.problem() == why
    assert why == (
        "_native.so was built from other sources than csrc has now; "
        "run `python setup.py build_ext --inplace`"
    )
    assert [record.message for record in caplog.records] == [
        f"sora_kernels: the native library is left out: {why}"
    ]


@pytest.mark.parametrize("mark", [b"unknown", b"0123456789abcdef"])
def test_a_library_of_other_sources_is_stale(folders, mark):
    package, sources = folders
    build(package, mark)
    assert csrc.is_stale(package / "_native.so", sources)


def test_a_library_from_before_the_digest_is_stale(folders):
    package, sources = folders
    (package / "_native.so").write_bytes(b"\x7fELF")
    assert csrc.is_stale(package / "_native.so", sources)


def test_an_installed_package_has_no_sources_to_differ_from(folders):
    package, sources = folders
    build(package, b"0123456789abcdef")
    shutil.rmtree(sources)
    assert not csrc.is_stale(package / "_native.so", sources)


def test_the_doctor_shows_a_stale_library(folders):
    from sora_engine.cli import doctor

    build(folders[0], b"0123456789abcdef")
    found = dict(doctor.report())["csrc"]
    assert found.startswith("not in use: _native.so was built from other sources")
    assert "setup.py build_ext" in found


@pytest.mark.usefixtures("native_library")
def test_the_library_here_is_of_the_sources_here():
    library = sorted(csrc.PACKAGE.glob("_native*.so"))[-1]
    assert csrc.SOURCES.is_dir()
    assert not csrc.is_stale(library, csrc.SOURCES)
    assert csrc.problem() is None


@pytest.mark.usefixtures("native_library")
@pytest.mark.skipif(sys.platform != "linux", reason="built without OpenMP elsewhere")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_kernels_run_on_the_threads_that_pytorch_has(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert csrc.num_threads() == threads
    finally:
        torch.set_num_threads(before)
