"""A checkpoint and a request as the planner takes them, from their configurations alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

from sora_engine.config import Limits, ParallelConfig
from sora_engine.denoise.denoise import windows_of
from sora_engine.denoise.windows import WindowPlan
from sora_engine.distributed.layout_cost import Transformer, Video, plan
from sora_engine.models.loading import find_checkpoint, planning_facts
from sora_engine.models.wan.config import WanConfig
from sora_engine.request.request import (
    GenerationDefaults,
    LatentGrid,
    ResolvedRequest,
    VideoRequest,
    resolve_request,
)


def describe(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    components: str | PathLike[str] | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    guidance_scale: float | None,
) -> tuple[Transformer, Video]:
    """Raises CheckpointError and RequestError."""
    checkpoint, folder, _ = find_checkpoint(path, components)
    config = checkpoint.transformer.config
    grid, defaults, text_tokens = planning_facts(checkpoint, folder)
    request = resolve_request(
        VideoRequest(
            "", height=height, width=width, num_frames=num_frames, guidance_scale=guidance_scale
        ),
        defaults,
        grid,
        Limits(),
    )
    shape = transformer_of(config, text_tokens=text_tokens)
    return shape, video_of(request, grid, defaults)


def transformer_of(config: WanConfig, *, text_tokens: int, bytes_each: int = 2) -> Transformer:
    """The planner's view of a transformer's configuration."""
    return Transformer(
        layers=config.num_layers,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        ffn=config.ffn_dim,
        patch_channels=config.out_channels * math.prod(config.patch_size),
        text_tokens=text_tokens,
        bytes_each=bytes_each,
        cross_attn_norm=config.cross_attn_norm,
    )


def video_of(request: ResolvedRequest, grid: LatentGrid, defaults: GenerationDefaults) -> Video:
    """The planner's view of a request: of chained windows, which wait for each other, one."""
    channels, frames, height, width = grid.shape(
        request.height, request.width, request.num_frames, loop=request.loop
    )
    plan = windows_of(request, defaults, frames)
    window: dict[str, Any] = {}
    if isinstance(plan, WindowPlan) and plan.schedule == "chained":
        frames = min(frames, plan.length) if plan.holds(frames) else plan.span
    elif isinstance(plan, WindowPlan):
        window = {"window": plan.length, "overlap": plan.overlap}
    return Video(
        frames=frames,
        height=height,
        width=width,
        channels=channels,
        patch=grid.patch,
        guided=request.guidance_scale > 1,
        **window,
    )


def auto_layout(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    components: str | PathLike[str] | None,
    num_ranks: int,
) -> ParallelConfig:
    """The layout that `parallel="auto"` stands for: the best for the checkpoint's own defaults."""
    model, video = describe(path, components, None, None, None, None)
    return plan(num_ranks, model, video)[0].layout
