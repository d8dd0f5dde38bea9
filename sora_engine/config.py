"""What an engine is told once: the limits on requests and on what it does at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that hold for every request, checked before it is queued.

    max_batch_tokens: how many tokens are packed into one forward pass; a request whose single
        window is larger still runs, alone.
    """

    max_queued_jobs: int = 256
    max_running_jobs: int = 16
    max_pixels: int = 2048 * 2048
    max_frames: int = 100_000
    max_inference_steps: int = 1000
    max_prompt_chars: int = 20_000
    max_batch_tokens: int = 32_768

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Limits.{name} must be a positive integer, got {value!r}")
