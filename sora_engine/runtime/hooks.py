"""What a service may put between callers and the engine: refusing requests, checking frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from sora_engine.request import ResolvedRequest


@dataclass(frozen=True, slots=True)
class FrameSpan:
    """Which frames of which request a hook is shown: the result's `start` to `stop - 1`."""

    request: ResolvedRequest
    start: int
    stop: int


RequestHook = Callable[["ResolvedRequest"], None]
FramesHook = Callable[["np.ndarray", FrameSpan], "np.ndarray"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Two callables of a service, either of which may be None. Each refuses by raising
    RefusedError, whose message the caller sees.

    check_request: called with each request (prompts, shots, clips), its defaults filled in, in the
        thread that submits or resumes it, before it is queued. What it raises, RefusedError or
        another exception, comes out of `submit` or `resume` as it is.
    check_frames: called with frames (uint8 `[n, height, width, 3]`) as they are decoded, in order,
        on the engine's thread; what it returns, of the same shape and dtype, goes on to the caller.
        What it raises fails the job, and `Job.result` raises it: RefusedError (and any other
        SoraError) as it is; MemoryError as JobMemoryError; any other exception, and a result of
        another shape or dtype, as JobFailedError, whose cause it is. Frames that passed before have
        gone on to `on_frames`. No latents and no previews are given to the caller; files that
        `Job.save` and `save_to` write hold the job's latents all the same.
    """

    check_request: RequestHook | None = None
    check_frames: FramesHook | None = None

    def pass_frames(self, frames: np.ndarray, span: FrameSpan) -> np.ndarray:
        """The frames that may leave; raises RefusedError, or TypeError for a hook's bad result."""
        if self.check_frames is None:
            return frames
        passed = self.check_frames(frames, span)
        shape, dtype = getattr(passed, "shape", None), getattr(passed, "dtype", None)
        if shape != frames.shape or dtype != frames.dtype:
            raise TypeError(
                f"check_frames must return {frames.dtype} {list(frames.shape)}, got {dtype} {shape}"
            )
        return passed
