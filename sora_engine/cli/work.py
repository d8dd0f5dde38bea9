"""One job of the command line: checked, made, and followed to its end."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from sora_engine.cli.app import OnceCommand, UsageError, app, one_line, say, warn
from sora_engine.cli.options import (
    Common,
    absolute,
    absolute_parts,
    in_options,
    model_path,
    must_exist,
    named,
    parse_parallel,
)
from sora_engine.cli.safety_copy import SafetyCopy
from sora_engine.cli.signing import check_watermark, credentials_of, watermark_of
from sora_engine.config import Limits
from sora_engine.errors import MediaError, RequestError, SoraError
from sora_engine.request import (
    GenerationDefaults,
    KnownMode,
    LatentGrid,
    ModelFacts,
    ResolvedRequest,
    VideoRequest,
    resolve_request,
)
from sora_engine.request.labels import Labels
from sora_engine.version import version

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sora_engine.runtime.engine import Engine
    from sora_engine.runtime.job import Job
    from sora_engine.video import Video

Build = Callable[[ModelFacts, "Callable[[VideoRequest], Video]"], VideoRequest]
"""What a command leaves to be done: the request, once the model is known, and given a way to make
the videos that it starts from."""


class Command(NamedTuple):
    """What a command has made of its own options.

    early: what is known of the request before the model is. files: what it will read.
    """

    common: Common
    early: VideoRequest
    build: Build
    files: tuple[str, ...] = ()
    output: str = "out.mp4"


def video_command(function: Callable[..., Command]) -> Callable[..., None]:
    """Registers a command that makes a video: its own options, and those of `Common`."""
    own = [
        parameter
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.name != "common"
    ]
    hints = get_type_hints(Common, include_extras=True)
    shared = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
        )
        for f in fields(Common)
    ]

    def command(**values: Any) -> None:
        common = Common(**{f.name: values.pop(f.name) for f in fields(Common)})
        try:
            made = function(**values, common=common)
        except SoraError as error:
            raise UsageError(in_options(error)) from error
        run(made)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    app.command(cls=OnceCommand)(command)
    return command


def run(command: Command) -> None:
    """Makes the video of a command, from its checks to the line that tells what was made."""
    common = command.common
    # Others than torchrun set a RANK too, and not always to a number.
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("RANK", "0")) > 0:
        from sora_engine.distributed.torchrun import serve

        raise SystemExit(serve())  # torchrun's rank 0 is the engine, and writes
    if common.upsample_model is not None and common.upsample is None:
        raise UsageError("--upsample-model: it names the model at an --upsample, and there is none")
    output = common.output if common.output is not None else command.output
    check_before_loading(command, output)
    if not common.models():
        say(
            f"sora_engine {version()}: loading sprites, the bundled checkpoint of plain shapes "
            "that move (--model for others)"
        )
    else:
        for path in common.models():
            must_exist(path)
        say(f"sora_engine {version()}: loading {named(model_path(common.models()))}")
    started = time.monotonic()
    engine = load_engine(common)
    load_s = time.monotonic() - started
    with closing(engine):
        try:
            request = command.build(engine.model, partial(make_first, engine))
            if common.upsample is not None:
                request = rewritten(request, common)
            resolved = engine.resolve(request)
        except (RequestError, MediaError) as error:
            raise UsageError(in_options(error)) from error
        settings = f"{resolved.width}x{resolved.height}, {resolved.num_frames} frames"
        if resolved.canvas is not None:
            say(f"{settings} are the middle of what the model makes, {resolved.canvas}")
        say(f"making {settings}, {resolved.num_inference_steps} steps, seed {resolved.seed}")
        try:
            job = make(engine, request, resolved, output, common)
        except RequestError as error:  # what shows only once the clips are read
            raise UsageError(in_options(error)) from error
    times_s = {
        "load": load_s,
        "encode": job.timings_s["encoding"],
        "denoise": job.timings_s["denoising"],
        "decode": job.timings_s["decoding"],
    }
    times = ", ".join(f"{stage} {time_s:.1f} s" for stage, time_s in times_s.items())
    say(f"{output}: {settings} at {resolved.fps:g} fps, seed {resolved.seed} ({times})")


class _AnyModel(NamedTuple):
    """Stands for any model: the engine's own rules, less those of a model's grid."""

    grid: LatentGrid = LatentGrid(channels=1, vae_spatial=1, patch=(1, 1, 1), time=1)
    defaults: GenerationDefaults = GenerationDefaults(
        height=1, width=1, num_frames=1, fps=1.0, num_inference_steps=1000, guidance_scale=1.0
    )
    known_mode: KnownMode = KnownMode.NOISE_LEVEL
    labels: Labels = Labels(count=None)


def check_before_loading(command: Command, output: str) -> None:
    """Everything that can be told without the model: no one waits for torch to learn of a typo."""
    from sora_engine.io.video_reader import open_video, read_video
    from sora_engine.io.video_writer import check_output

    for path in command.files if command.common.output is None else ():
        with suppress(OSError):
            if os.path.samefile(path, output):
                raise UsageError(f"--output: {path} would be written over; name another file")
    command.common.loras()
    credentials_of(*command.common.signing())
    check_watermark(command.common.watermark)
    try:
        check_output(output, num_frames=command.early.num_frames, fps=command.early.fps)
        for path in command.files:
            if not path or Path(path).is_dir():
                read_video(path, max_frames=1)
            elif read_first_image(path) is None:
                open_video(path).close()
        # Ladders are a family's, and no family is known yet.
        resolve_request(replace(command.early, ladder=""), _AnyModel(), Limits())
    except SoraError as error:
        raise UsageError(in_options(error)) from error


def read_first_image(path: str) -> np.ndarray | None:
    """The picture of an image file; None for a file that is none."""
    from sora_engine.io.images import decode, open_image

    image = open_image(Path(path))
    if image is None:
        return None
    with image:
        return decode(image, path)


def load_engine(common: Common) -> Engine:
    """The engine of the model that was asked for."""
    from sora_engine.runtime.engine import Engine

    try:
        return Engine.from_pretrained(
            model_path(common.models()),
            parallel=None if common.parallel is None else parse_parallel(common.parallel),
            components=common.parts(),
            device=common.device,
            dtype=common.dtype,
            vae_backend=common.decoder(),
            vae_dtype=common.vae_dtype,
            exact=common.exact,
            offload=common.offload,
            loras=common.loras(),
        )
    except SoraError as error:
        raise UsageError(in_options(error)) from error


def rewritten(request: VideoRequest, common: Common) -> VideoRequest:
    """The request with its prompt by a language model, which is shown."""
    from sora_engine.text.upsampling import open_upsampler, upsample

    assert common.upsample is not None
    try:
        upsampler = open_upsampler(
            common.upsample,
            model=common.upsample_model,
            api_key=os.environ.get("SORA_UPSAMPLER_KEY"),
        )
        request = upsample(request, upsampler)
    except SoraError as error:
        raise UsageError(f"--upsample: {error}") from error
    say(f"prompt: {request.prompt}")
    return request


def make_first(engine: Engine, request: VideoRequest) -> Video:
    """Makes a video that another one starts from."""
    job = engine.submit(request)
    r = job.request
    say(f"making {r.width}x{r.height}, {r.num_frames} frames, {r.num_inference_steps} steps first")
    try:
        follow(job)
    except BaseException:
        job.cancel()
        raise
    return job.result()


def make(
    engine: Engine, request: VideoRequest, resolved: ResolvedRequest, output: str, common: Common
) -> Job:
    """Runs one job to its end, frames going into the file as they are decoded.

    The finished latents are kept in a file until the video is whole: see `SafetyCopy`.
    """
    from sora_engine.io.latents import SavedLatents
    from sora_engine.io.video_writer import VideoWriter
    from sora_engine.request.recipe import provenance_of
    from sora_engine.request.sources import sources_of

    provenance = provenance_of(resolved, engine.model)
    credentials = credentials_of(*common.signing())
    try:
        writer = VideoWriter(
            output,
            resolved.fps,
            num_frames=resolved.num_frames,
            provenance=provenance,
            credentials=credentials,
            sources=() if credentials is None else sources_of(resolved),
            watermark=watermark_of(common.watermark, resolved.height, credentials is not None),
        )
    except MediaError as error:
        raise UsageError(in_options(error)) from error

    def write(frames: np.ndarray) -> None:
        for frame in frames:
            writer.write(frame)

    def saved(latents: Tensor) -> SavedLatents:
        return SavedLatents(
            latents,
            resolved.fps,
            resolved.loop,
            absolute(model_path(common.models())),
            provenance,
            absolute_parts(common.parts()),
            size=None
            if resolved.canvas is None
            else (resolved.num_frames, resolved.height, resolved.width),
        )

    copy = SafetyCopy(output, saved)
    request = replace(request, seed=resolved.seed)
    job: Job | None = None
    try:
        with writer:
            job = engine.submit(request, on_frames=write, on_latents=copy.keep)
            try:
                follow(job)
            except BaseException:
                job.cancel()
                with suppress(Exception):
                    job.result()  # the engine must have let go of the file before it is removed
                raise
    except BaseException:  # also what comes while the file is finished, and a second Ctrl-C
        if job is not None:
            copy.offer(job.latents)
        raise
    copy.remove()
    return job


def follow(job: Job) -> None:
    """Shows a job's finished steps and decoded frames until it is done; raises its error."""
    if sys.stdout is None or not sys.stdout.isatty():
        return _follow_in_lines(job)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn()) as bars:
        denoise = bars.add_task("denoise", total=job.progress.num_steps)
        decode = bars.add_task("decode ", total=job.progress.num_frames, start=False)
        untold = _cut_prompts(job)
        while True:
            try:
                done = _wait(job, 0.1)
            finally:
                for line in next(untold):
                    told_line = one_line(f"warning: {line}")
                    bars.console.print(told_line, markup=False, highlight=False)
            progress = job.progress
            bars.update(denoise, completed=progress.steps_done, total=progress.num_steps)
            if progress.frames_decoded or progress.state == "decoding":
                bars.start_task(decode)
            bars.update(decode, completed=progress.frames_decoded)
            if done:
                return


def _follow_in_lines(job: Job) -> None:
    """The same for a log file: a line at each tenth of a stage, and at its end."""
    shown: dict[str, int] = {}
    untold = _cut_prompts(job)
    while True:
        try:
            done = _wait(job, 0.05)
        finally:
            for line in next(untold):
                warn(line)
        progress = job.progress
        for name, count, total in (
            ("denoise", progress.steps_done, progress.num_steps),
            ("decode", progress.frames_decoded, progress.num_frames),
        ):
            before = shown.get(name, 0)
            if count > before and (count == total or (count - before) * 10 >= total):
                say(f"{name} {count}/{total}")
                shown[name] = count
        if done:
            return


def _cut_prompts(job: Job) -> Iterator[Sequence[str]]:
    """What is to be told of prompts that were cut: nothing until that is known, then each line
    once. Of a job that fails at once, too."""
    while not job.cut_prompts:
        yield ()
    yield job.cut_prompts
    while True:
        yield ()


def _wait(job: Job, timeout_s: float) -> bool:
    """Whether the job completed within the time; raises its error."""
    try:
        job.result(timeout_s)
    except TimeoutError:
        if not job.done():
            return False
        job.result()  # done in the meantime, or failed by a TimeoutError of its own
    return True
