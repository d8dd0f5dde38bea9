"""Noise as a pure function of its seed, drawn on the CPU so that every device has the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from sora_engine.errors import RequestError

TORCH_SEEDS = 2**32
"""So many seeds a CPU generator of torch tells apart: of a larger one it takes the lower bits."""


def initial_noise(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """float32 noise of `shape`; every bit of `seed`, from 0 to 2**63 - 1, counts.

    Below 2**32 these are the numbers that diffusers draws for a CPU generator of `seed`. From there
    on, where those would begin anew, they are `numpy.random.RandomState`'s for the seed's lower and
    upper 32 bits, whose stream NumPy has frozen (NEP 19).
    """
    if seed < TORCH_SEEDS:
        return _randn(shape, torch.Generator("cpu").manual_seed(seed))
    drawn = np.random.RandomState([seed % TORCH_SEEDS, seed // TORCH_SEEDS])
    return torch.from_numpy(drawn.standard_normal(tuple(shape)).astype(np.float32))


def noise_for(seed: int, step: int, shape: Sequence[int]) -> torch.Tensor:
    """float32 noise of `shape` for one step of one request.

    The same (seed, step, shape) gives the same noise whatever else was drawn before, on whichever
    device the request runs and from wherever it is taken up again. Steps are independent of each
    other and of `initial_noise(seed)`.
    """
    return _randn(shape, _generator("step", seed, step))


def resampling_noise(seed: int, step: int, visit: int, shape: Sequence[int]) -> torch.Tensor:
    """As `noise_for`, for the way back before the `visit`th time that a step is taken again."""
    return _randn(shape, _generator(f"resample {visit}", seed, step))


def free_noise(
    seed: int, shape: Sequence[int], *, window: int, stride: int, wrap: bool = False
) -> torch.Tensor:
    """Initial noise for a long video denoised in windows (FreeNoise, arXiv 2310.15169).

    shape: [channels, frames, height, width], in latents; float32. The first `window` frames are
    `initial_noise(seed)` of that length. Each `stride` frames after them are a shuffle of the
    `stride` frames one window earlier, so that every window that starts at a multiple of `stride`
    holds the same frames of noise, each once, in its own order: windows agree on what they show.
    wrap: time is a loop. What is left after the last whole window is then fresh noise, since a
    repeat of it could meet its original across the seam.
    Raises RequestError unless 1 <= stride <= window.
    """
    channels, frames, height, width = shape
    if not 1 <= stride <= window:
        raise RequestError(f"stride = {stride} must lie between 1 and the window's {window} frames")
    if frames <= window:
        return initial_noise(seed, shape)
    base = initial_noise(seed, (channels, window, height, width))
    repeated = frames - frames % window if wrap else frames
    order = list(range(window))
    generator = _generator("free", seed, 0)
    while len(order) < repeated:
        block = order[len(order) - window :][:stride]
        order += [block[j] for j in _shuffled(stride, generator)]
    noise = base[:, order[:repeated]]
    if repeated == frames:
        return noise
    tail = (channels, frames - repeated, height, width)
    return torch.cat([noise, _randn(tail, _generator("tail", seed, 0))], dim=1)


def _generator(stream: str, seed: int, step: int) -> torch.Generator:
    """A generator whose stream is unrelated to those of neighbouring seeds and steps."""
    digest = hashlib.blake2b(f"{stream}:{seed}:{step}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def _randn(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    # Both are said: a host may have changed torch's defaults.
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    return [int(i) for i in torch.randperm(count, generator=generator, device="cpu")]
