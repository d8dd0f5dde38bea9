"""Caches are optional: without a home, where nothing can be written, on systems unlike Linux."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import sora_engine as sora
from sora_engine.errors import BackendError
from sora_engine.io.cache import cache_folder
from sora_engine.models.autoencoder import load_vae
from sora_engine.models.loading import load_video_model
from sora_engine.models.registry import open_checkpoint
from sora_engine.runtime.saturation import saturation_point
from sora_engine.vae import backend as backends

SMALL = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 1}
TWO = [sora.VideoRequest("a red circle", seed=seed, **SMALL) for seed in (1, 2)]


@pytest.fixture
def no_home(monkeypatch):
    """A container's user whose number has no entry in passwd."""
    pwd = pytest.importorskip("pwd")

    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    for name in ("HOME", "XDG_CACHE_HOME", "USERPROFILE", "LOGNAME", "USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("vae") == tmp_path / "sora_engine" / "vae"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative/folder", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder("a", "b") == tmp_path / "home/.cache/sora_engine/a/b"
    monkeypatch.setenv("HOME", "also/relative")
    assert cache_folder() is None


def test_without_a_home_there_is_none(no_home):
    assert cache_folder() is None


@pytest.fixture(params=["no home", "/proc", "a file", "relative", "read-only"])
def hostile(request, monkeypatch, tmp_path):
    """A place that is no cache, in each of the ways that people meet."""
    if request.param == "no home":
        return request.getfixturevalue("no_home")
    (tmp_path / "file").write_text("")
    places = {"/proc": "/proc/nothing", "a file": str(tmp_path / "file" / "cache")}
    if request.param == "relative":
        monkeypatch.setenv("HOME", "/proc/nothing")
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
        monkeypatch.chdir(tmp_path)
    elif request.param == "read-only":  # also for root
        monkeypatch.setenv("XDG_CACHE_HOME", "/sys")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", places[request.param])
    return None


def test_jobs_in_company_need_no_cache(hostile):
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        assert len(engine.generate(TWO)) == 2
    assert not Path("cache").exists()


def sprites_vae():
    checkpoint, _ = open_checkpoint("sprites")
    return load_vae(checkpoint.vae, torch.device("cpu"), torch.float32)


def test_onnx_exports_into_a_temporary_folder(hostile, caplog, monkeypatch):
    """Where the export goes; what is in it, others test."""
    pytest.importorskip("onnx")

    def export(_vae, folder, *, dtype):
        folder.mkdir(parents=True)
        (folder / backends.SPEC_FILE).write_text("{}")

    monkeypatch.setattr("sora_engine.vae.onnx_export.export_onnx", export)
    folder = backends._graphs_of(sprites_vae(), cache_folder("vae"))
    assert folder.parent.parent == Path(tempfile.gettempdir())
    assert (folder / backends.SPEC_FILE).exists()
    assert any("exported anew by every process" in line for line in caplog.messages)


def test_nowhere_at_all_is_a_typed_error(no_home, monkeypatch):
    def full(*_: object, **__: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    vae = sprites_vae()
    monkeypatch.setattr(backends.tempfile, "mkdtemp", full)
    with pytest.raises(BackendError, match="an absolute XDG_CACHE_HOME or TMPDIR names a place"):
        backends.open_coder("onnx", vae, device="cpu")
    with pytest.raises(BackendError, match="--output names a folder"):
        backends.export_vae(vae, "onnx")


def test_export_where_nothing_can_be_written_is_a_typed_error(monkeypatch):
    vae = sprites_vae()
    with pytest.raises(BackendError, match=r"/proc/x cannot be written .*--output"):
        backends.export_vae(vae, "onnx", "/proc/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    with pytest.raises(BackendError, match=r"/proc/nothing.* cannot be written"):
        backends.export_vae(vae, "onnx")


def test_onnxruntime_keeps_nothing_of_its_own_in_the_cache(tmp_path):
    """Its wheels put an identifier there, and a store of events for their maker."""
    pytest.importorskip("onnxruntime")
    code = "from sora_engine.vae.onnx_run import import_runtime; import_runtime().SessionOptions()"
    folders = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}
    environment = {**os.environ, **folders, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=600)
    assert list(tmp_path.iterdir()) == []


def test_a_system_unlike_linux(monkeypatch, tmp_path):
    """Windows has no os.uname and no sysconf, macOS no sched_getaffinity; neither has /proc."""
    for name in ("uname", "sched_getaffinity", "sysconf", "getuid", "pathconf"):
        monkeypatch.delattr(os, name, raising=False)
    model = load_video_model("sprites", device="cpu")
    assert saturation_point(model, 4096, cache=tmp_path / "saturation.json") >= 64
    with sora.Engine(model) as engine:
        assert len(engine.generate(TWO)) == 2
        engine.generate(TWO[0]).save(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("home", ["/proc/nothing", "~/"], ids=["read-only", "no home"])
def test_compilers_get_a_temporary_folder_where_theirs_cannot_be(home, monkeypatch, tmp_path):
    """`~/` is what Triton makes of a home that is not there: a folder of that name, here."""
    triton = pytest.importorskip("triton")
    from sora_kernels.triton_support import settle_caches

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.path.join(home, "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", os.path.join(home, "triton"))
    settle_caches()
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(os.environ[name])
        assert folder.is_relative_to(tempfile.gettempdir())
        (folder / "kernel").write_text("compiled")
    assert triton.knobs.cache.dir == os.environ["TRITON_CACHE_DIR"]
    assert list(tmp_path.iterdir()) == []


def test_compilers_keep_places_that_can_be_written(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from sora_kernels.triton_support import settle_caches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    settle_caches()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
