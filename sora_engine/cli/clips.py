"""The commands that begin with a picture or a clip: `sora animate`, `sora extend`, ..."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_engine.cli.app import UsageError
from sora_engine.cli.options import CameraMoves, Common, Frames, Prompt, Strength
from sora_engine.cli.work import Command, video_command

if TYPE_CHECKING:
    from sora_engine.request.request import VideoRequest
    from sora_engine.request.tasks import ModelFacts

ClipFile = Annotated[str, typer.Argument(help="A video, an animation, or a folder of PNGs.")]
Gap = Annotated[float, typer.Option(metavar="SECONDS", help="How long the new part is.")]


def _plan(
    task: Callable[..., VideoRequest],
    *given: Any,
    prompt: str | None,
    common: Common,
    **options: Any,
) -> Command:
    """The plan of a function of `tasks`; what is a string among `given` is a file to be read."""
    from sora_engine.request.request import VideoRequest

    settings = common.settings()

    def build(model: ModelFacts, _make: object) -> VideoRequest:
        return task(model, *given, prompt, **options, **settings)

    files = tuple(value for value in given if isinstance(value, str))
    return Command(common, VideoRequest(prompt or "", **settings), build, files)


_FILE_SUFFIXES = {".mp4", ".gif", ".webp", ".png", ".jpg", ".jpeg", ".mov", ".mkv", ".webm", ".avi"}


@video_command
def animate(
    image: Annotated[str, typer.Argument(help="The picture that is the first frame.")],
    prompt: Prompt = None,
    frames: Frames = None,
    camera: CameraMoves = None,
    *,
    common: Common,
) -> Command:
    """Make a video that begins with a picture."""
    from sora_engine import tasks

    options = {"num_frames": frames, "camera": camera}
    command = _plan(tasks.animate, image, prompt=prompt, common=common, **options)
    return command._replace(early=replace(command.early, camera=camera))


@video_command
def extend(
    clip: ClipFile,
    before: Annotated[
        float, typer.Option(metavar="SECONDS", help="How much is added at the beginning.")
    ] = 0.0,
    after: Annotated[
        float, typer.Option(metavar="SECONDS", help="How much is added at the end.")
    ] = 0.0,
    prompt: Prompt = None,
    *,
    common: Common,
) -> Command:
    """Make a clip longer, at either end or at both."""
    from sora_engine import tasks

    return _plan(tasks.extend, clip, prompt=prompt, common=common, before_s=before, after_s=after)


@video_command
def loop(
    target: Annotated[str, typer.Argument(metavar="PROMPT|CLIP", help="Words, or a clip's file.")],
    gap: Gap = 1.0,
    prompt: Prompt = None,
    frames: Frames = None,
    *,
    common: Common,
) -> Command:
    """Make a video without a seam: from words, or from a clip that is led back to its beginning."""
    from sora_engine import tasks
    from sora_engine.request.request import VideoRequest

    path = Path(target)
    looks_like_a_file = path.suffix.lower() in _FILE_SUFFIXES and " " not in target
    if looks_like_a_file or path.exists():
        if frames is not None:
            raise UsageError("--frames: a clip's loop is as long as the clip and its --gap")
        return _plan(tasks.loop, target, prompt=prompt, common=common, gap_s=gap)
    if not target.strip():
        raise UsageError("the prompt is empty")
    if prompt is not None:
        raise UsageError(f"--prompt: {target!r} is no file and so the prompt already; drop one")
    request = VideoRequest(target, num_frames=frames, loop=True, **common.settings())
    return Command(common, request, lambda _model, _make: request)


@video_command
def connect(
    first: ClipFile,
    second: ClipFile,
    gap: Gap = 1.0,
    prompt: Prompt = None,
    *,
    common: Common,
) -> Command:
    """Lead from one clip to another."""
    from sora_engine import tasks

    return _plan(tasks.connect, first, second, prompt=prompt, common=common, gap_s=gap)


@video_command
def fill(
    clip: ClipFile,
    missing: Annotated[
        str, typer.Option(metavar="RANGES", help="Frames that are made anew: 4-7,12.")
    ],
    prompt: Prompt = None,
    *,
    common: Common,
) -> Command:
    """Make the missing frames of a clip."""
    from sora_engine import tasks

    ranges = tasks.parse_ranges(missing)
    return _plan(tasks.fill, clip, ranges, prompt=prompt, common=common)


@video_command
def inpaint(
    clip: ClipFile,
    mask: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="An image or a video of the clip's size, white where the clip is made anew.",
        ),
    ],
    prompt: Prompt = None,
    *,
    common: Common,
) -> Command:
    """Make a part of a clip's picture anew."""
    from sora_engine import tasks

    return _plan(tasks.inpaint, clip, mask, prompt=prompt, common=common)


@video_command
def edit(
    clip: ClipFile,
    prompt: Prompt = None,
    strength: Strength = 0.6,
    *,
    common: Common,
) -> Command:
    """Change a clip to fit a prompt, and keep its layout."""
    from sora_engine import tasks

    return _plan(tasks.edit, clip, prompt=prompt, common=common, strength=strength)


@video_command
def upscale(
    clip: ClipFile,
    scale: Annotated[
        float | None, typer.Option(help="How many times each side, 2 by default; or give --size.")
    ] = None,
    prompt: Prompt = None,
    strength: Strength = 0.4,
    *,
    common: Common,
) -> Command:
    """Make a clip larger, with its detail drawn anew."""
    from sora_engine import tasks

    return _plan(tasks.upscale, clip, prompt=prompt, common=common, scale=scale, strength=strength)
