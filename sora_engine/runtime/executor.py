"""What a worker has done to its jobs, by the process's own model: between encoding and frames."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from sora_engine.denoise.canvas import Canvas
from sora_engine.denoise.denoise import decoding, denoise_step, preparing
from sora_engine.denoise.packing import Packer
from sora_engine.models.video_model import VideoModel
from sora_engine.request.request import ResolvedRequest
from sora_engine.runtime.job import Job
from sora_engine.runtime.receipt import backends_of
from sora_engine.runtime.saturation import saturation_point
from sora_engine.runtime.savepoint import Savepoint, tensors_of


class Stages:
    """What a worker has done to its jobs, by this process's own model.

    `distributed.remote.RemoteStages` has it done by ranks.
    """

    def __init__(self, model: VideoModel) -> None:
        self.model = model
        self._packer = Packer(model.grid.patch, model.device)

    def preparing(self, request: ResolvedRequest) -> Generator[None, None, Canvas]:
        """See `denoise.preparing`."""
        return preparing(request, self.model)

    def resuming(self, saved: Savepoint) -> Generator[None, None, Canvas]:
        """As `preparing`, of a job that was saved."""
        yield
        return saved.canvas(self.model)

    def state_of(self, canvas: Canvas) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
        """What is saved of a canvas: its tensors, and which text each frame reads."""
        return tensors_of(canvas), canvas.prompts.frame_texts

    def step(self, jobs: list[Job], max_tokens: int) -> dict[Job, Exception]:
        """See `denoise.denoise_step`."""
        return denoise_step(jobs, self.model, self._packer, max_tokens)

    def decoding(self, canvas: Canvas) -> Iterator[torch.Tensor | None]:
        """See `denoise.decoding`. Of what `Video.latents` keeps: `sora decode` makes the same bits.

        The canvas stays as it is: saved now, the job is resumed from what was denoised.
        """
        kept = self.model.vae.denormalise(canvas.latents[None]).float().cpu()
        latents = self.model.vae.normalise(kept)[0].to(canvas.latents)
        return decoding(latents, self.model, wraps=canvas.wraps)

    def pack_limit(self, most: int) -> int:
        """Tokens a batch beyond which a larger one is no faster."""
        return saturation_point(self.model, most)

    def ops(self) -> dict[str, list[str]]:
        """The backends that served."""
        return backends_of(self.model)

    def forget(self, job: Job) -> None:
        """A job is done with."""

    def clear(self) -> None:
        """Forget what depends on the composition of batches."""
        self._packer.clear()

    def close(self) -> None:
        """No job will come."""
