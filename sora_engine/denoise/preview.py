"""What a video will look like while it is made: a linear map of its latents to colours, or a tiny
decoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.decoding import to_uint8
from sora_engine.vae.rehearsal import hollow_vae
from sora_kernels.transfer import to_device

FILE = "latent_rgb.json"


class Preview(Protocol):
    """Makes pictures of latents that are on their way."""

    def frames(self, latents: Tensor) -> np.ndarray:
        """Normalised latents `[C, T, h, w]` to uint8 `[T, height, width, 3]`: a picture a latent
        frame."""
        ...

    def nbytes(self, shape: Sequence[int]) -> int:
        """What those pictures of latents of this shape take."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LatentPreview:
    """Colours of a latent: `weight [3, channels] @ latent + bias [3]`, in 0 to 1 (float32).

    It lies in `latent_rgb.json` beside a checkpoint, and belongs to its VAE.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def read(cls, folder: Path, channels: int) -> LatentPreview | None:
        """The checkpoint's own; None where it brings none. Raises CheckpointError."""
        path = folder / FILE
        if not path.is_file():
            return None
        values = read_json_object(path)
        try:
            weight = torch.tensor(values["weight"], dtype=torch.float32)
            bias = torch.tensor(values["bias"], dtype=torch.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"needs weight and bias: {error!r}", path=path) from error
        if weight.shape != (3, channels) or bias.shape != (3,):
            raise CheckpointError(
                f"weight {list(weight.shape)} and bias {list(bias.shape)} must be "
                f"[3, {channels}] and [3]",
                path=path,
            )
        return cls(weight, bias)

    def write(self, folder: Path) -> Path:
        """Write `latent_rgb.json`."""
        path = folder / FILE
        rows = [[round(x, 5) for x in row] for row in self.weight.tolist()]
        bias = [round(x, 5) for x in self.bias.tolist()]
        path.write_text(json.dumps({"weight": rows, "bias": bias}) + "\n")
        return path

    @classmethod
    def fit(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> LatentPreview:
        """By least squares, from latents `[C, T, h, w]` and the colours that they stand for,
        `[3, T, h, w]` in 0 to 1."""
        latents = torch.cat([x.flatten(1) for x, _ in pairs], dim=1).double()
        colours = torch.cat([y.flatten(1) for _, y in pairs], dim=1).double()
        rows = torch.cat([latents, torch.ones(1, latents.shape[1], dtype=torch.float64)]).T
        solved = torch.linalg.lstsq(rows, colours.T).solution.T.float()
        return cls(solved[:, :-1].contiguous(), solved[:, -1].contiguous())

    def colours(self, latents: Tensor) -> Tensor:
        """Normalised latents `[C, T, h, w]` to colours `[3, T, h, w]`."""
        weight, bias = (
            to_device(x.to(latents.dtype), latents.device) for x in (self.weight, self.bias)
        )
        return torch.einsum("kc,cthw->kthw", weight, latents) + bias[:, None, None, None]

    def nbytes(self, shape: Sequence[int]) -> int:
        """See `Preview`."""
        _, frames, height, width = shape
        return frames * height * width * 3

    def frames(self, latents: Tensor) -> np.ndarray:
        """The same as uint8 `[T, h, w, 3]`: one picture a latent frame."""
        scaled = self.colours(latents).clamp(0, 1) * 255
        return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous().numpy()


class DecodedPreview:
    """Pictures in full size by a decoder that is cheap enough for every step.

    vae: reads latents as the transformer has them.
    """

    def __init__(self, vae: CausalVAE, dtype: torch.dtype) -> None:
        self.vae, self.dtype = vae, dtype
        self._hollow = hollow_vae(vae.config, dtype)

    def nbytes(self, shape: Sequence[int]) -> int:
        """See `Preview`."""
        _, frames, height, width = shape
        return frames * height * width * 3 * self.vae.scale_factor_spatial**2

    def frames(self, latents: Tensor) -> np.ndarray:
        """See `Preview`; of each latent frame the last of the frames that it stands for."""
        vae = self._hollow if latents.is_meta else self.vae
        state, made = None, []
        for latent in latents.to(self.dtype).split(1, dim=1):
            decoded, state = vae.decode_chunk(latent[None], state, consume=True)
            made.append(to_uint8(decoded[0, :, -1:]))
            del decoded
        return torch.cat(made).numpy()


def pooled_colours(frames: Tensor, time: int, size: tuple[int, int]) -> Tensor:
    """What `fit` compares with: uint8 `[n, H, W, 3]` averaged over each latent, `[3, T, h, w]`."""
    pixels = frames.permute(3, 0, 1, 2).float() / 255
    pooled = torch.nn.functional.adaptive_avg_pool2d(pixels, size)
    rest = pooled[:, 1:]
    if rest.shape[1] == 0:
        return pooled
    grouped = rest.unflatten(1, (-1, time)).mean(dim=2)
    return torch.cat([pooled[:, :1], grouped], dim=1)
