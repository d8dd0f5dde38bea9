"""Loading: from a checkpoint's files to a model whose weights are where they serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from sora_engine.io.safetensors import sampled_hash
from sora_engine.io.weights.merging import Merge
from sora_engine.models.adapter_store import AdapterStore
from sora_engine.models.adapters import merges_of
from sora_engine.models.autoencoder import open_decoder, preview_of
from sora_engine.models.backends import check_attention_backend, exact_attention
from sora_engine.models.device import own_device, resolve_device
from sora_engine.models.family import Checkpoint, ExpertSource
from sora_engine.models.linear import make_invariant
from sora_engine.models.offload import (
    check_level,
    level_that_fits,
    offload_blocks,
    offload_encoder,
)
from sora_engine.models.precision import settle_precision
from sora_engine.models.quantised import Keeper, check_kind, held_bytes, split_dtype
from sora_engine.models.registry import (
    Components,
    ModelPath,
    family_named,
    on_ladder_of,
    open_checkpoint,
)
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.models.video_model import Expert, VideoModel
from sora_engine.request.ladders import ladder_of_adapters
from sora_engine.request.lora import Lora, LoraRecord
from sora_engine.samplers import SamplerConfig, read_config
from sora_engine.text import ImageEncoder, PromptEncoder, load_text_encoder
from sora_engine.vae.decoder import VideoDecoder
from sora_engine.vae.free_memory import free_bytes
from sora_engine.vae.recording import wanted

USABLE = 0.9
"""Of the free memory, what weights and a usual request may take together."""


class WeightSharder(Protocol):
    """Ranks that hold a transformer together, each its own rows."""

    @property
    def num_ranks(self) -> int: ...

    def cut(self, device: torch.device, transformer: nn.Module) -> Mapping[str, range]:
        """Shard a transformer that is on the meta device; its own shares are then on `device`.
        Returns the rows of each parameter that this rank has."""
        ...


@own_device()
def load_video_model(
    path: ModelPath,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae_backend: str = "auto",
    vae_dtype: str | torch.dtype = "auto",
    cuda_graphs: str = "auto",
    attention_backend: str = "auto",
    exact: bool = False,
    components: Components | None = None,
    offload: str = "none",
    loras: Sequence[Lora] = (),
    needed: Callable[[VideoModel], int] | None = None,
    sharder: WeightSharder | None = None,
    alone: bool = True,
) -> VideoModel:
    """Load a checkpoint; the arguments are those of `Engine.from_pretrained`.

    needed: what a usual request takes beside the weights, of a model whose transformers are on the
        meta device: `"auto"` offloading keeps that free.
    sharder: where this rank holds no more than its share of the transformer's weights.
    alone: whether passes are this process's own, and no others take part in them.
    """
    check_level(offload)
    target = resolve_device(device)
    kind, dtype = split_dtype(dtype)
    check_kind(kind, target)
    checkpoint, name = open_checkpoint(path, components)
    precision = settle_precision(
        dtype,
        vae_dtype,
        target,
        weights=[expert.path for expert in checkpoint.experts],
        vae_backend=vae_backend,
        exact=exact,
    )
    weights_dtype, coding_dtype = precision.dtype, precision.vae_dtype
    if exact:
        attention_backend = exact_attention(target, attention_backend)
    check_attention_backend(attention_backend, target)
    build = partial(
        hollow_transformer,
        dtype=weights_dtype,
        attention_backend=attention_backend,
        invariant=exact,
    )
    merges, records = _merges(loras, checkpoint, build)
    names = [record.name for record in records if record.strength]
    checkpoint = on_ladder_of(checkpoint, ladder_of_adapters(names), ", ".join(names))
    decoder = open_decoder(
        checkpoint, target, coding_dtype, vae_backend, cuda_graphs, by_time=not exact
    )
    if offload == "auto" and target.type == "cpu":
        offload = "none"

    def hollow(source: ExpertSource, merge: Merge | None) -> DiffusionTransformer:
        transformer = build(source)
        if kind:  # of which layers are dense, and in which formats the others are
            fill = _filling(source, transformer, kind, merge)
            fill(transformer, device="meta", dtype=weights_dtype)
        return transformer

    model = VideoModel(
        name=name,
        family=checkpoint.family,
        device=target,
        dtype=weights_dtype,
        chosen=precision.chosen,
        kind=kind,
        experts=_experts(checkpoint, weights_dtype, hollow, merges=merges),
        vae=decoder.vae,
        vae_dtype=decoder.dtype,
        prompt_encoder=load_prompt_encoder(checkpoint, target, weights_dtype, offload),
        image_encoder=load_image_encoder(checkpoint, target, weights_dtype, offload),
        takes_last_image=checkpoint.takes_last_image,
        learned_variance=checkpoint.learned_variance,
        labels=checkpoint.labels,
        takes_camera=checkpoint.takes_camera,
        sampler_config=_sampler_config(checkpoint),
        known_mode=checkpoint.known_mode,
        grid=checkpoint.grid,
        defaults=checkpoint.defaults,
        driving=checkpoint.driving,
        weights_hash=sampled_hash(checkpoint.weights_paths),
        preview=preview_of(checkpoint, target, coding_dtype),
        loras=records,
        adapters=AdapterStore(
            family_named(checkpoint.family),
            partial(build, checkpoint.experts[0]),
            len(checkpoint.experts),
            target,
            weights_dtype,
        ),
    )
    if offload == "auto":
        offload = _level_for(model, needed)
        model.prompt_encoder = load_prompt_encoder(checkpoint, target, weights_dtype, offload)
        model.image_encoder = load_image_encoder(checkpoint, target, weights_dtype, offload)
    model.offload = offload
    model.experts = _experts(
        checkpoint,
        weights_dtype,
        lambda source, merge: load_transformer(
            source,
            build(source),
            target,
            sharder=sharder,
            visiting=offload == "blocks",
            cuda_graphs=cuda_graphs if alone else "off",
            merge=merge,
            kind=kind,
        ),
        merges=merges,
        size=None if not kind else lambda source, merge: held_bytes(hollow(source, merge)),
        shares=1 if sharder is None else sharder.num_ranks,
    )
    for source in checkpoint.experts[1:]:  # what comes when it is needed is checked now
        source.fill(build(source), device="meta", dtype=weights_dtype)
    model.transformer(0)
    return model


@own_device()
def load_video_decoder(
    path: ModelPath,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae_backend: str = "auto",
    vae_dtype: str | torch.dtype = "auto",
    cuda_graphs: str = "auto",
    components: Components | None = None,
) -> VideoDecoder:
    """Load no more of a checkpoint than its VAE; raises as `load_video_model`."""
    target = resolve_device(device)
    _, dtype = split_dtype(dtype)
    checkpoint, _ = open_checkpoint(path, components)
    precision = settle_precision(
        dtype,
        vae_dtype,
        target,
        weights=[expert.path for expert in checkpoint.experts],
        vae_backend=vae_backend,
    )
    return open_decoder(checkpoint, target, precision.vae_dtype, vae_backend, cuda_graphs)


# The transformers.


def load_transformer(
    source: ExpertSource,
    transformer: DiffusionTransformer,
    device: torch.device,
    *,
    sharder: WeightSharder | None = None,
    visiting: bool = False,
    cuda_graphs: str = "off",
    merge: Merge | None = None,
    kind: str = "",
) -> DiffusionTransformer:
    """A transformer, which is on the meta device, filled from its files.

    kind: of `quantised.KINDS`, where weights of its blocks are quantised.

    visiting: the weights of the blocks are read into host memory and wait there. merge: what
        adapters change of them.
    cuda_graphs: whether passes are recorded, of weights that are whole and stay on the device:
        "auto", "on" or "off".
    """
    dtype = transformer.dtype
    fill = _filling(source, transformer, kind, merge)
    if sharder is not None:
        fill(transformer, device=device, dtype=dtype, shard=partial(sharder.cut, device))
        return transformer
    fill(transformer, device="cpu" if visiting else device, dtype=dtype)
    if not visiting:
        transformer.prepare()
        if wanted(cuda_graphs, device):
            transformer.replay_passes(required=cuda_graphs == "on")
        return transformer
    offload_blocks(
        transformer,
        transformer.blocks_in_order,
        device,
        parts=transformer.own_parts,
        methods=transformer.block_methods,
    )
    return transformer


def _filling(
    source: ExpertSource, transformer: DiffusionTransformer, kind: str, merge: Merge | None
) -> Callable[..., None]:
    """What fills a transformer, with what families need not know where it is not asked for."""
    options: dict[str, Any] = {} if merge is None else {"merge": merge}
    if kind:
        options["keep"] = Keeper(kind, transformer.block_lists)
    return partial(source.fill, **options)


def hollow_transformer(
    source: ExpertSource, dtype: torch.dtype, attention_backend: str, invariant: bool = False
) -> DiffusionTransformer:
    """The transformer on the meta device: its shapes, without its weights.

    invariant: its linear layers are such that no company changes a row's bits.
    """
    with torch.device("meta"):
        transformer = source.build(attention_backend)
    if invariant:
        make_invariant(transformer)
    return transformer.to(dtype).eval().requires_grad_(False)


def _experts(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    load: Callable[[ExpertSource, Merge | None], DiffusionTransformer],
    shares: int = 1,
    merges: Sequence[Merge | None] | None = None,
    size: Callable[[ExpertSource, Merge | None], int] | None = None,
) -> list[Expert]:
    """shares: over how many ranks each one's weights are shared out. merges: of each. size: its
    bytes, where not all parameters are of `dtype`."""
    each = merges or [None] * len(checkpoint.experts)
    num_timesteps = _sampler_config(checkpoint).num_train_timesteps
    return [
        Expert(
            load=partial(load, source, merge),
            from_timestep=source.from_fraction * num_timesteps,
            size_bytes=source.num_parameters * dtype.itemsize // shares
            if size is None
            else size(source, merge),
        )
        for source, merge in zip(checkpoint.experts, each, strict=True)
    ]


def _merges(
    loras: Sequence[Lora],
    checkpoint: Checkpoint,
    build: Callable[[ExpertSource], DiffusionTransformer],
) -> tuple[Sequence[Merge | None] | None, tuple[LoraRecord, ...]]:
    """What adapters change of each expert, and how results name them."""
    if not loras:
        return None, ()
    hollow = build(checkpoint.experts[0]).state_dict()
    shapes = {name: tuple(value.shape) for name, value in hollow.items()}
    family = family_named(checkpoint.family)
    return merges_of(loras, family, shapes, len(checkpoint.experts))


def _sampler_config(checkpoint: Checkpoint) -> SamplerConfig:
    path = checkpoint.scheduler_path or checkpoint.path
    config = read_config(checkpoint.scheduler_config, path=path)
    return config if checkpoint.spread is None else replace(config, spread=checkpoint.spread)


def _level_for(model: VideoModel, needed: Callable[[VideoModel], int] | None) -> str:
    """The level of offloading with which a usual request fits; of `model` nothing has weights yet
    but the VAE, which is on its device."""
    encoders = list(model.prompt_encoder.modules)
    if model.image_encoder is not None:
        encoders.append(model.image_encoder.model)
    return level_that_fits(
        int(USABLE * free_bytes(model.device)),
        text=sum(weight.nbytes for encoder in encoders for weight in encoder.parameters()),
        transformers=sum(expert.size_bytes for expert in model.experts),
        rest=0 if needed is None else needed(model),
    )


# The encoders of texts and images.


def load_prompt_encoder(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, offload: str
) -> PromptEncoder:
    """The text encoders.

    offload: whether they visit the device, from host memory; `"auto"`: not known yet, so they come
    without their weights.
    """
    encoders = {}
    for name, source in checkpoint.text_encoders.items():
        encoders[name] = load_text_encoder(
            source.encoder.class_name,
            source.encoder.folder,
            None if source.tokenizer is None else source.tokenizer.folder,
            device=_place(offload, device),
            dtype=dtype,
            max_tokens=source.max_tokens,
        )
        has_layers = next(encoders[name].model.parameters(), None) is not None
        if offload in ("text", "blocks") and has_layers:
            offload_encoder(encoders[name], device)
    return PromptEncoder(encoders)


def load_image_encoder(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, offload: str
) -> ImageEncoder | None:
    """The image encoder, where there is one; `offload` as of `load_prompt_encoder`."""
    source = checkpoint.image_encoder
    if source is None:
        return None
    encoder = ImageEncoder.from_folders(
        source.encoder.folder,
        None if source.processor is None else source.processor.folder,
        device=_place(offload, device),
        dtype=dtype,
    )
    if offload in ("text", "blocks"):
        offload_encoder(encoder, device)
    return encoder


def _place(offload: str, device: torch.device) -> torch.device:
    """Where the weights of encoders are read to."""
    return {"auto": torch.device("meta"), "none": device}.get(offload, torch.device("cpu"))
