"""The video of a job, and its receipt: how it was computed."""

from __future__ import annotations

import torch

from sora_engine.runtime.executor import AnyExecutor
from sora_engine.runtime.job import Job
from sora_engine.video import Receipt, Video


def video_of(job: Job, frames: torch.Tensor, executor: AnyExecutor) -> Video:
    """What became of a job: its frames (uint8 `[n, height, width, 3]`), and all that tells of
    them."""
    request = job.request
    return Video(
        frames=frames.numpy(),
        latents=torch.empty(0, dtype=torch.float32) if job.latents is None else job.latents,
        fps=request.fps,
        seed=request.seed,
        timings_s=job.timings_s,
        provenance=job.provenance,
        receipt=receipt_of(job, executor),
    )


def receipt_of(job: Job, executor: AnyExecutor) -> Receipt:
    """What computed the video of a job that has been decoded."""
    request, model = job.request, executor.model
    return Receipt(
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        vae=executor.vae_name,
        vae_dtype=str(model.vae_dtype).removeprefix("torch."),
        ops=executor.ops(),
        solver=job.canvas.solver_name,
        seed=request.seed,
        noise="seed" if request.latents is None else "given",
        most_in_company=job.most_in_company,
        largest_batch_tokens=job.largest_batch_tokens,
        vae_tiles=executor.tiles_used(request.canvas_height, request.canvas_width),
        canvas=request.canvas,
        resumed_at=job.resumed_at,
        promised_bytes=None if job.plan is None else job.plan.peak,
        cut_prompts=list(job.cut_prompts),
        chosen=dict(model.chosen),
        quantised=dict(model.quantised),
        lossy=dict(model.lossy),
        texts_reused=job.canvas.texts_reused,
        camera=None if request.camera is None else str(request.camera),
        loras=[str(record) for record in (*model.loras, *request.loras)],
    )
