"""The `sora` command.

torch is imported by the commands that need it, after their first line of output, so that `--help`,
`--version` and a mistyped option answer at once.

Exit codes: 0 done; 1 it failed at work; 2 a value on the command line is wrong (nothing was made);
130 interrupted by Ctrl-C, 143 by SIGTERM. Errors are one line on stderr.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_engine.config import Limits
from sora_engine.errors import RequestError, SoraError
from sora_engine.version import version

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sora_engine.engine import Engine
    from sora_engine.job import Job
    from sora_engine.request import ResolvedRequest, VideoRequest

INTERRUPTED = 130
TERMINATED = 143
DEFAULT_MODEL = "sprites"

app = typer.Typer(
    help="Inference for Sora-class video diffusion transformers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What the Python interface calls the values, and what the command line does.
_OPTION_OF = {
    "num_inference_steps": "--steps",
    "guidance_scale_2": "--guidance-2",
    "guidance_scale": "--guidance",
    "num_frames": "--frames",
    "negative_prompt": "--negative-prompt",
    "height": "--size",
    "width": "--size",
    "fps": "--fps",
    "shift": "--shift",
    "seed": "--seed",
    "solver": "--solver",
    "device": "--device",
    "dtype": "--dtype",
}


Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
VAEBackend = Annotated[str, typer.Option(help="auto, torch, onnx or tensorrt.")]


class UsageError(Exception):
    """A wrong value on the command line, as one line for its user."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; raises nothing."""
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        return app(args=arguments, prog_name="sora", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except typer.Abort:  # how typer passes on a Ctrl-C that came before a command ran
        return _complain("interrupted", INTERRUPTED)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except UsageError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
            return _complain(error.format_message(), 2)
        if os.environ.get("SORA_DEBUG") == "1":
            raise
        if isinstance(error, SoraError):
            return _complain(str(error), 1)
        what = f"{type(error).__name__}: {error}"
        return _complain(f"{what} (SORA_DEBUG=1 shows where)", 1)


def _complain(message: str, code: int) -> int:
    print(f"sora: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _on_terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sora_engine {version()}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help=".mp4, .gif, .webp, .png (one frame), or no suffix for a folder of PNGs.",
        ),
    ] = "out.mp4",
    model: Annotated[
        str | None,
        typer.Option(
            help="A diffusers folder, a .safetensors file, or 'sprites', the bundled checkpoint "
            "(the default).",
            show_default=False,
        ),
    ] = None,
    components: Annotated[
        str | None,
        typer.Option(help="Folder with the VAE and text encoder of a .safetensors --model."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels, such as 832x480.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    guidance_2: Annotated[
        float | None, typer.Option(help="Guidance scale of the low-noise expert.")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the initial noise; drawn at random by default.")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    solver: Annotated[
        str | None, typer.Option(help="Such as unipc or euler; the checkpoint's by default.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="An image that is the first frame.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    vae_backend: VAEBackend = "auto",
) -> None:
    """Make a video from words.

    What is not given is as the checkpoint sets it.
    """
    from sora_engine.request import Clip, VideoRequest

    if not prompt.strip():
        raise UsageError("the prompt is empty")
    height, width = (None, None) if size is None else _parse_size(size)
    request = VideoRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=frames,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=guidance_2,
        shift=shift,
        seed=seed,
        solver=solver,
        clips=() if image is None else (Clip(image, at=0),),
    )
    _check_before_loading(request, output, image)
    if model is None:
        _say(
            f"sora_engine {version()}: loading sprites, the bundled checkpoint (--model for others)"
        )
        _say("sprites is half-trained: it gets backgrounds and colours, seldom motions and shapes")
    else:
        if model != DEFAULT_MODEL and not Path(model).exists():
            raise UsageError(f"--model: {model} does not exist")
        _say(f"sora_engine {version()}: loading {model}")

    started = time.monotonic()
    model = model or DEFAULT_MODEL
    options = {"components": components, "device": device, "dtype": dtype}
    engine, resolved = _load(request, model, {**options, "vae_backend": vae_backend})
    load_s = time.monotonic() - started
    with closing(engine):
        settings = f"{resolved.width}x{resolved.height}, {resolved.num_frames} frames"
        _say(f"making {settings}, {resolved.num_inference_steps} steps, seed {resolved.seed}")
        job = _make(engine, request, resolved, output, model)
    times_s = {
        "load": load_s,
        "encode": job.timings_s["encoding"],
        "denoise": job.timings_s["denoising"],
        "decode": job.timings_s["decoding"],
    }
    times = ", ".join(f"{stage} {time_s:.1f} s" for stage, time_s in times_s.items())
    _say(
        f"{output}: {settings} at {resolved.fps:g} fps, seed {resolved.seed} ({times})",
    )


@app.command()
def decode(
    latents: Annotated[str, typer.Argument(help="A file of finished latents.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="As of `sora generate`.")
    ] = "out.mp4",
    model: Annotated[
        str | None, typer.Option(help="Whose VAE; by default the model that made the latents.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    vae_backend: VAEBackend = "auto",
) -> None:
    """Decode finished latents that an interrupted `sora generate` left."""
    from sora_engine.io.latents import SavedLatents
    from sora_engine.io.video import VideoWriter, check_output

    try:
        check_output(output)
        saved = SavedLatents.read(latents)
    except SoraError as error:
        raise UsageError(str(error)) from error
    name = model or saved.model
    _say(f"sora_engine {version()}: loading the VAE of {name}")
    started = time.monotonic()
    from sora_engine.denoise import decode as decode_frames
    from sora_engine.models.video_model import load_video_decoder

    try:
        decoder = load_video_decoder(name, device=device, dtype=dtype, vae_backend=vae_backend)
        normalised = decoder.vae.normalise(saved.latents[None])[0]
    except (SoraError, RuntimeError) as error:
        raise UsageError(f"{_in_options(error)}") from error
    total, done = saved.latents.shape[1], 0
    with VideoWriter(output, saved.fps, provenance=saved.provenance) as writer:
        for chunk in decode_frames(normalised, decoder, wraps=saved.loop):
            for frame in chunk.numpy():
                writer.write(frame)
            done += 1
            _say(f"decode {done}/{total} latent frames")
    _say(f"{output}: {saved.fps:g} fps ({time.monotonic() - started:.1f} s)")


@app.command("export-vae")
def export_vae(
    model: Annotated[str, typer.Argument(help="A checkpoint, as of `sora generate --model`.")],
    backend: Annotated[str, typer.Option(help="onnx or tensorrt.")] = "onnx",
    output: Annotated[
        str | None, typer.Option(help="Folder; by default the cache where the engine looks.")
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH,... in pixels, for TensorRT: 480x832,720x1280.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    device: Device = "auto",
) -> None:
    """Export a VAE to ONNX graphs, or build TensorRT engines from them."""
    _say(f"sora_engine {version()}: loading the VAE of {model}")
    from sora_engine.models.video_model import load_video_decoder, resolve_device, resolve_dtype
    from sora_engine.vae.backend import export_vae as export
    from sora_engine.vae.wan import WanVAE

    pixels = [_parse_size(size) for size in sizes.split(",") if size.strip()]
    try:
        target = resolve_device(device)
        vae = load_video_decoder(model, device=target, dtype="float32").vae
        assert isinstance(vae, WanVAE)
        folder = export(
            vae,
            backend,
            output,
            sizes=[(width, height) for height, width in pixels],
            dtype=resolve_dtype(dtype, target),
            device=target,
        )
    except SoraError as error:
        raise UsageError(_in_options(error)) from error
    _say(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


@app.command()
def doctor() -> None:
    """Print what was found: CPU, GPU, torch, Triton, csrc, FFmpeg, optional packages."""
    from sora_engine.doctor import report

    for name, finding in report():
        _say(f"{name:<18} {finding}")


def _parse_size(size: str) -> tuple[int, int]:
    """'832x480' -> (480, 832)."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", size)
    if match is None:
        raise UsageError(f"--size: {size!r} is not WIDTHxHEIGHT, such as 832x480")
    return int(match[2]), int(match[1])


def _check_before_loading(request: VideoRequest, output: str, image: str | None) -> None:
    """Everything that can be told without the model: no one waits for torch to learn of a typo."""
    from sora_engine.io.images import read_image
    from sora_engine.io.video import check_output
    from sora_engine.request import GenerationDefaults, LatentGrid, resolve_request

    # Stands for any model: the engine's own rules, less those of a model's grid.
    any_defaults = GenerationDefaults(
        height=1, width=1, num_frames=1, fps=1.0, num_inference_steps=1, guidance_scale=1.0
    )
    any_grid = LatentGrid(channels=1, vae_spatial=1, patch=(1, 1, 1), time=1)
    try:
        check_output(output, num_frames=request.num_frames, fps=request.fps)
        if image is not None:
            read_image(image)
        resolve_request(request, any_defaults, any_grid, Limits())
    except SoraError as error:
        raise UsageError(_in_options(error)) from error


def _load(
    request: VideoRequest, model: str, options: dict[str, Any]
) -> tuple[Engine, ResolvedRequest]:
    """The engine, and the request as this model will make it."""
    from sora_engine.engine import Engine

    try:
        engine = Engine.from_pretrained(model, **options)
    except SoraError as error:
        raise UsageError(_in_options(error)) from error
    try:
        return engine, engine.resolve(request)
    except RequestError as error:
        engine.close()
        raise UsageError(_in_options(error)) from error


def _make(
    engine: Engine, request: VideoRequest, resolved: ResolvedRequest, output: str, model: str
) -> Job:
    """Runs one job to its end, frames going into the file as they are decoded.

    The finished latents lie beside the output while it is decoded: a decode that fails, or is
    killed, loses nothing.
    """
    from dataclasses import replace

    from sora_engine.engine import provenance_of
    from sora_engine.errors import MediaError
    from sora_engine.io.latents import SUFFIX, SavedLatents
    from sora_engine.io.video import VideoWriter

    provenance = provenance_of(resolved, engine.model)
    try:
        writer = VideoWriter(
            output, resolved.fps, num_frames=resolved.num_frames, provenance=provenance
        )
    except MediaError as error:
        raise UsageError(_in_options(error)) from error
    kept = Path(output + SUFFIX)

    def write(frames: np.ndarray) -> None:
        for frame in frames:
            writer.write(frame)

    def keep(latents: Tensor) -> None:
        source = str(Path(model).resolve()) if model != DEFAULT_MODEL else model
        SavedLatents(latents, resolved.fps, resolved.loop, source, provenance).write(kept)

    with writer:
        job = engine.submit(replace(request, seed=resolved.seed), on_frames=write, on_latents=keep)
        try:
            _follow(job)
        except BaseException:
            job.cancel()
            with suppress(Exception):
                job.result()  # the engine must have let go of the file before it is removed
            if kept.exists():
                _say(
                    f"the finished latents are in {kept}; `sora decode {kept} -o {output}` goes on"
                )
            raise
    kept.unlink(missing_ok=True)
    return job


def _follow(job: Job) -> None:
    """Shows a job's finished steps and decoded frames until it is done; raises its error."""
    if not sys.stdout.isatty():
        return _follow_in_lines(job)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn()) as bars:
        denoise = bars.add_task("denoise", total=job.progress.num_steps)
        decode = bars.add_task("decode ", total=job.progress.num_frames, start=False)
        while True:
            done = _wait(job, 0.1)
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
    while True:
        done = _wait(job, 0.05)
        progress = job.progress
        for name, count, total in (
            ("denoise", progress.steps_done, progress.num_steps),
            ("decode", progress.frames_decoded, progress.num_frames),
        ):
            before = shown.get(name, 0)
            if count > before and (count == total or (count - before) * 10 >= total):
                _say(f"{name} {count}/{total}")
                shown[name] = count
        if done:
            return


def _wait(job: Job, timeout_s: float) -> bool:
    """Whether the job completed within the time; raises its error."""
    try:
        job.result(timeout_s)
    except TimeoutError:
        if not job.done():
            return False
        job.result()  # done in the meantime, or failed by a TimeoutError of its own
    return True


def _in_options(error: Exception) -> str:
    """The error's text, with the option that it is about in front."""
    text = str(error)
    for name, option in _OPTION_OF.items():
        if re.match(rf"{name}\b", text):
            return f"{option}: {text}"
    return text


def _say(line: str) -> None:
    print(line, flush=True)
