"""The VQ-VAE of latent diffusion and VQGAN (arXiv 1711.00937, 2012.09841), over the frames of a
video: each latent is the nearest vector of a codebook.

Layers and names are those of the image autoencoder (`vae.kl`), with a codebook between its halves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from sora_engine.errors import CheckpointError, RequestError
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.kl import Decoder, Encoder, PictureConv
from sora_engine.vae.kl_checkpoint import CODEBOOK, KLFiles, original_prefix, to_newer_name
from sora_engine.vae.kl_config import KLConfig
from sora_engine.vae.registry import VAEKind
from sora_engine.vae.state import FeatureCache

ROWS = 1024
"""Latents whose distances to the codebook are held at a time."""


@dataclass(frozen=True)
class VQConfig(KLConfig):
    """The layout of a `VQModel`, with diffusers' names and defaults.

    num_vq_embeddings: vectors of the codebook. vq_embed_dim: channels of one, and of a latent;
    None: latent_channels.
    """

    kind: ClassVar[str] = "VQModel"
    not_its: ClassVar[tuple[str, ...]] = ("use_quant_conv", "use_post_quant_conv", "shift_factor")

    latent_channels: int = 3
    force_upcast: bool = False
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    norm_type: str = "group"
    lookup_from_codebook: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (
            ("num_vq_embeddings", self.num_vq_embeddings),
            ("vq_embed_dim", self.z_dim),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} must be a positive whole number, not {value!r}")
        if self.norm_type != "group":
            raise CheckpointError(
                f"norm_type is {self.norm_type!r}; 'group' is supported (MoVQ's 'spatial' is not)"
            )

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    @property
    def encoded(self) -> int:
        """Channels that the encoder gives."""
        return self.latent_channels

    @property
    def latents_mean(self) -> tuple[float, ...]:
        return (0.0,) * self.z_dim

    @property
    def latents_std(self) -> tuple[float, ...]:
        return (1.0 / self.scaling_factor,) * self.z_dim


class VQVAE(CausalVAE):
    """`VQModel`; a state dict of diffusers' class loads as it is.

    Latents are those before the codebook, as diffusion models of it denoise them. Decoding takes
    the nearest vector of each.
    """

    config: VQConfig
    splits_rows: ClassVar[bool] = False
    """Its norms and its attention see the whole picture at every grid."""

    def __init__(self, config: VQConfig):
        super().__init__(config)
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = PictureConv(channels, config.z_dim, 1)
        self.quantize = nn.ModuleDict(
            {"embedding": nn.Embedding(config.num_vq_embeddings, config.z_dim)}
        )
        self.post_quant_conv = PictureConv(config.z_dim, channels, 1)
        self.decoder = Decoder(config)

    def encode_step(self, frames: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: frames to raw latents, and as many channels of a variance,
        which is none: `[B, 2z, t, h, w]`."""
        x = self.encoder(frames.contiguous(memory_format=torch.channels_last_3d), feat_cache)
        x = self.quant_conv.valid(x)
        return torch.cat([x, torch.zeros_like(x)], dim=1)

    def decode_step(self, raw: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: raw (not normalised) latents, each taken as the nearest
        vector of the codebook, to their frames."""
        return self._decoded(self.vectors(self.codes(raw)), feat_cache)

    def codes(self, raw: Tensor) -> Tensor:
        """The nearest vector of the codebook to each raw latent `[B, z, t, h, w]`: its number,
        int64 `[B, t, h, w]`."""
        rows = raw.movedim(1, -1)
        flat = rows.reshape(-1, self.config.z_dim)
        found = [torch.cdist(part, self._codebook).argmin(dim=1) for part in flat.split(ROWS)]
        return torch.cat(found).view(rows.shape[:-1])

    def vectors(self, codes: Tensor) -> Tensor:
        """Raw latents `[B, z, t, h, w]` of codes `[B, t, h, w]`."""
        return torch.nn.functional.embedding(codes, self._codebook).movedim(-1, 1)

    @torch.inference_mode()
    def encode_to_codes(self, video: Tensor) -> Tensor:
        """Frames `[B, 3, n, H, W]` in [-1, 1] to codes, int64 `[B, n, h, w]`. RequestError as of
        `encode`."""
        return self.codes(self.denormalise(self.encode(video)))

    @torch.inference_mode()
    def decode_from_codes(self, codes: Tensor) -> Tensor:
        """Frames `[B, 3, n, H, W]` of codes `[B, n, h, w]`. RequestError for what is no code."""
        count = self.config.num_vq_embeddings
        if codes.dtype not in (torch.int32, torch.int64) or codes.dim() != 4:
            raise RequestError(
                f"codes must be integers [B, n, h, w], got {codes.dtype} {list(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < count:
            raise RequestError(
                f"codes go from 0 to {count - 1}, got {int(codes.min())} to {int(codes.max())}"
            )
        frames = [self.decode(self.normalise(self.vectors(one))) for one in codes.split(1, dim=1)]
        return torch.cat(frames, dim=2)

    @property
    def _codebook(self) -> Tensor:
        embedding: nn.Embedding = self.quantize["embedding"]  # type: ignore[assignment]
        return embedding.weight

    def _decoded(self, quantised: Tensor, feat_cache: FeatureCache) -> Tensor:
        x = quantised.contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(self.post_quant_conv.valid(x), feat_cache)  # type: ignore[no-any-return]


class VQFiles(KLFiles):
    """How VQ-VAEs lie in single files: as image autoencoders do, with a codebook."""

    def claims(self, names: Iterable[str]) -> bool:
        present = set(names)
        prefix = original_prefix(present)
        return prefix is not None and prefix + CODEBOOK in present

    def config(
        self, shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
    ) -> VQConfig:
        """The scale of latents is not in such files: CheckpointError."""
        raise CheckpointError(
            "a VQ-VAE, whose scale of latents is not in the file: a folder with diffusers' "
            "config.json would work",
            path=path,
        )


KIND = VAEKind(config=VQConfig, layers=VQVAE, files=VQFiles(), renames=to_newer_name)

__all__ = ["KIND", "VQVAE", "VQConfig"]
