"""A checkpoint's autoencoder, loaded: what codes its videos, and what makes their previews."""

from __future__ import annotations

import torch

from sora_engine.denoise.preview import DecodedPreview, LatentPreview, Preview
from sora_engine.io.loading import load_into
from sora_engine.io.weights.selected import SelectedWeights
from sora_engine.io.weights.source import WeightSource
from sora_engine.models.family import Checkpoint
from sora_engine.models.folder import Component
from sora_engine.models.tiny_vae import load_tiny, tiny_near
from sora_engine.vae.backend import open_coder
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.decoder import VideoDecoder
from sora_engine.vae.fit import FittedCoder
from sora_engine.vae.registry import build_vae, read_vae_config, vae_kind


def load_vae(component: Component, device: torch.device, dtype: torch.dtype) -> CausalVAE:
    """A VAE from its folder or file, of the kind that its class names."""
    config = read_vae_config(
        {"_class_name": component.class_name, **component.config}, path=component.config_path
    )
    with torch.device("meta"):
        vae = build_vae(config)
    with component.open_weights() as opened:
        weights: WeightSource = opened
        kind = vae_kind(component.class_name)
        if kind.files is not None and component.folder.is_file():
            names = kind.files.names(weights, config)
            weights = SelectedWeights(weights, {names[stored]: stored for stored in names})
        load_into(vae, weights, device=device, dtype=dtype, rename=kind.renames, loose_ones=True)
    return vae.eval().requires_grad_(False).prepare()


def preview_of(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Preview | None:
    """By a tiny decoder that was given, or the checkpoint's own map of colours."""
    if checkpoint.tiny_vae is None:
        return LatentPreview.read(checkpoint.path, checkpoint.grid.channels)
    return DecodedPreview(load_tiny(checkpoint, checkpoint.tiny_vae, device, dtype), dtype)


def open_decoder(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    cuda_graphs: str,
    *,
    by_time: bool = True,
) -> VideoDecoder:
    """The checkpoint's VAE by a backend; the arguments are those of `vae.backend.open_coder`.
    Raises CheckpointError or BackendError."""
    if backend in ("onnx", "tensorrt"):  # the weights are but exported, or looked up
        vae = load_vae(checkpoint.vae, torch.device("cpu"), torch.float32)
    else:
        vae = load_vae(checkpoint.vae, device, dtype)
    tiny = None
    if backend == "tiny":
        tiny = load_tiny(checkpoint, tiny_near(checkpoint), device, dtype)
    coder = open_coder(
        backend,
        vae,
        device=device,
        dtype=dtype,
        cuda_graphs=cuda_graphs,
        by_time=by_time,
        tiny=tiny,
    )
    return VideoDecoder(FittedCoder(coder, dtype=dtype, device=device), dtype, device)
