"""`sora plan`: what each layout over some ranks would cost for a request."""

from __future__ import annotations

from typing import Annotated

import typer

from sora_engine.cli.app import OnceCommand, UsageError, app, say
from sora_engine.cli.options import DEFAULT_MODEL, in_options, parse_size
from sora_engine.errors import SoraError


@app.command(cls=OnceCommand)
def plan(
    model: Annotated[str, typer.Option(help="As of `sora generate`.")] = DEFAULT_MODEL,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    gpus: Annotated[int, typer.Option(help="Ranks, one a GPU.")] = 8,
    interconnect: Annotated[
        str, typer.Option(help="Of the GPUs in a node: nvlink, pcie, infiniband, ethernet.")
    ] = "nvlink",
    components: Annotated[
        str | None, typer.Option(help="Folder with the VAE of a .safetensors --model.")
    ] = None,
) -> None:
    """Predict each layout's work, bytes, memory and step time on H200s, and pick one."""
    from sora_engine.distributed.auto_layout import describe
    from sora_engine.distributed.layout_cost import H200, layouts_by_cost, with_link

    height, width = (None, None) if size is None else parse_size(size)
    try:
        shape, video = describe(model, components, height, width, frames, guidance)
        costs = layouts_by_cost(gpus, shape, video, with_link(H200, interconnect))
    except SoraError as error:
        raise UsageError(in_options(error)) from error
    tokens = sum(video.tokens(length) for _, length in video.spans())
    say(f"{tokens} tokens a branch in {len(video.spans())} windows; predicted, not measured:")
    say(f"{'layout':<40}{'TFLOP':>9}{'MB sent':>10}{'GB held':>9}{'s a step':>10}")
    for cost in costs:
        say(
            f"{cost.layout!s:<40}{cost.flops / 1e12:>9.2f}{cost.largest_sent / 1e6:>10.1f}"
            f"{cost.memory_bytes / 1e9:>9.1f}{cost.step_s:>10.4f}"
        )
    say(f"take --parallel {','.join(str(costs[0].layout).split())}" if gpus > 1 else "one rank")
