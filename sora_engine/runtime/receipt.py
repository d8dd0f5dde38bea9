"""The receipt of a job: how its video was computed."""

from __future__ import annotations

from sora_engine.runtime.executor import AnyExecutor
from sora_engine.runtime.job import Job
from sora_engine.video import Receipt


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
    )
