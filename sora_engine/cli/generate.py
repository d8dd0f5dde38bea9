"""`sora generate` and `sora image`: videos and pictures from words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_engine.cli.app import UsageError
from sora_engine.cli.options import DEFAULT_MODEL, CameraMoves, Common, Frames, as_option
from sora_engine.cli.work import Command, video_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from sora_engine.io.provenance import Provenance
    from sora_engine.request.request import VideoRequest
    from sora_engine.request.tasks import ModelFacts
    from sora_engine.video import Video

    Make = Callable[[VideoRequest], Video]


@video_command
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    frames: Frames = None,
    image: Annotated[str | None, typer.Option(help="An image that is the first frame.")] = None,
    camera: CameraMoves = None,
    loop: Annotated[bool, typer.Option("--loop", help="Its end joins its beginning.")] = False,
    shot: Annotated[
        list[str] | None, typer.Option(help="A shot's prompt, in place of PROMPT; repeat it.")
    ] = None,
    shot_frames: Annotated[
        list[int] | None, typer.Option(help="The number of frames of each --shot, in order.")
    ] = None,
    draft: Annotated[
        bool,
        typer.Option("--draft", help="A half-size draft in half the steps, then the full size."),
    ] = False,
    cascade: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            help="A further pass over the video, such as scale=2,strength=0.4 or frames=2; repeat "
            "it.",
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="VIDEO", help="Make this video again; other options given are changes to it."
        ),
    ] = None,
    *,
    common: Common,
) -> Command:
    """Make a video from words.

    What is not given is as the checkpoint sets it.
    """
    from sora_engine import tasks
    from sora_engine.request.request import Clip, VideoRequest

    settings = common.settings()
    if frames is not None:
        settings["num_frames"] = frames
    if image is not None:
        settings["clips"] = (Clip(image, at=0),)
    if camera is not None:
        settings["camera"] = camera
    if loop:
        settings["loop"] = True
    if shot or shot_frames:
        if prompt is not None:
            raise UsageError(f"--shot: its prompts take the place of PROMPT {prompt!r}; drop one")
        made = tasks.shots(shot or (), shot_frames or ())
        prompt, settings["shots"] = made.prompt, made.shots
    if like is not None:
        if draft:
            raise UsageError(f"--draft: --like makes {like} again as it was made; drop one")
        return _like(like, prompt, settings, common)
    if prompt is None:
        raise UsageError("there is no prompt; say what the video shows, as PROMPT or by --shot")
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    request = VideoRequest(prompt, **settings)
    if cascade:
        if draft:
            raise UsageError("--draft: --cascade says which passes there are; drop one")
        return _cascade(request, cascade, common, () if image is None else (image,))

    def build(model: ModelFacts, make: Make) -> VideoRequest:
        if not draft:
            return request
        return tasks.refine(request, make(tasks.draft(model, request)))

    return Command(common, request, build, () if image is None else (image,))


@video_command
def image(
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="The class that it shows, by number or name, of a model that makes classes.",
        ),
    ] = None,
    *,
    common: Common,
) -> Command:
    """Make one picture from words, or of a class."""
    from sora_engine import tasks

    if label is not None and prompt is not None:
        raise UsageError(f"--label: it takes the place of PROMPT {prompt!r}; drop one")
    if label is None and prompt is None:
        raise UsageError("there is no prompt; say what the picture shows, as PROMPT or by --label")
    if not (label or prompt or "").strip():
        raise UsageError(f"the {'prompt' if label is None else 'label'} is empty")
    settings = common.settings() | ({} if label is None else {"label": label})
    request = tasks.image(prompt or "", **settings)
    return Command(common, request, lambda _model, _make: request, output="out.png")


def _cascade(
    request: VideoRequest, stages: list[str], common: Common, files: tuple[str, ...]
) -> Command:
    """The plan of a video in several passes, of which the last one writes the file."""
    from sora_engine import tasks
    from sora_engine.request.cascade import staged

    plan = tasks.cascade(request, [tasks.Stage.parse(text) for text in stages])

    def build(model: ModelFacts, make: Make) -> VideoRequest:
        asked = plan.base
        for stage in plan.stages:
            made = make(asked)
            frames, height, width, _ = made.frames.shape
            base = replace(plan.base, seed=made.seed)
            asked = staged(stage, base, made, (height, width, frames), made.fps, model)
        return asked

    return Command(common, request, build, files)


def _like(path: str, prompt: str | None, changes: dict[str, Any], common: Common) -> Command:
    """The plan of a video that is made again from what its file says."""
    from sora_engine.io.provenance import read_provenance
    from sora_engine.request.recipe import loras_of
    from sora_engine.request.request import VideoRequest

    provenance = read_provenance(path)
    if provenance is None:
        raise UsageError(f"--like: {path} does not say how it was made; only files of `sora` do")
    if prompt is not None:
        changes = {**changes, "prompt": prompt, "original_prompt": None}
    if not common.models():
        if provenance.model != DEFAULT_MODEL:
            raise UsageError(f"--like: {path} was made by {provenance.model!r}; name it by --model")
        common = replace(common, model=[DEFAULT_MODEL])
    made = provenance.settings
    if common.lora is None:
        found = loras_of(provenance, folder=Path(path).parent)
        common = replace(common, lora=[as_option(lora) for lora in found])
    if common.dtype == "auto":
        common = replace(common, dtype=str(made.get("dtype", "auto")))
    if common.vae_dtype == "auto":
        common = replace(common, vae_dtype=str(made.get("vae_dtype", "auto")))

    def build(model: ModelFacts, make: Make) -> VideoRequest:
        from sora_engine.request.recipe import request_of

        _check_model(path, provenance, model)
        request = request_of(provenance, make, folder=Path(path).parent)
        if "ladder" in changes:  # another one, or none: its levels go with it
            request = replace(
                request, sigmas=None, num_inference_steps=None, shift=None, solver=None
            )
        return replace(request, **changes)

    return Command(common, VideoRequest(**{"prompt": "", **changes}), build, (path,))


def _check_model(path: str, provenance: Provenance, model: ModelFacts) -> None:
    made_by = provenance.settings.get("model_hash")
    found = getattr(model, "weights_hash", made_by)
    if found != made_by:
        raise UsageError(
            f"--like: {path} was made by weights {made_by} of {provenance.model!r}; "
            f"this model's are {found}"
        )
