"""The layout that suits a checkpoint best, from its configurations alone."""

from __future__ import annotations

import math
from typing import Any

from sora_engine.config import Limits, ParallelConfig
from sora_engine.denoise.model import TransformerShape
from sora_engine.distributed.layout_cost import TransformerCost, VideoCost, layouts_by_cost
from sora_engine.errors import LayoutError
from sora_engine.models.family import Checkpoint
from sora_engine.models.registry import Components, ModelPath, open_checkpoint
from sora_engine.request import (
    LatentGrid,
    ResolvedRequest,
    VideoRequest,
    WindowPlan,
    resolve_request,
)


def describe(
    path: ModelPath,
    components: Components | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    guidance_scale: float | None,
) -> tuple[TransformerCost, VideoCost]:
    """A checkpoint and a request as `layout_cost` takes them. Raises CheckpointError and
    RequestError."""
    checkpoint, _ = open_checkpoint(path, components)
    request = resolve_request(
        VideoRequest(
            label=None if checkpoint.labels is None else 0,
            height=height,
            width=width,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
        ),
        checkpoint,
        Limits(),
    )
    transformer = transformer_of(checkpoint.shape, checkpoint.grid)
    return transformer, video_of(request, checkpoint.grid)


def transformer_of(
    shape: TransformerShape, grid: LatentGrid, *, bytes_each: int = 2
) -> TransformerCost:
    """What a transformer's shape costs."""
    return TransformerCost(
        layers=shape.num_layers,
        heads=shape.num_heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn_dim,
        patch_channels=shape.out_channels * math.prod(grid.patch),
        text_tokens=shape.text_tokens,
        bytes_each=bytes_each,
        cross_attn_norm=shape.cross_attn_norm,
    )


def video_of(request: ResolvedRequest, grid: LatentGrid) -> VideoCost:
    """What a request costs: of chained windows, which wait for each other, one."""
    channels, frames, height, width = request.latent_shape(grid)
    plan = request.window
    window: dict[str, Any] = {}
    if isinstance(plan, WindowPlan) and plan.schedule == "chained":
        frames = min(frames, plan.length) if plan.holds(frames) else plan.span
    elif isinstance(plan, WindowPlan):
        window = {"window": plan.length, "overlap": plan.overlap}
    return VideoCost(
        frames=frames,
        height=height,
        width=width,
        channels=channels,
        patch=grid.patch,
        guided=request.guided,
        **window,
    )


def auto_layout(
    path: ModelPath,
    components: Components | None,
    num_ranks: int,
) -> ParallelConfig:
    """The layout that `parallel="auto"` stands for: the best for the checkpoint's own defaults."""
    model, video = describe(path, components, None, None, None, None)
    shares = open_checkpoint(path, components)[0].shares_tokens
    found = [predicted.layout for predicted in layouts_by_cost(num_ranks, model, video)]
    fitting = [layout for layout in found if shares or layout.ulysses * layout.ring == 1]
    return fitting[0] if fitting else ParallelConfig(data=num_ranks)


def check_tokens(parallel: ParallelConfig, checkpoint: Checkpoint) -> None:
    """LayoutError where ranks would share the tokens of a pass and its attention does not allow
    it."""
    if not checkpoint.shares_tokens and parallel.ulysses * parallel.ring > 1:
        raise LayoutError(
            f"{parallel}: the attention of {checkpoint.family} goes within frames and along time, "
            "and ulysses and ring would cut one of them apart; guidance, window or data would work"
        )
