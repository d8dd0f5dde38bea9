"""Loading: from a checkpoint's files to a model whose weights are where they serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import sora_kernels
from sora_engine.denoise.canvas import KnownMode
from sora_engine.denoise.preview import LatentPreview
from sora_engine.errors import BackendError, CheckpointError
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import sampled_hash
from sora_engine.models.device import free_memory, resolve_device, resolve_dtype
from sora_engine.models.folder import Component
from sora_engine.models.generation_config import generation_defaults, read_generation_config
from sora_engine.models.offload import check_level, level_that_fits, offload_blocks
from sora_engine.models.video_model import Expert, VideoDecoder, VideoModel
from sora_engine.models.wan.blocks import OWN_PARTS
from sora_engine.models.wan.checkpoint import TransformerSource, WanCheckpoint, resolve_model
from sora_engine.models.wan.model import TEXT_TOKENS, WanTransformer
from sora_engine.request.request import GenerationDefaults, LatentGrid
from sora_engine.samplers import read_config
from sora_engine.text import ImageEncoder, TextEncoder
from sora_engine.vae.backend import open_coder
from sora_engine.vae.fit import FittedCoder
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import VAEConfig

if TYPE_CHECKING:
    from sora_engine.distributed.weights import WeightShards

BUNDLED = {"sprites": Path(__file__).parents[1] / "checkpoints" / "sprites"}
"""Checkpoints that come with the package, by name."""


def load_video_model(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae_backend: str = "auto",
    vae_cuda_graphs: str = "auto",
    attention_backend: str = "auto",
    components: str | PathLike[str] | None = None,
    offload: str = "none",
    needed: Callable[[VideoModel], int] | None = None,
    shards: WeightShards | None = None,
) -> VideoModel:
    """Load a checkpoint; the arguments are those of `Engine.from_pretrained`.

    needed: what a usual request takes beside the weights, of a model whose transformers are on the
        meta device: `"auto"` offloading keeps that free.
    shards: where this rank holds no more than its share of the transformer's weights.
    """
    check_level(offload)
    target = resolve_device(device)
    weights_dtype = resolve_dtype(dtype, target)
    check_attention_backend(attention_backend, target)
    checkpoint, folder, name = find_checkpoint(path, components)
    settings = read_generation_config(folder)
    text_tokens = int(settings.get("text_tokens", TEXT_TOKENS))
    decoder = _open_decoder(checkpoint, target, weights_dtype, vae_backend, vae_cuda_graphs)
    vae = decoder.vae
    assert isinstance(vae, FittedCoder)
    sources = [checkpoint.transformer]
    if checkpoint.transformer_2 is not None:
        sources.append(checkpoint.transformer_2)
    sampler_config = read_config(checkpoint.scheduler_config, path=checkpoint.path)
    boundary = (checkpoint.boundary_ratio or 0.0) * sampler_config.num_train_timesteps
    config = checkpoint.transformer.config
    grid = LatentGrid(
        channels=config.out_channels,
        vae_spatial=vae.scale_factor_spatial,
        patch=config.patch_size,
        time=vae.scale_factor_temporal,
    )
    known_mode = _known_mode(checkpoint, grid)
    load_encoders = partial(_load_encoders, checkpoint, target, weights_dtype, text_tokens)
    if offload == "auto" and target.type == "cpu":
        offload = "none"
    text_encoder, image_encoder = load_encoders(offload)
    model = VideoModel(
        name=name,
        device=target,
        dtype=weights_dtype,
        experts=[],
        vae=vae,
        vae_dtype=decoder.vae_dtype,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        takes_last_image=config.pos_embed_seq_len is not None,
        sampler_config=sampler_config,
        known_mode=known_mode,
        grid=grid,
        defaults=generation_defaults(settings, checkpoint, grid, folder),
        weights_hash=sampled_hash(
            [
                *(source.path for source in sources),
                checkpoint.vae.weights_path,
                checkpoint.text_encoder.weights_path,
            ]
        ),
        preview=LatentPreview.read(folder, grid.channels),
    )

    def experts(load: Callable[[TransformerSource], Callable[[], WanTransformer]]) -> list[Expert]:
        return [
            Expert(
                load=load(source),
                from_timestep=boundary if i == 0 else 0.0,
                size_bytes=source.num_parameters
                * weights_dtype.itemsize
                // (1 if shards is None else shards.num_ranks),
            )
            for i, source in enumerate(sources)
        ]

    if offload == "auto":
        hollow = experts(
            lambda source: partial(
                _hollow_transformer, source, weights_dtype, attention_backend, text_tokens
            )
        )
        offload = _level_for(replace(model, experts=hollow), needed)
        model.text_encoder, model.image_encoder = load_encoders(offload)
    model.offload = offload
    model.experts = experts(
        lambda source: partial(
            _load_transformer,
            source, target, weights_dtype, attention_backend, text_tokens, shards,
            visiting=offload == "blocks",
        )
    )  # fmt: skip
    model.transformer(0)
    return model


def _level_for(model: VideoModel, needed: Callable[[VideoModel], int] | None) -> str:
    """The level of offloading with which a usual request fits; of `model` nothing has weights yet
    but the VAE, which is on its device."""
    free = free_memory(model.device)
    if free is None:
        return "none"
    encoders = (model.text_encoder, model.image_encoder)
    return level_that_fits(
        int(0.9 * free),
        text=sum(
            weight.nbytes
            for encoder in encoders
            if encoder is not None
            for weight in encoder.model.parameters()
        ),
        transformers=sum(expert.size_bytes for expert in model.experts),
        rest=0 if needed is None else needed(model),
    )


def planning_facts(
    checkpoint: WanCheckpoint, folder: Path
) -> tuple[LatentGrid, GenerationDefaults, int]:
    """A checkpoint's grid, defaults and length of texts, from its configurations alone."""
    settings = read_generation_config(folder)
    vae = VAEConfig.from_dict(checkpoint.vae.config, path=checkpoint.vae.config_path)
    config = checkpoint.transformer.config
    grid = LatentGrid(
        channels=config.out_channels,
        vae_spatial=vae.factor_spatial,
        patch=config.patch_size,
        time=vae.factor_temporal,
    )
    defaults = generation_defaults(settings, checkpoint, grid, folder)
    return grid, defaults, int(settings.get("text_tokens", TEXT_TOKENS))


def load_video_decoder(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae_backend: str = "auto",
    vae_cuda_graphs: str = "auto",
    components: str | PathLike[str] | None = None,
) -> VideoDecoder:
    """Load no more of a checkpoint than its VAE; raises as `load_video_model`."""
    target = resolve_device(device)
    checkpoint, _, _ = find_checkpoint(path, components)
    return _open_decoder(
        checkpoint, target, resolve_dtype(dtype, target), vae_backend, vae_cuda_graphs
    )


def find_checkpoint(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    components: str | PathLike[str] | None = None,
) -> tuple[WanCheckpoint, Path, str]:
    """A checkpoint by its path or name, its folder, and the name that results carry."""
    paths = [path] if isinstance(path, (str, PathLike)) else list(path)
    bundled = BUNDLED.get(path) if isinstance(path, str) else None
    if bundled is not None:
        if not bundled.exists():
            raise CheckpointError(f"the bundled checkpoint {path!r} is missing", path=bundled)
        paths = [bundled]
    if not paths:
        raise CheckpointError("a model is one path, or those of two experts; got none")
    folder = Path(paths[0])
    checkpoint = resolve_model(
        [Path(p) for p in paths], components=None if components is None else Path(components)
    )
    return checkpoint, folder, str(path) if bundled is not None else folder.name


def _open_decoder(
    checkpoint: WanCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    cuda_graphs: str,
) -> VideoDecoder:
    # A VAE in half precision is slow on a CPU; elsewhere it shares the transformer's dtype. The
    # graphs of ONNX Runtime are in float32.
    if device.type == "cpu" or backend == "onnx":
        dtype = torch.float32
    if backend in ("onnx", "tensorrt"):  # the weights are but exported, or looked up
        vae = load_vae(checkpoint.vae, torch.device("cpu"), torch.float32)
    else:
        vae = load_vae(checkpoint.vae, device, dtype)
    coder = open_coder(backend, vae, device=device, dtype=dtype, cuda_graphs=cuda_graphs)
    return VideoDecoder(FittedCoder(coder, dtype=dtype, device=device), dtype, device)


def check_attention_backend(name: str, device: torch.device) -> None:
    """Raises BackendError unless attention can run there on this backend."""
    found = sora_kernels.backends(device)["packed_attention"]
    if name == "auto":
        return
    if name not in found:
        raise BackendError(f"attention_backend must be auto, {', '.join(found)}, got {name!r}")
    reason = found[name]
    if reason is not None:
        raise BackendError(f"attention_backend {name!r} cannot serve on {device}: {reason}")


def load_vae(component: Component, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """A VAE from its folder."""
    config = VAEConfig.from_dict(component.config, path=component.config_path)
    with torch.device("meta"):
        vae = WanVAE(config)
    with component.open_weights() as weights:
        load_into(vae, weights, device=device, dtype=dtype)
    return vae.eval().requires_grad_(False).prepare()


def _hollow_transformer(
    source: TransformerSource, dtype: torch.dtype, backend: str, text_tokens: int
) -> WanTransformer:
    """The transformer on the meta device: its shapes, without its weights."""
    with torch.device("meta"):
        transformer = WanTransformer(
            source.config, text_tokens=text_tokens, attention_backend=backend
        )
    return transformer.to(dtype).eval().requires_grad_(False)


def _load_transformer(
    source: TransformerSource,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    text_tokens: int,
    shards: WeightShards | None,
    *,
    visiting: bool = False,
) -> WanTransformer:
    """visiting: the weights of the blocks are read into host memory and wait there."""
    transformer = _hollow_transformer(source, dtype, backend, text_tokens)
    if shards is not None:
        source.load(
            transformer, device=device, dtype=dtype, shard=partial(shards.cut, device, OWN_PARTS)
        )
        return transformer
    source.load(transformer, device="cpu" if visiting else device, dtype=dtype)
    if not visiting:
        return transformer.prepare()
    # In the order in which they run: VACE's come first.
    blocks: list[nn.Module] = [*transformer.vace_blocks, *transformer.blocks]
    offload_blocks(transformer, blocks, device, parts=OWN_PARTS, methods=("forward", "keys_values"))
    return transformer


def _load_encoders(
    checkpoint: WanCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
    text_tokens: int,
    offload: str,
) -> tuple[TextEncoder, ImageEncoder | None]:
    """The text encoder and, where there is one, the image encoder.

    offload: whether they visit the device, from host memory; `"auto"`: not known yet, so they come
    without their weights.
    """
    place = {"auto": torch.device("meta"), "none": device}.get(offload, torch.device("cpu"))
    text = TextEncoder.from_folders(
        checkpoint.text_encoder.folder,
        checkpoint.tokenizer.folder,
        device=place,
        dtype=dtype,
        max_tokens=text_tokens,
    )
    image = None
    if checkpoint.image_encoder is not None and checkpoint.image_processor is not None:
        image = ImageEncoder.from_folders(
            checkpoint.image_encoder.folder,
            checkpoint.image_processor.folder,
            device=place,
            dtype=dtype,
        )
    if offload in ("text", "blocks"):
        text.offload(device)
        if image is not None:
            image.offload(device)
    return text, image


def _known_mode(checkpoint: WanCheckpoint, grid: LatentGrid) -> KnownMode:
    """What the checkpoint was trained to do with known content, from its input channels."""
    config = checkpoint.transformer.config
    if checkpoint.expand_timesteps:
        return KnownMode.NOISE_LEVEL
    if config.vace_layers is not None:
        control = 2 * config.out_channels + grid.vae_spatial**2
        if config.in_channels != config.out_channels or config.vace_in_channels != control:
            raise CheckpointError(
                f"the transformer takes {config.in_channels} channels, makes "
                f"{config.out_channels} and is controlled by {config.vace_in_channels}; "
                f"{config.out_channels}, as many and {control} would work with this VAE",
                path=checkpoint.path,
            )
        return KnownMode.VACE
    if config.in_channels == config.out_channels:
        return KnownMode.REPLACEMENT
    with_mask = 2 * config.out_channels + grid.time
    if config.in_channels != with_mask:
        raise CheckpointError(
            f"the transformer takes {config.in_channels} channels and makes "
            f"{config.out_channels}; {config.out_channels} (text to video) or {with_mask} "
            "(with mask and known latents) would work",
            path=checkpoint.path,
        )
    return KnownMode.CHANNELS
