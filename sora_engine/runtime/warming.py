"""A model's kernels compiled when it is loaded, and not while the first requests wait."""

from __future__ import annotations

import logging
import time

from sora_engine.config import Limits
from sora_engine.models.video_model import VideoModel
from sora_engine.request import ResolvedRequest, VideoRequest, resolve_request
from sora_engine.runtime.memory import MemoryPlanner
from sora_engine.samplers import SOLVERS
from sora_engine.vae.rehearsal import decode_memory
from sora_kernels.warming import Noted, Notes, warm_up

logger = logging.getLogger("sora_engine")


def compile_kernels(model: VideoModel, planner: MemoryPlanner, limits: Limits) -> int:
    """Compile what a step and the decoding of a video launch on the model's GPU, in threads.

    Returns the number of distinct calls. What a clip or an image embedding needs beside them is
    compiled with the first request that has one.
    """
    began = time.monotonic()
    calls = rehearsed_calls(model, planner, limits)
    count = warm_up(calls, model.device)
    logger.info("%d kinds of calls are compiled, %.1f s", count, time.monotonic() - began)
    return count


def rehearsed_calls(model: VideoModel, planner: MemoryPlanner, limits: Limits) -> list[Noted]:
    """The calls of small requests on meta tensors: one alone, and two unequal ones in a batch."""
    small, wide = (_small_request(model, limits, columns) for columns in (2, 3))
    with Notes() as notes:
        for requests in ([small], [small, wide]):
            planner.rehearse_step(requests)
        if model.vae.layers is not None:
            decode_memory(model.vae.config, 2, 2, model.vae_dtype)
    return list(notes.calls)


def _small_request(model: VideoModel, limits: Limits, columns: int) -> ResolvedRequest:
    unit = model.grid.vae_spatial * model.grid.patch[1]
    request = VideoRequest(
        prompt="a prompt", height=2 * unit, width=columns * unit, num_frames=1, guidance_scale=1.0
    )
    return resolve_request(request, model, limits, solvers=SOLVERS)
