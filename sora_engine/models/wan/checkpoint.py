"""Wan checkpoints as they are published: diffusers folders, and single files under Wan's own names.

A single `.safetensors` file holds a transformer and nothing else. The VAE, text encoder and
tokenizer come from a folder with `vae/`, `text_encoder/` and `tokenizer/` in it: a diffusers folder
of the same family, or one put together by hand.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.loading import Keep, load_into
from sora_engine.io.safetensors import refuse_pickle
from sora_engine.io.weights.merging import Merge
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.selected import JoinedWeights, under_prefix
from sora_engine.io.weights.source import WeightSource
from sora_engine.models.folder import (
    INDEX,
    Component,
    FolderLayout,
    ModelFolder,
    config_file,
)
from sora_engine.models.wan.config import CLASS_NAMES, WanConfig
from sora_engine.models.wan.names import PREFIXES, is_vace_module, to_diffusers_name
from sora_engine.models.wan.parts import find_parts
from sora_engine.models.wan.shapes import infer_config
from sora_engine.models.wan.vace import OVERLAYS, open_vace_module, with_module

logger = logging.getLogger(__name__)

LAYOUT = FolderLayout(
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"),
    components={
        "transformer": CLASS_NAMES,
        "transformer_2": CLASS_NAMES,
        "vae": ("AutoencoderKLWan",),
        "text_encoder": ("UMT5EncoderModel",),
        "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
        "scheduler": (
            "UniPCMultistepScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DDIMScheduler",
            "DDPMScheduler",
        ),
        "image_encoder": ("CLIPVisionModel",),
        "image_processor": (
            "CLIPImageProcessor",
            "CLIPImageProcessorFast",
            "CLIPImageProcessorPil",
            "CLIPFeatureExtractor",
        ),
    },
    optional=("transformer_2", "image_encoder", "image_processor"),
    settings=("boundary_ratio", "expand_timesteps"),
    usual={
        "transformer": "wan2.1_t2v_14B_fp8_scaled.safetensors, or of two experts "
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors and its _low_noise_",
        "vae": "wan_2.1_vae.safetensors or wan2.2_vae.safetensors",
        "text_encoder": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "image_encoder": "clip_vision_h.safetensors",
    },
)
"""What diffusers' folders hold. `boundary_ratio` is where the second transformer takes over, as a
fraction of the noise levels; `expand_timesteps`, whether each token has its own timestep (Wan 2.2
TI2V-5B)."""

KEEP_FP32 = (
    "rope",
    "time_embedder",
    "action_embedder",
    "scale_shift_table",
    "norm1",
    "norm2",
    "norm3",
)
"""Parts of names whose weights stay float32 in any dtype, as diffusers keeps them."""
IGNORED = ("norm_added_q",)
"""Left over in some converted I2V checkpoints; no model reads it."""

# What converted checkpoints carry, for companion folders without a scheduler/.
_DEFAULT_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "use_flow_sigmas": True,
}


# What VideoX-Fun's examples and configurations for Control-Camera have.
_FUN_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 5.0,
}


def open_transformer(path: Path) -> WeightSource:
    """The transformer of a file, which an all-in-one file has under a prefix."""
    return under_prefix(open_weights(path), [prefix for prefix in PREFIXES if prefix])


@dataclass(frozen=True, slots=True)
class TransformerSource:
    """Where a transformer's weights are and what they are the weights of."""

    path: Path
    config: WanConfig
    vace: Path | None = None
    """A file of VACE's control blocks that are laid over it."""

    def open(self) -> WeightSource:
        """Its tensors, of one file or two."""
        weights = open_transformer(self.path)
        if self.vace is None:
            return weights
        try:
            return JoinedWeights([weights, open_vace_module(self.vace)])
        except BaseException:
            weights.close()
            raise

    def load(
        self,
        module: nn.Module,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        shard: Callable[[nn.Module], Mapping[str, range]] | None = None,
        merge: Merge | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Fill `module`, a `WanTransformer` of `self.config` built on the meta device; `shard`,
        `merge` and `keep` as of `load_into`."""
        with self.open() as weights:
            load_into(
                module,
                weights,
                device=device,
                dtype=dtype,
                rename=to_diffusers_name,
                keep_fp32=KEEP_FP32,
                ignore=IGNORED,
                shard=shard,
                merge=merge,
                keep=keep,
            )

    @property
    def num_parameters(self) -> int:
        """Counted from the headers; nothing is read."""
        with self.open() as weights:
            return sum(torch.Size(weights.info(name).shape).numel() for name in weights)


@dataclass(frozen=True, slots=True)
class WanCheckpoint:
    """Everything that a Wan model is made of, found and checked, with no weights read yet."""

    path: Path
    transformer: TransformerSource
    transformer_2: TransformerSource | None
    """The expert of the low noise levels (Wan 2.2 A14B)."""
    boundary_ratio: float | None
    expand_timesteps: bool
    vae: Component
    text_encoder: Component
    tokenizer: Component | None
    """None where the text encoder's file brings it."""
    scheduler_config: Mapping[str, Any]
    scheduler_path: Path | None
    """The file of `scheduler_config`; None where it is the default of published models."""
    image_encoder: Component | None
    image_processor: Component | None


def resolve_model(
    path: str | Path | Sequence[str | Path],
    *,
    components: str | Path | Mapping[str, Path] | None = None,
    boundary_ratio: float | None = None,
    attention_head_dim: int = 128,
) -> WanCheckpoint:
    """Find the parts of a Wan model.

    `path` is a diffusers folder, or a `.safetensors` file (or `.safetensors.index.json`) with the
    transformer, or two such files, the expert for high noise first. For files, `components` is as
    of `parts.find_parts`, and may name the second one as `transformer_2`, and as `vace` and
    `vace_2` files of VACE's blocks that are laid over the transformers. `boundary_ratio` overrides
    where the second expert takes over, and `attention_head_dim` tells what shapes do not.

    Raises `CheckpointError` for what is missing or cannot be; nothing is ever downloaded.
    """
    paths = [Path(p) for p in ([path] if isinstance(path, (str, Path)) else path)]
    if boundary_ratio is not None and not 0 < boundary_ratio < 1:
        raise CheckpointError(f"boundary_ratio is {boundary_ratio}; it must lie between 0 and 1")
    if not 1 <= len(paths) <= 2:
        raise CheckpointError(f"{len(paths)} paths; a model is one path, or two experts")
    for each in paths:
        refuse_pickle(each)
        if not each.exists():
            raise CheckpointError(
                "no such file or folder; a model is a diffusers folder or a .safetensors file, "
                "and nothing is downloaded",
                path=each,
            )
    if len(paths) == 1 and paths[0].is_dir():
        if components is not None:
            raise CheckpointError("a folder brings its own components", path=paths[0])
        return _from_folder(paths[0], boundary_ratio)
    if isinstance(components, str):
        components = Path(components)
    vace: list[Path | None] = [None, None]
    if isinstance(components, Mapping):
        if "transformer_2" in components:
            paths = [paths[0], components["transformer_2"]]
        vace = [components.get(name) for name in OVERLAYS]
        taken = ("transformer_2", *OVERLAYS)
        components = {k: v for k, v in components.items() if k not in taken} or None
    sources = []
    for i, each in enumerate(paths):
        source = transformer_in_file(each, attention_head_dim)
        module = vace[i]
        if module is not None:
            source = replace(source, config=with_module(source.config, module, each), vace=module)
        sources.append(source)
    if vace[1] is not None and len(paths) == 1:
        raise CheckpointError("vace_2 is for the second of two experts, and there is one")
    if len(paths) == 2 and (vace[0] is None) != (vace[1] is None):
        raise CheckpointError(
            "two experts need a VACE module each; give both as `vace` and `vace_2`",
            path=vace[0] or vace[1],
        )
    halves = [re.search(r"(?i)(high|low).?noise", each.name) for each in paths]
    told = [None if half is None else half[1].lower() for half in halves]
    if len(paths) == 2 and (told[0] == "low" or told[1] == "high"):
        raise CheckpointError(
            f"by their names the two experts are {told[0] or 'one'} and {told[1] or 'one'} noise; "
            "the one for high noise goes first, and the one for low noise second",
            path=paths[0] if told[0] == "low" else paths[1],
        )
    if len(paths) == 1 and told[0] is not None:
        other = {"high": "low", "low": "high"}[told[0]]
        logger.warning(
            "%s is one of two experts, by its name, and alone: all noise levels are its now; the "
            "one for %s noise goes beside it, as two models, the one for high noise first",
            paths[0].name,
            other,
        )
    return _from_files(sources, components, boundary_ratio)


def _from_folder(path: Path, boundary_ratio: float | None) -> WanCheckpoint:
    folder = ModelFolder.open(path, LAYOUT)
    index_path = path / INDEX
    own_boundary, expand_timesteps = _settings(folder.settings, index_path)
    if ("transformer_2" in folder.components) != (own_boundary is not None):
        raise CheckpointError(
            f"boundary_ratio is {own_boundary} and transformer_2 is "
            f"{'there' if 'transformer_2' in folder.components else 'null'}; two experts need both",
            path=index_path,
        )
    sources = []
    for name in ("transformer", "transformer_2"):
        component = folder.get(name)
        if component is not None:
            config = WanConfig.from_dict(component.config, path=component.config_path)
            sources.append(TransformerSource(component.weights_path, config))
    return _assemble(
        path,
        sources,
        folder.components,
        (boundary_ratio or own_boundary) if len(sources) == 2 else None,
        expand_timesteps,
    )


def _settings(index: dict[str, Any], path: Path) -> tuple[float | None, bool]:
    boundary = index.get("boundary_ratio")
    number = isinstance(boundary, (int, float)) and not isinstance(boundary, bool)
    if boundary is not None and not (number and 0 < boundary < 1):
        raise CheckpointError(
            f"boundary_ratio is {boundary!r}; it must lie between 0 and 1, or be null", path=path
        )
    expand = index.get("expand_timesteps", False)
    if not isinstance(expand, bool):
        raise CheckpointError(
            f"expand_timesteps is {expand!r}; it must be true or false", path=path
        )
    return (None if boundary is None else float(boundary)), expand


def _from_files(
    sources: list[TransformerSource],
    components: Path | Mapping[str, Path] | None,
    boundary_ratio: float | None,
) -> WanCheckpoint:
    paths = [source.path for source in sources]
    config = sources[0].config
    expand_timesteps = config.out_channels == 48  # TI2V-5B and what was made of it have 48
    experts_meet = 0.875 if config.in_channels == config.out_channels else 0.9  # T2V, I2V

    needed = ["vae", "text_encoder"]
    needed += ["image_encoder"] if config.image_dim is not None else []
    folder, parts = find_parts(paths, components, needed, LAYOUT)
    if (folder / INDEX).exists():
        index = read_json_object(folder / INDEX)
        if len(paths) == 2 and isinstance(index.get("boundary_ratio"), float):
            experts_meet = index["boundary_ratio"]
    return _assemble(
        paths[0],
        sources,
        parts,
        (boundary_ratio or experts_meet) if len(paths) == 2 else None,
        expand_timesteps,
    )


def _assemble(
    path: Path,
    sources: list[TransformerSource],
    parts: Mapping[str, Component],
    boundary_ratio: float | None,
    expand_timesteps: bool,
) -> WanCheckpoint:
    config = sources[0].config
    if len(sources) == 2 and sources[1].config != config:
        raise CheckpointError(
            f"the two experts differ: {_difference(config, sources[1].config)}",
            path=sources[1].path,
        )
    for name in ("image_encoder", "image_processor"):
        whole = name == "image_processor" and _in_one_file(parts.get("image_encoder"))
        if config.image_dim is not None and name not in parts and not whole:
            raise CheckpointError(
                f"the transformer reads CLIP embeddings of images (image_dim {config.image_dim}), "
                f"and the model has no {name}",
                path=path,
            )
    scheduler = parts.get("scheduler")
    default = {**_DEFAULT_SCHEDULER, "flow_shift": 5.0 if expand_timesteps else 3.0}
    if config.in_dim_control_adapter is not None:
        default = _FUN_SCHEDULER
    return WanCheckpoint(
        path=path,
        transformer=sources[0],
        transformer_2=sources[1] if len(sources) == 2 else None,
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts.get("tokenizer"),
        scheduler_config=scheduler.config if scheduler is not None else default,
        scheduler_path=scheduler.config_path if scheduler is not None else None,
        image_encoder=parts.get("image_encoder"),
        image_processor=parts.get("image_processor"),
    )


def _in_one_file(part: Component | None) -> bool:
    return part is not None and part.folder.is_file()


def transformer_in_file(path: Path, head_dim: int = 128) -> TransformerSource:
    """A transformer file and its configuration: diffusers' beside it, or else from the shapes."""
    config_path = path.parent / config_file("transformer")
    if config_path.is_file():
        config = read_json_object(config_path)
        dim, heads = config.get("dim"), config.get("num_heads")
        if type(dim) is int and type(heads) is int and heads > 0:  # as authors' own code has it
            head_dim = dim // heads
        elif config.get("_class_name") in CLASS_NAMES:
            return TransformerSource(path, WanConfig.from_dict(config, path=config_path))
    with open_transformer(path) as weights:
        shapes = {to_diffusers_name(name): weights.info(name).shape for name in weights}
    if is_vace_module(shapes):
        raise CheckpointError(
            "a VACE module, which is laid over a text to video transformer: give that one as the "
            "model, and this file as components={'vace': ...} (on the command line --vace)",
            path=path,
        )
    return TransformerSource(path, infer_config(shapes, head_dim=head_dim, path=path))


def _difference(a: WanConfig, b: WanConfig) -> str:
    ours, theirs = a.to_dict(), b.to_dict()
    return ", ".join(f"{k} {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k])
