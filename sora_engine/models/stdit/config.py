"""The shape of an STDiT3, read from the `config.json` of its authors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from sora_engine.errors import CheckpointError
from sora_engine.models.transformer_config import MAX_LAYERS, PatchConfig, TransformerConfig

LATENT_PIXELS = 8
"""Pixels along a side of a latent, by which a video's size is told to its places."""


@dataclass(frozen=True)
class STDiTFile(TransformerConfig):
    """The keys of the authors' `config.json`, with their names and the values of STDiT3-XL/2.

    input_sq_size: pixels along a side of the squares that places are scaled to. model_max_length:
    tokens of a text. pred_sigma: whether as many channels come out again, which nothing reads.
    """

    class_names = ("STDiT3",)
    model = "an STDiT3"
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "model_type": ("STDiT3",),
        "architectures": (["STDiT3"],),
        "mlp_ratio": (4.0, 4),
        "qk_norm": (True,),
        "qk_norm_legacy": (False,),
        "skip_y_embedder": (False,),
    }
    without_effect = (
        "auto_map", "class_dropout_prob", "drop_path", "enable_flash_attn", "freeze_y_embedder",
        "enable_layernorm_kernel", "enable_sequence_parallelism", "input_size", "torch_dtype",
        "only_train_temporal", "transformers_version",
    )  # fmt: skip

    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: tuple[int, ...] = (1, 2, 2)
    input_sq_size: int = 512
    caption_channels: int = 4096
    model_max_length: int = 300
    pred_sigma: bool = True

    def check(self) -> None:
        """Sizes, and that they fit each other."""
        self.must_be_positive(
            "in_channels", "hidden_size", "num_heads", "input_sq_size", "caption_channels",
            "model_max_length",
        )  # fmt: skip
        self.must_be_positive("depth", most=MAX_LAYERS)
        self.must_be_bool("pred_sigma")
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads"
            )
        patch = self.patch_size
        square = isinstance(patch, list | tuple) and len(patch) == 3 and patch[1] == patch[2]
        if not square or patch[0] != 1 or not isinstance(patch[1], int) or patch[1] < 1:
            raise CheckpointError(f"patch_size is {patch!r}; [1, 2, 2] would work")


@dataclass(frozen=True)
class STDiTConfig(PatchConfig):
    """The configuration of an STDiT3, in the words of transformers over patches.

    sample_size: `input_sq_size` in latents. text_tokens: `model_max_length`.
    """

    class_names = STDiTFile.class_names
    model = STDiTFile.model

    caption_channels: int = 4096
    text_tokens: int = 300

    def check(self) -> None:
        """Rotations along time take channels in pairs."""
        super().check()
        self.must_be_positive("caption_channels", "text_tokens")
        if self.attention_head_dim % 2:
            raise CheckpointError(
                f"heads are {self.attention_head_dim} wide; rotations need an even width"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> Self:
        """Read the authors' `config.json`; raises CheckpointError as `TransformerConfig` does."""
        file = STDiTFile.from_dict(values, path=path)
        try:
            return cls(
                num_attention_heads=file.num_heads,
                attention_head_dim=file.hidden_size // file.num_heads,
                in_channels=file.in_channels,
                out_channels=file.in_channels * (1 + file.pred_sigma),
                num_layers=file.depth,
                sample_size=max(1, file.input_sq_size // LATENT_PIXELS),
                patch_size=file.patch_size[1],
                caption_channels=file.caption_channels,
                text_tokens=file.model_max_length,
            )
        except CheckpointError as error:
            raise CheckpointError(str(error), path=path) from None

    def to_dict(self) -> dict[str, Any]:
        """The authors' keys and values."""
        file = STDiTFile(
            in_channels=self.in_channels,
            hidden_size=self.inner_dim,
            depth=self.num_layers,
            num_heads=self.num_attention_heads,
            patch_size=(1, self.patch_size, self.patch_size),
            input_sq_size=self.sample_size * LATENT_PIXELS,
            caption_channels=self.caption_channels,
            model_max_length=self.text_tokens,
            pred_sigma=self.learned_variance,
        )
        return {"model_type": "STDiT3", **asdict(file)}
