"""A loaded model: transformer or two, VAE, text encoder, and what requests need to know of them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import sora_kernels
from sora_engine.canvas import KnownMode, Prompts
from sora_engine.errors import BackendError, CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import sampled_hash
from sora_engine.models.folder import Component
from sora_engine.models.wan.blocks import OWN_PARTS
from sora_engine.models.wan.checkpoint import TransformerSource, WanCheckpoint, resolve_model
from sora_engine.models.wan.model import TEXT_TOKENS, WanTransformer
from sora_engine.offload import check_level, level_that_fits, offload_blocks
from sora_engine.packing import Context
from sora_engine.preview import LatentPreview
from sora_engine.request import GenerationDefaults, LatentGrid
from sora_engine.samplers import SOLVERS, SamplerConfig, read_config
from sora_engine.text import ImageEncoder, TextEncoder
from sora_engine.vae.backend import open_coder
from sora_engine.vae.coder import ChunkCoder
from sora_engine.vae.config import VAEConfig
from sora_engine.vae.fit import FittedCoder
from sora_engine.vae.wan import WanVAE
from sora_engine.windows import SCHEDULES

if TYPE_CHECKING:
    from sora_engine.distributed.weights import WeightShards

logger = logging.getLogger(__name__)

BUNDLED = {"sprites": Path(__file__).parents[1] / "checkpoints" / "sprites"}
"""Checkpoints that come with the package, by name."""

GENERATION_CONFIG = "generation_config.json"


@dataclass(slots=True)
class Expert:
    """One transformer, loaded when it is first needed.

    from_timestep: it serves timesteps at and above this one, down to the next expert's.
    """

    load: Callable[[], WanTransformer]
    from_timestep: float
    size_bytes: int
    transformer: WanTransformer | None = None


@dataclass(frozen=True, slots=True, eq=False)
class VideoDecoder:
    """The VAE of a checkpoint alone: what finished latents need."""

    vae: ChunkCoder[Any]
    vae_dtype: torch.dtype
    device: torch.device


@dataclass(slots=True, eq=False)
class VideoModel:
    """Everything that one checkpoint brings.

    experts: by falling noise level; Wan 2.2 A14B has two, all others one.
    weights_hash: `sampled_hash` of all weights, by which results name what made them.
    preview: latents to colours, where the checkpoint brings that.
    offload: which weights wait in host memory: one of `sora_engine.offload.LEVELS`.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    experts: list[Expert]
    vae: FittedCoder
    vae_dtype: torch.dtype
    text_encoder: TextEncoder
    image_encoder: ImageEncoder | None
    takes_last_image: bool
    sampler_config: SamplerConfig
    known_mode: KnownMode
    grid: LatentGrid
    defaults: GenerationDefaults
    weights_hash: str = ""
    preview: LatentPreview | None = None
    offload: str = "none"

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    def expert_at(self, timestep: float) -> int:
        """The index of the expert for this timestep."""
        for i, expert in enumerate(self.experts):
            if timestep >= expert.from_timestep:
                return i
        return len(self.experts) - 1

    def transformer(self, index: int) -> WanTransformer:
        """Expert `index`, loaded; where memory does not hold all, the others are let go of."""
        expert = self.experts[index]
        if expert.transformer is None:
            for other in self.experts:
                if other.transformer is not None and not self._fits(expert):
                    logger.info("letting go of one expert to load the other")
                    other.transformer = None
                    gc.collect()  # what visits a device and its methods refer to each other
            expert.transformer = expert.load()
        return expert.transformer

    @property
    def loaded_transformer(self) -> WanTransformer:
        """An expert that is loaded anyway: they are all built alike."""
        loaded = [e.transformer for e in self.experts if e.transformer is not None]
        return loaded[0] if loaded else self.transformer(0)

    def encode_contexts(self, transformer: WanTransformer, prompts: Prompts) -> list[Context]:
        """Keys and values of a request's texts, and last of its negative text."""
        texts = list(prompts.texts)
        if prompts.negative is not None:
            texts.append(prompts.negative)
        texts = [text.to(self.device) for text in texts]
        return transformer.encode_contexts(texts, [prompts.image] * len(texts))

    def _fits(self, expert: Expert) -> bool:
        waits = self.offload == "blocks"
        free = free_memory(torch.device("cpu") if waits else self.device)
        return free is None or expert.size_bytes < 0.8 * free


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device (available memory, for the CPU); None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


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
        defaults=_defaults(settings, checkpoint, grid, folder),
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
    defaults = _defaults(settings, checkpoint, grid, folder)
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


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name; `"auto"` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise BackendError(f"device {device!r} is not one; use auto, cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device {device!r} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs"
        )
    return resolved


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by name; `"auto"` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        dtype = DTYPES.get(_SHORT.get(dtype, dtype), dtype)
    if dtype not in DTYPES.values():
        raise BackendError(f"dtype {dtype!r} is not supported; use auto, {', '.join(DTYPES)}")
    assert isinstance(dtype, torch.dtype)
    return dtype


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


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """The defaults that a checkpoint brings in `generation_config.json`; empty where it has none.

    Raises CheckpointError for keys that this engine does not know.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    settings = read_json_object(path)
    known = {f.name for f in fields(GenerationDefaults)} | {"text_tokens"}
    strange = sorted(key for key in settings if key not in known and not key.startswith("_"))
    if strange:
        raise CheckpointError(f"unknown keys {strange}; known are {sorted(known)}", path=path)
    if settings.get("solver") not in (None, *SOLVERS):
        raise CheckpointError(
            f"solver must be one of {list(SOLVERS)}, got {settings['solver']!r}", path=path
        )
    if settings.get("window_schedule", SCHEDULES[0]) not in SCHEDULES:
        raise CheckpointError(
            f"window_schedule must be one of {list(SCHEDULES)}, got "
            f"{settings['window_schedule']!r}",
            path=path,
        )
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def _defaults(
    settings: Mapping[str, Any], checkpoint: WanCheckpoint, grid: LatentGrid, folder: Path
) -> GenerationDefaults:
    """The checkpoint's own defaults over those of its family's published pipelines."""
    height, width, num_frames, fps = 480, 832, 81, 16.0
    if checkpoint.expand_timesteps:  # TI2V-5B
        height, width, num_frames, fps = 704, 1280, 121, 24.0
    two = checkpoint.transformer_2 is not None
    published = {
        "height": height,
        "width": width,
        "num_frames": (num_frames - 1) // 4 * grid.time + 1,
        "fps": fps,
        "num_inference_steps": 40 if two else 50,
        "guidance_scale": 4.0 if two else 5.0,
        "guidance_scale_2": 3.0 if two else None,
        "max_window": (num_frames - 1) // 4 + 1,
    }
    own = {key: value for key, value in settings.items() if key != "text_tokens"}
    try:
        return GenerationDefaults(**{**published, **own})
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error), path=folder / GENERATION_CONFIG) from error
