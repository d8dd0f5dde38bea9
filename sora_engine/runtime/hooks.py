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


PreviewHook = Callable[["np.ndarray", "ResolvedRequest"], "np.ndarray"]
RequestHook = Callable[["ResolvedRequest"], None]
FramesHook = Callable[["np.ndarray", FrameSpan], "np.ndarray"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Callables of a service, each of which may be None. Each refuses by raising RefusedError,
    whose message the caller sees.

    check_request: called with each request (prompts, shots, clips), its defaults filled in, in the
        thread that submits or resumes it, before it is queued. What it raises, RefusedError or
        another exception, comes out of `submit` or `resume` as it is.
    check_frames: called with frames (uint8 `[n, height, width, 3]`) as they are decoded, in order,
        on the engine's thread; what it returns, of the same shape and dtype, goes on to the caller.
        What it raises fails the job, and `Job.result` raises it: RefusedError (and any other
        SoraError) as it is; MemoryError as JobMemoryError; any other exception, and a result of
        another shape or dtype, as JobFailedError, whose cause it is. Frames that passed before have
        gone on to `on_frames`. No latents are given to the caller; files that `Job.save` and
        `save_to` write hold the job's latents all the same. No previews are given either, unless
        one of the next two says that they may be.
    check_previews: called with what each step makes of the video (uint8 `[latent_frames,
        latent_height, latent_width, 3]`, see `Job.preview`) and its request, on the engine's
        thread; what it returns, of the same shape and dtype, becomes `Job.preview`. What it raises
        fails the job, as of `check_frames`.
    previews: with `check_frames` and without `check_previews`: previews are given unchecked. They
        are small, and say little that frames do not; it is the service's to decide. (Those of a
        tiny decoder are as large as frames, and nearly that.)
    """

    check_request: RequestHook | None = None
    check_frames: FramesHook | None = None
    check_previews: PreviewHook | None = None
    previews: bool = False

    def pass_frames(self, frames: np.ndarray, span: FrameSpan) -> np.ndarray:
        """The frames that may leave; raises RefusedError, or TypeError for a hook's bad result."""
        if self.check_frames is None:
            return frames
        return _alike("check_frames", frames, self.check_frames(frames, span))

    def pass_preview(
        self, preview: np.ndarray | None, request: ResolvedRequest
    ) -> np.ndarray | None:
        """The preview that may leave, if any; raises as `pass_frames`."""
        if preview is None or (
            self.check_frames is not None and self.check_previews is None and not self.previews
        ):
            return None
        if self.check_previews is None:
            return preview
        return _alike("check_previews", preview, self.check_previews(preview, request))


def _alike(name: str, given: np.ndarray, passed: np.ndarray) -> np.ndarray:
    """What a hook returned, which must be of the same shape and dtype as what it was given."""
    want = f"{given.dtype} {list(given.shape)}"
    shape, dtype = getattr(passed, "shape", None), getattr(passed, "dtype", None)
    if shape != given.shape or dtype != given.dtype:
        raise TypeError(f"{name} must return {want}, got {dtype} {shape}")
    return passed
