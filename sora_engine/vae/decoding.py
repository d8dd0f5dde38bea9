"""Latents to the frames that a caller gets: streamed, round in circles for a loop, as uint8."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sora_engine.vae.coder import VideoCoder, stretches_of
from sora_engine.vae.finite import check_finite
from sora_engine.vae.shapes import look_ahead

MAX_REACH = 96
"""Latent frames after which a causal decoder that still remembers is taken to be at fault: Wan's
reaches back 38."""


@torch.inference_mode()
def decoding(
    latents: Tensor,
    vae: VideoCoder[Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    wraps: bool,
) -> Iterator[Tensor | None]:
    """Frames `[n, height, width, 3]` (uint8, on the host), a latent frame's worth at a time; None
    between: wherever the engine may turn to other jobs, or stop.

    latents: normalised, `[C, T, H, W]`; they are decoded as `dtype` on `device`. wraps: time is a
    circle. A loop's decoder runs in circles until a lap leaves it as it found it: the next lap has
    no seam. Raises NonFiniteError for frames that are no numbers.
    """
    latents = latents.to(device, dtype)
    ahead, total = look_ahead(vae.config), latents.shape[1]
    skipped, left = 0, None
    if wraps and ahead:
        latents, skipped, left = round_the_seam(latents, vae, ahead + 1)
    state = (yield from last_lap_state(latents, vae)) if wraps and not ahead else None
    for i, latent_frame in enumerate(stretches_of(latents, vae.config), start=1):
        frames, state = vae.decode_chunk(latent_frame[None], state, consume=True)
        what = f"latent frame {min(i, total)} of {total}"
        check_finite([frames], what, stage="decoding", dtype=dtype, step=i)
        cut = frames[0, :, skipped:]
        skipped = max(0, skipped - frames.shape[2])
        if left is not None:
            cut = cut[:, :left]
            left -= cut.shape[1]
        made = to_uint8(cut) if cut.shape[1] else None
        del frames, cut  # not held while the next ones are made
        yield made
        del made


def round_the_seam(latents: Tensor, vae: VideoCoder[Any], reach: int) -> tuple[Tensor, int, int]:
    """A loop's latents `[C, T, h, w]` with as many of its own before and behind as its decoder sees
    either way, how many frames to leave out then, and how many to keep."""
    total, factor = latents.shape[1], vae.scale_factor_temporal
    places = torch.arange(-reach, total + reach, device=latents.device) % total
    return latents[:, places], 1 + (reach - 1) * factor, total * factor


class Scales(Protocol):
    """A VAE's way from a model's latents to its own, and back."""

    def normalise(self, latents: Tensor) -> Tensor: ...
    def denormalise(self, latents: Tensor) -> Tensor: ...


def as_kept(latents: Tensor, vae: Scales) -> Tensor:
    """Latents `[C, T, H, W]` as they come back from `Video.latents` or a file, to the last bit.

    Those are denormalised, and the way there and back moves a last digit. What decodes a canvas
    takes it too, so that decoding its latents again makes the same frames.
    """
    kept = vae.denormalise(latents[None]).float().cpu()
    return vae.normalise(kept)[0].to(latents)


@runtime_checkable
class ComparesStates(Protocol):
    """A VAE that holds a part of the state, and asks those that hold the rest."""

    def same_state(self, a: Any, b: Any) -> bool: ...


def last_lap_state(latents: Tensor, vae: VideoCoder[Any]) -> Generator[None, None, Any]:
    """The decoder's state from which a lap over a loop's latents ends where it began.

    latents: `[C, T, H, W]`. A causal decoder forgets: after enough laps its caches repeat bit for
    bit, and the frames of the next lap join at the seam like any others. Yields after each latent
    frame.
    """
    # Where ranks decode a part each, they go round together.
    same = vae.same_state if isinstance(vae, ComparesStates) else _same
    before: Any = None
    for _ in range(MAX_REACH // latents.shape[1] + 2):
        state = before
        for latent_frame in latents.split(1, dim=1):
            # What the lap before left is looked at again; what this one leaves on its way is not.
            used_up = state is not before
            frames, state = vae.decode_chunk(latent_frame[None], state, consume=used_up)
            # Caches of NaN are unlike themselves: no lap would be the last.
            check_finite([frames], "a lap of the loop", stage="decoding", dtype=latents.dtype)
            del frames
            if not state.caches:  # an autoencoder of single frames: there is nothing to come round
                return state
            yield
        if before is not None and same(before, state):
            return state
        before = state
    raise RuntimeError(f"the decoder does not repeat within {MAX_REACH} latent frames of a loop")


def _same(a: Any, b: Any) -> bool:
    pairs = zip(a.caches, b.caches, strict=True)
    return all(x is not None and y is not None and torch.equal(x, y) for x, y in pairs)


def to_uint8(frames: Tensor) -> Tensor:
    """`[3, n, H, W]` in [-1, 1] -> uint8 `[n, H, W, 3]` on the host, rounded as in diffusers."""
    scaled = (frames.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()
