"""`vae_backend`: who is chosen, and what is said where it cannot be."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from sora_engine.errors import BackendError, RequestError
from sora_engine.vae import backend as backends
from sora_engine.vae.backend import export_vae, latent_sizes, open_coder
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
    with pytest.raises(BackendError, match="auto, torch, onnx, tensorrt, not 'openvino'"):
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


def test_onnx_is_exported_once_for_each_set_of_weights(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    calls = []

    def export(vae, folder, **_):
        # The export itself has its own tests; here only when and where it happens counts.
        calls.append(folder)
        folder.mkdir(parents=True)
        (folder / "graphs.json").write_text(
            json.dumps(
                {"version": 1, "dtype": "float32", "config": vae.config.to_dict(), "graphs": {}}
            )
        )

    monkeypatch.setattr("sora_engine.vae.onnx_export.export_onnx", export)
    monkeypatch.setattr(backends, "default_cache", lambda: tmp_path)
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
    assert torch.equal(first.denormalise(torch.ones(1, 16)), vae.denormalise(torch.ones(1, 16)))
