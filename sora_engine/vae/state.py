"""What a causal autoencoder remembers between two stretches of one video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class VAEState:
    """The last inputs of every causal convolution, in the order in which they run.

    A cache is `[B, C, k, h, w]` with the last k inputs (2, or 1 where time is halved), or None
    where a temporal upsampler has met only the first latent frame: that frame passes it by, so the
    next one finds an empty past (diffusers marks this with the word "Rep").

    `latent_frames` counts the latent frames that went through. Layers never write to a cache, so
    one state can be continued in several ways, until `release` gives it away. Only a CUDA graph
    writes to caches in place: `home` is the graph that a state came from, and keeps it alive.
    """

    caches: tuple[Tensor | None, ...]
    latent_frames: int
    home: object = field(default=None, repr=False, compare=False)
    released: bool = field(default=False, init=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes the caches hold."""
        return sum(cache.nbytes for cache in self.caches if cache is not None)

    def release(self) -> list[Tensor | None]:
        """The caches, which this state then no longer holds: for a pass that frees each one as soon
        as its layer has run, rather than keep two generations of all of them."""
        caches, self.caches, self.home = list(self.caches), (), None
        self.released = True
        return caches

    def move_out(self) -> None:
        """Copy the caches into memory of this state's own, before others take their place."""
        self.caches = tuple(cache if cache is None else cache.clone() for cache in self.caches)

    def to(self, device: torch.device | str) -> VAEState:
        """The same state with its caches on another device; itself where they are there."""
        moved = tuple(cache if cache is None else cache.to(device) for cache in self.caches)
        if all(new is old for new, old in zip(moved, self.caches, strict=True)):
            return self
        return VAEState(moved, self.latent_frames, self.home)


class FeatureCache:
    """One pass over the layers: each takes its cache in turn and leaves the one for the next pass.

    Caches in a list are dropped from it as they are taken; those in a tuple are the caller's.
    `keep=False` on the last pass over a video: nothing is kept, so nothing is copied for it.
    `last`: the video ends with this pass, which layers that wait for a frame to come must know.
    `latent_frames`: how many went through before it.
    """

    def __init__(
        self,
        caches: Sequence[Tensor | None] | None,
        *,
        keep: bool = True,
        last: bool = False,
        latent_frames: int = 0,
    ):
        self.last, self.latent_frames = last, latent_frames
        self._old = caches
        self._at = 0
        self._keep = keep
        self.new: list[Tensor | None] = []

    @property
    def first(self) -> bool:
        """Whether the frames of this pass begin with the first frame of the video."""
        return self._old is None

    @property
    def keeps(self) -> bool:
        """Whether anything is kept for a next pass."""
        return self._keep

    def take(self) -> Tensor | None:
        """The next layer's cache; None means an empty past."""
        if self._old is None:
            return None
        cache = self._old[self._at]
        if isinstance(self._old, list):
            self._old[self._at] = None
        self._at += 1
        return cache

    def put(self, cache: Tensor) -> None:
        """Keep a cache that a layer has made itself."""
        self.new.append(cache if self._keep else None)

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

    def in_parts(
        self, run: Callable[[Tensor, FeatureCache], Tensor], x: Tensor, frames: int
    ) -> Tensor:
        """`run(x, self)` of the layers that are left, over stretches of `frames` frames of x one
        after the other: what those layers hold on their way is then that of one stretch."""
        old = None if self._old is None else self._old[self._at :]
        if isinstance(self._old, list):
            self._old[self._at :] = [None] * (len(self._old) - self._at)
        outputs, parts = [], x.split(frames, dim=2)
        for i, part in enumerate(parts):
            more = i + 1 < len(parts)
            feat_cache = FeatureCache(old, keep=self._keep or more, last=self.last and not more)
            outputs.append(run(part, feat_cache))
            old = feat_cache.new
        self.new.extend(old or ())
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


class FixedFeatureCache(FeatureCache):
    """A pass whose caches stay at one place: what a layer leaves is written over what it took.

    For a step that is recorded once and replayed. All caches must be there, so it is a steady step.
    Layers read what they took before they leave anything.
    """

    def __init__(self, caches: tuple[Tensor, ...]):
        super().__init__(caches)
        self._places = caches

    def put(self, cache: Tensor) -> None:
        """As `FeatureCache.put`, by copying."""
        place = self._places[len(self.new)]
        self.new.append(place.copy_(cache))

    def leave(self, inputs: Tensor | None, frames: int = 0) -> None:
        """As `FeatureCache.leave`; `inputs` has at least so many frames."""
        assert inputs is not None
        self.put(inputs[:, :, -frames:])

    def in_parts(
        self, run: Callable[[Tensor, FeatureCache], Tensor], x: Tensor, frames: int
    ) -> Tensor:
        """As `FeatureCache.in_parts`, each stretch over the caches of the one before."""
        places = self._places[len(self.new) :]
        outputs = [run(part, FixedFeatureCache(places)) for part in x.split(frames, dim=2)]
        self.new.extend(places)
        return torch.cat(outputs, dim=2)
