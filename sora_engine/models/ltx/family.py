"""LTX-Video behind the seam: videos from texts, pictures and frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from sora_engine.denoise.model import TransformerShape
from sora_engine.errors import CheckpointError
from sora_engine.models.family import Capabilities, Checkpoint, Shapes, TextSource
from sora_engine.models.folder import Component, FolderLayout
from sora_engine.models.ltx.config import LTXConfig
from sora_engine.models.ltx.ladders import LTX_LADDERS
from sora_engine.models.ltx.model import LTXTransformer, transformer_shape
from sora_engine.models.plain_family import PlainFamily, check_texts, vae_of
from sora_engine.models.transformer_files import Names, TransformerSource
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.samplers.config import Spread
from sora_engine.text.t5_written import PADDED, WRITTEN, WRITTEN_COUNTS
from sora_engine.vae.ltx_header import MEAN, PREFIXES, STD, header_config

_BESIDE = ("vae", "text_encoder", "tokenizer", "scheduler")
_SHIFTED = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05,
    "base_image_seq_len": 1024, "max_image_seq_len": 4096,
}  # fmt: skip
"""What the authors' code makes of `"shifting": "SD3"`."""
_SAMPLERS: dict[object, Spread] = {
    "Uniform": "even", None: "even", "LinearQuadratic": "linear-quadratic",
}  # fmt: skip
CONDITION = "LTXConditionPipeline"
"""The pipeline of 0.9.5 and later: positions in time are those of frames, padding of texts is
masked, and levels are linear-quadratic."""


class LTXFamily(PlainFamily[LTXConfig]):
    """The LTX-Video family (arXiv 2501.00103)."""

    name = "ltx"
    config = LTXConfig
    transformer = LTXTransformer
    ladders = LTX_LADDERS
    layout = FolderLayout(
        pipelines=("LTXPipeline", "LTXImageToVideoPipeline", CONDITION),
        components={
            "transformer": LTXConfig.class_names,
            "vae": ("AutoencoderKLLTXVideo",),
            "text_encoder": ("T5EncoderModel",),
            "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        },
    )
    capabilities = Capabilities(
        makes="videos, pictures",
        reads="texts, images",
        known_modes=(KnownMode.NOISE_LEVEL,),
        windows=("static", "moving", "chained", "sparse"),
        ranks=("ulysses", "ring", "guidance", "window", "data"),
        adapters=("lora",),
        page="ltx.md",
    )
    marks = (
        "proj_in.weight",
        "time_embed.linear.weight",
        "transformer_blocks.0.attn1.norm_q.weight",
        "caption_projection.linear_1.weight",
        "scale_shift_table",
    )
    keep_fp32 = ("scale_shift_table",)
    default_scheduler: ClassVar[Mapping[str, Any]] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler"
    }
    layers = (
        *(
            f"transformer_blocks.#.{layer}"
            for layer in (
                *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v")),
                "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2",
            )
        ),
        "caption_projection.linear_1", "caption_projection.linear_2", "proj_in", "proj_out",
    )  # fmt: skip
    adapted = r"transformer_blocks\.(\d+)\.attn1\.to_[qkv]"
    adapted_elsewhere = r"temporal_transformer_blocks|adaln_single"

    def described(self, config: LTXConfig) -> str:
        """Its sizes, and what goes with it."""
        return (
            f"ti2v: {config.num_layers} layers, {config.inner_dim} wide, {config.in_channels} "
            "latent channels; goes with an AutoencoderKLLTXVideo and a T5 encoder"
        )

    def shape(self, config: LTXConfig) -> TransformerShape:
        """The sizes of its transformer."""
        return transformer_shape(config)

    def translate(self, shapes: Shapes) -> Names | None:
        """The authors' files name four things otherwise than diffusers does."""
        names = {_from_authors(name): name for name in shapes if not name.startswith("vae.")}
        same = len(names) == len(shapes) and all(own == name for own, name in names.items())
        return None if same else names

    def own_name(self, module: str) -> str | None:
        """diffusers' names, which are the engine's, and the authors'."""
        return super().own_name(_from_authors(module))

    def source_in_file(self, path: Path) -> TransformerSource[LTXConfig]:
        """A transformer file and its configuration, which lies beside it or in its header."""
        header = header_config(path)
        own = None if header is None else header.get("transformer")
        if not isinstance(own, Mapping):
            return super().source_in_file(path)
        return self._source(path, LTXConfig.from_header(own, path=path))

    def open_files(
        self,
        paths: Sequence[Path],
        components: Path | Mapping[str, Path] | None,
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """A transformer file, and the other parts; of the authors' files the autoencoder and the
        scheduler are in them."""
        header = header_config(paths[0]) if len(paths) == 1 else None
        if header is None:
            found = super().open_files(paths, components, settings)
            if found.scheduler_path is None:
                raise CheckpointError(
                    "no scheduler for a file whose header has none; the scheduler/ of a diffusers "
                    "folder would work",
                    path=paths[0],
                )
            return found
        given = dict(components) if isinstance(components, Mapping) else {}
        if isinstance(components, Path):
            given = {n: components / n for n in _BESIDE if (components / n).exists()}
        if isinstance(header.get("vae"), Mapping):
            given.setdefault("vae", paths[0])
        found = super().open_files(paths, given, settings)
        told = header.get("scheduler")
        if "scheduler" in given or not isinstance(told, Mapping):
            return found
        return replace(found, **scheduler_in(told, paths[0]))

    def of_pipeline(self, config: LTXConfig, pipeline: str) -> LTXConfig:
        """Later versions have a pipeline of their own."""
        return replace(config, pixel_times=pipeline == CONDITION)

    def assemble(
        self,
        path: Path,
        source: TransformerSource[LTXConfig],
        parts: Mapping[str, Component],
        settings: Mapping[str, Any],
    ) -> Checkpoint:
        """What was found, as the engine sees it."""
        parts = {**parts, "vae": with_statistics(parts["vae"])}
        coder = vae_of(parts, source.config.in_channels)
        check_texts(parts, source.config.caption_channels)
        config = replace(
            source.config, time_factor=coder.factor_temporal, space_factor=coder.factor_spatial
        )
        text = parts["text_encoder"]
        encoders = {
            "text": replace(text, class_name=WRITTEN if config.pixel_times else PADDED),
            "count": replace(text, class_name=WRITTEN_COUNTS),
        }
        return Checkpoint(
            family=self.name,
            variant="ti2v",
            path=path,
            experts=(self.expert(replace(source, config=config)),),
            vae=parts["vae"],
            **self.scheduler(parts),
            spread="linear-quadratic" if config.pixel_times else "even",
            grid=LatentGrid(
                channels=config.in_channels,
                vae_spatial=coder.factor_spatial,
                patch=(1, 1, 1),
                time=coder.factor_temporal,
            ),
            known_mode=KnownMode.NOISE_LEVEL,
            defaults=GenerationDefaults(
                height=16 * coder.factor_spatial,
                width=22 * coder.factor_spatial,
                num_frames=20 * coder.factor_temporal + 1,
                fps=25.0,
                num_inference_steps=50,
                guidance_scale=3.0,
                max_window=33,
            ),
            text_encoders={
                name: TextSource(
                    encoder=part, tokenizer=parts["tokenizer"], max_tokens=config.text_tokens
                )
                for name, part in encoders.items()
            },
        )


def scheduler_in(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a `Checkpoint` from the `scheduler` of a header's config. Raises
    CheckpointError."""
    sampler, shifting = values.get("sampler"), values.get("shifting")
    if sampler not in _SAMPLERS or shifting not in (None, "SD3"):
        raise CheckpointError(
            f"a scheduler with sampler {sampler!r} and shifting {shifting!r}; Uniform or "
            "LinearQuadratic, and null or SD3, are supported",
            path=path,
        )
    config = {**LTXFamily.default_scheduler, **(_SHIFTED if shifting else {})}
    if values.get("target_shift_terminal") is not None:
        config["shift_terminal"] = values["target_shift_terminal"]
    return {"scheduler_config": config, "scheduler_path": path, "spread": _SAMPLERS[sampler]}


def with_statistics(vae: Component) -> Component:
    """An autoencoder with the statistics of its latents in its configuration. They lie among the
    weights. Raises CheckpointError."""
    found = {}
    with vae.open_weights() as weights:
        prefix = next((p for p in PREFIXES if p + MEAN in weights), "")
        theirs = prefix + MEAN in weights
        names = {"latents_mean": prefix + MEAN, "latents_std": prefix + STD}
        for own, stored in names.items():
            name = stored if theirs else own
            if name not in weights:
                raise CheckpointError(
                    f"tensor {name} is missing: an LTX-Video autoencoder has it", path=vae.folder
                )
            if len(weights.info(name).shape) != 1:
                raise CheckpointError(
                    f"tensor {name} has shape {list(weights.info(name).shape)}; one value a "
                    "channel is wanted",
                    path=vae.folder,
                )
            found[own] = weights.read(name).float().tolist()
    return replace(vae, config={**vae.config, **found})


def _from_authors(module: str) -> str:
    module = module.replace("patchify_proj", "proj_in").replace("adaln_single", "time_embed")
    return module.replace(".q_norm", ".norm_q").replace(".k_norm", ".norm_k")
