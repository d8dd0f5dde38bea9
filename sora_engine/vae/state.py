"""What a causal autoencoder remembers between two stretches of one video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class VAEState:
    """The last inputs of every causal convolution, in the order in which they run.

    A cache is `[B, C, k, h, w]` with the last k inputs (2, or 1 where time is halved), or None
    where a temporal upsampler has met only the first latent frame: that frame passes it by, so the
    next one finds an empty past (diffusers marks this with the word "Rep").

    `latent_frames` counts the latent frames that went through. A state is never written to: one
    state can be continued in several ways.
    """

    caches: tuple[Tensor | None, ...]
    latent_frames: int

    @property
    def nbytes(self) -> int:
        """Bytes the caches hold."""
        return sum(cache.nbytes for cache in self.caches if cache is not None)


class Tape:
    """One pass over the layers: each takes its cache in turn and leaves the one for the next pass.

    `keep=False` on the last pass over a video: nothing is kept, so nothing is copied for it.
    """

    def __init__(self, caches: Sequence[Tensor | None] | None, *, keep: bool = True):
        self._old = caches
        self._at = 0
        self._keep = keep
        self.new: list[Tensor | None] = []

    @property
    def first(self) -> bool:
        """Whether the frames of this pass begin with the first frame of the video."""
        return self._old is None

    def take(self) -> Tensor | None:
        """The next layer's cache; None means an empty past."""
        cache = None if self._old is None else self._old[self._at]
        self._at += 1
        return cache

    def leave(self, inputs: Tensor | None, frames: int = 0) -> None:
        """Keep the last `frames` of a layer's inputs `[B, C, T, H, W]` for its next pass.

        Zeros stand before the first frame. A copy is kept: a view would keep all inputs alive.
        """
        if inputs is None or not self._keep:
            self.new.append(None)
        elif inputs.shape[2] < frames:
            missing = frames - inputs.shape[2]
            self.new.append(F.pad(inputs, (0, 0, 0, 0, missing, 0)))
        else:
            self.new.append(inputs[:, :, -frames:].clone())
