"""How the job of a video begins and ends: its canvas, and its frames."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from sora_engine.request.frames import crop_middle
from sora_engine.runtime.executor import AnyExecutor, ServedCanvas
from sora_engine.runtime.hooks import FrameSpan, Hooks
from sora_engine.runtime.job import Job, StageResult
from sora_engine.runtime.receipt import video_of
from sora_engine.video import Video


class VideoStages:
    """Of a job that a caller submitted: `job.Stages`."""

    brief = False
    alone = False

    def preparing(self, job: Job, executor: AnyExecutor) -> Generator[None, None, ServedCanvas]:
        """Of the request, or of the state that it was saved in."""
        if job.saved is None:
            return executor.preparing(job.request)
        saved, job.saved = job.saved, None
        return executor.resuming(saved.request, saved.state)

    def decoding(self, job: Job, executor: AnyExecutor, hooks: Hooks) -> Iterator[StageResult]:
        """Latents that the caller may have, and then the frames."""
        # Kept on the job from here on: a decode that fails does not lose them.
        latents = executor.model.vae.denormalise(job.canvas.latents[None])[0].float().cpu()
        if hooks.check_frames is None:
            job.latents = latents
            if job.options.on_latents is not None:
                job.options.on_latents(latents.clone())  # it may write into what it gets
        return _decoded(job, latents, executor, hooks)


@torch.inference_mode()
def _decoded(
    job: Job, latents: Tensor, executor: AnyExecutor, hooks: Hooks
) -> Iterator[int | Video]:
    """Decode a job's latents (`Video.latents`); yields how many frames each turn made, and last
    the video."""
    request, canvas = job.request, job.canvas
    kept = request.num_frames if job.options.keep_frames else 0
    frames = torch.empty((kept, request.height, request.width, 3), dtype=torch.uint8)
    stop = 0
    chunks = executor.decoding(canvas, latents)
    del latents
    for chunk in chunks:
        if chunk is None:
            yield 0
            continue
        start, stop = stop, min(stop + len(chunk), request.num_frames)
        cropped = crop_middle(chunk[: stop - start], request.height, request.width)
        passed = hooks.pass_frames(cropped.contiguous().numpy(), FrameSpan(request, start, stop))
        if kept:
            frames[start:stop] = torch.from_numpy(passed)
        if job.options.on_frames is not None:
            job.options.on_frames(passed)
        del chunk, cropped, passed
        job.count_frames(stop - start)
        job.tell_progress()
        if stop < request.num_frames:
            yield stop - start
    yield video_of(job, frames[:stop], executor)


OF_VIDEOS = VideoStages()
