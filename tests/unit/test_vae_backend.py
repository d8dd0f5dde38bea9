"""`vae_backend`: who is chosen, and what is said where it cannot be."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sora_engine.errors import BackendError, RequestError
from sora_engine.vae import backend as backends
from sora_engine.vae.backend import export_vae, latent_sizes, open_coder
from sora_engine.vae.graphs import GraphSet
from tests.parity.vae_models import make_pair

SHORT = {
    "base_dim": 4,
    "dim_mult": [1, 2],
    "temperal_downsample": [True],
    "num_res_blocks": 1,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 2,
}


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_torch_is_the_autoencoder_itself(name):
    _, vae = make_pair(SHORT)
    assert open_coder(name, vae, device="cpu") is vae


def test_unknown_names_and_sizes(tmp_path):
    _, vae = make_pair(SHORT)
    with pytest.raises(BackendError, match="auto, torch, onnx, tensorrt, tiny, not 'openvino'"):
        open_coder("openvino", vae, device="cpu", cache=tmp_path)
    with pytest.raises(BackendError, match="'torch'"):
        export_vae(vae, "torch", tmp_path)
    assert latent_sizes(vae, [(480, 832)]) == [(240, 416)]
    with pytest.raises(RequestError, match=r"481x832 .* 480x832"):
        latent_sizes(vae, [(481, 832)])


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is there")
def test_tensorrt_says_what_to_install_before_any_work(tmp_path):
    _, vae = make_pair(SHORT)
    for call in (
        lambda: open_coder("tensorrt", vae, device="cuda", cache=tmp_path),
        lambda: export_vae(vae, "tensorrt", tmp_path, sizes=[(480, 832)]),
    ):
        with pytest.raises(BackendError, match=r'pip install "sora_engine\[tensorrt\]"'):
            call()
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_takes_engines_of_the_engines_dtype(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("sora_engine.vae.tensorrt_run.require_tensorrt", lambda: None)
    monkeypatch.setattr(
        "sora_engine.vae.tensorrt_run.TensorRTVAE",
        lambda folder, engines, *, device: opened.append((folder, engines)),
    )
    monkeypatch.setattr(backends, "cache_folder", lambda *_: tmp_path)
    _, vae = make_pair(SHORT)
    with pytest.raises(BackendError, match="--backend tensorrt --dtype bfloat16 --sizes"):
        open_coder("tensorrt", vae, device="cuda", dtype=torch.bfloat16)
    folder = tmp_path / backends._key(vae, torch.bfloat16)
    folder.mkdir()
    GraphSet(folder, vae.config, torch.bfloat16, {}).save()
    open_coder("tensorrt", vae, device="cuda", dtype=torch.bfloat16)
    assert opened == [(folder, folder / "engines")]
    with pytest.raises(BackendError, match="--dtype float16"):
        open_coder("tensorrt", vae, device="cuda", dtype=torch.float16)
    with pytest.raises(BackendError, match="of vae_backend 'torch'"):
        open_coder("tensorrt", vae, device="cuda", cuda_graphs="on")


def test_onnx_is_exported_once_for_each_set_of_weights(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    calls = []

    def export(vae, folder, *, dtype):
        # The export itself has its own tests; here only when and where it happens counts.
        calls.append(dtype)
        folder.mkdir(parents=True)
        GraphSet(folder, vae.config, dtype, {}).save()

    monkeypatch.setattr("sora_engine.vae.onnx_export.export_onnx", export)
    monkeypatch.setattr(backends, "cache_folder", lambda *_: tmp_path)
    _, vae = make_pair(SHORT)
    first = open_coder("onnx", vae, device="cpu")
    again = open_coder("onnx", vae, device="cpu")
    assert len(calls) == 1
    assert first.graphs.folder == again.graphs.folder == export_vae(vae, "onnx")
    assert first.config == vae.config
    _, other = make_pair(SHORT, seed=1)
    assert open_coder("onnx", other, device="cpu").graphs.folder != first.graphs.folder
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 2  # nothing half done is left
    # Another dtype has a place of its own, so that neither is taken for the other.
    half = export_vae(vae, "onnx", dtype=torch.float16)
    assert export_vae(vae, "onnx", dtype=torch.float16) == half != first.graphs.folder
    assert calls == [torch.float32, torch.float32, torch.float16]
    assert open_coder("onnx", vae, device="cpu").graphs.dtype == torch.float32
    assert torch.equal(first.denormalise(torch.ones(1, 16)), vae.denormalise(torch.ones(1, 16)))
