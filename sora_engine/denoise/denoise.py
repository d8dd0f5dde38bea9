"""The way of a request, from its words to its frames. Read it top to bottom.

A `VideoRequest`, checked and with its defaults filled in, is prepared into a `Canvas`: prompts are
encoded as text, known clips as latents. At each step the canvas is cut into `Window`s, each window
becomes a `Segment` for each guidance branch, and the segments of all canvases that are to move now
are laid end to end in one `PackedBatch`, whatever their sizes. The model predicts, windows are
blended, guidance joins the branches, and the canvas's `Solver` takes one step. A finished canvas
is decoded a latent frame at a time. The `Job` that holds the canvas counts what is done, and can
stop it between any two of these.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sora_engine.denoise.canvas import Canvas, KnownMode, Prompts
from sora_engine.denoise.guidance import Guidance, needs_unconditional
from sora_engine.denoise.known import encode_known, encode_video, last_lap_state
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.denoise.preview import LatentPreview
from sora_engine.denoise.windows import (
    SparsePlan,
    Window,
    WindowPlan,
    blend,
    chain_of,
    default_plan,
    plan_windows,
)
from sora_engine.distributed.step_sharing import Ranks
from sora_engine.errors import RequestError
from sora_engine.models.video_model import VideoDecoder, VideoModel
from sora_engine.request.request import GenerationDefaults, ResolvedRequest
from sora_engine.runtime.job import Job
from sora_engine.samplers import Solver, make_solver
from sora_engine.samplers.noise import free_noise, initial_noise, noise_for, resampling_noise
from sora_engine.samplers.prediction import to_x0


def prepare(request: ResolvedRequest, model: VideoModel) -> Canvas:
    """As `preparing`, in one go."""
    stages = preparing(request, model)
    while True:
        try:
            next(stages)
        except StopIteration as done:
            canvas: Canvas = done.value
            return canvas


@torch.inference_mode()
def preparing(request: ResolvedRequest, model: VideoModel) -> Generator[None, None, Canvas]:
    """Encode what a request gives, and lay out its canvas at the first step's noise level.

    Yields where the engine may turn to other jobs, or stop: after each latent frame of a clip.
    """
    shape = model.grid.shape(request.height, request.width, request.num_frames, loop=request.loop)
    plan = window_plan(request, model, shape[1])
    noise = initial_latents(request, shape, plan).to(model.device)
    solver = solver_of(request, model)
    if request.resample > 1 and model.known_mode is not KnownMode.REPLACEMENT:
        raise RequestError(
            f"resample is {request.resample}: this checkpoint was trained for known frames, and "
            "takes each step once; 1 would work"
        )
    known, image = yield from encode_known(request, model)
    latents = noise
    if request.init is not None:
        start = yield from encode_video(request.init, request, model)
        latents = solver.schedule.add_noise(start, noise, 0)
    return Canvas(
        latents=latents,
        noise=noise,
        solver=solver,
        prompts=encode_prompts(request, model, shape[1], image),
        guidances=guidances_of(request, model),
        patch_size=model.grid.patch,
        known=known,
        wraps=request.loop,
        window_plan=plan,
        seed=request.seed,
        resample=request.resample if known is not None else 1,
        solver_state=solver.init(),
    )


def solver_of(request: ResolvedRequest, model: VideoModel) -> Solver:
    """The request's way down its schedule."""
    return make_solver(
        model.sampler_config,
        solver=request.solver,
        num_inference_steps=None if request.sigmas else request.num_inference_steps,
        shift=request.shift,
        sigmas=request.sigmas,
        strength=request.strength,
    )


def guidances_of(request: ResolvedRequest, model: VideoModel) -> tuple[Guidance, ...]:
    """One for each expert."""
    scales = (request.guidance_scale, request.guidance_scale_2)[: model.num_experts]
    return tuple(replace(request.guidance, scale=scale) for scale in scales)


def initial_latents(
    request: ResolvedRequest, shape: tuple[int, ...], plan: WindowPlan | SparsePlan | None
) -> Tensor:
    """The request's own noise, or that of its seed (float32, on the host)."""
    if request.latents is not None:
        return request.latents.detach().to("cpu", torch.float32)
    if (
        isinstance(plan, WindowPlan)
        and plan.free_noise
        and plan.schedule != "chained"
        and not plan.holds(shape[1])
    ):
        return free_noise(
            request.seed, shape, window=plan.length, stride=plan.stride, wrap=request.loop
        )
    return initial_noise(request.seed, shape)


def encode_prompts(
    request: ResolvedRequest, model: VideoModel, latent_frames: int, image: Tensor | None
) -> Prompts:
    """Text embeddings, and which of them each latent frame reads."""
    texts = model.text_encoder.encode(prompts_of(request))
    negative = texts.pop() if needs_unconditional(request.guidance_scale) else None
    return Prompts(tuple(texts), frame_texts_of(request, model, latent_frames), negative, image)


def prompts_of(request: ResolvedRequest) -> list[str]:
    """The texts that are encoded: of the shots or the prompt, and last what guidance needs."""
    prompts = [shot.prompt for shot in request.shots] or [request.prompt]
    if needs_unconditional(request.guidance_scale):
        prompts.append(request.negative_prompt)
    return prompts


def frame_texts_of(
    request: ResolvedRequest, model: VideoModel, latent_frames: int
) -> tuple[int, ...]:
    """The text that each latent frame reads: that of its middle frame."""
    shot_of_frame = [i for i, shot in enumerate(request.shots) for _ in range(shot.num_frames)]
    if not shot_of_frame:
        return (0,) * latent_frames
    spans = (model.grid.frames_of(i, loop=request.loop) for i in range(latent_frames))
    return tuple(shot_of_frame[span[len(span) // 2]] for span in spans)


def window_plan(
    request: ResolvedRequest, model: VideoModel, latent_frames: int
) -> WindowPlan | SparsePlan | None:
    """As `windows_of`; RequestError for chained windows where none can be."""
    plan = windows_of(request, model.defaults, latent_frames)
    if isinstance(plan, WindowPlan) and plan.schedule == "chained":
        if model.known_mode is not KnownMode.NOISE_LEVEL:
            raise RequestError(
                "window schedule 'chained' needs a checkpoint that takes known frames at noise "
                f"level 0; this one takes them by {model.known_mode.value}: 'static' or 'moving' "
                "would work"
            )
        if _has_start_video(request):
            raise RequestError(
                "window schedule 'chained' starts every window from noise; with a start video "
                "'static' or 'moving' would work"
            )
    return plan


def windows_of(
    request: ResolvedRequest, defaults: GenerationDefaults, latent_frames: int
) -> WindowPlan | SparsePlan | None:
    """The request's windows, or those of the model's trained length where the video is longer."""
    trained, schedule = defaults.max_window, defaults.window_schedule
    if request.window is not None or trained is None or latent_frames <= trained:
        return request.window
    if schedule == "chained" and (_has_start_video(request) or request.shots):
        # What a start video shows is there in every window; and a shot that knew the one before it
        # would go on with that one's scene.
        schedule = "static"
    return default_plan(defaults, schedule)


def _has_start_video(request: ResolvedRequest) -> bool:
    """Of a job that was saved, too: its start video is not kept, its strength is."""
    return request.strength is not None


def step_tokens(request: ResolvedRequest, model: VideoModel) -> int:
    """Tokens of one step of a request: all of its windows and branches."""
    _, frames, height, width = model.grid.shape(
        request.height, request.width, request.num_frames, loop=request.loop
    )
    plan = window_plan(request, model, frames)
    if isinstance(plan, WindowPlan) and chain_of(plan, frames, None, wraps=request.loop):
        seen = plan.span
    else:
        windows = plan_windows(plan, frames, wraps=request.loop, step=0)
        seen = sum(window.length for window in windows)
    branches = 2 if needs_unconditional(request.guidance_scale) else 1
    return seen * height * width // math.prod(model.grid.patch) * branches


def num_links(request: ResolvedRequest, model: VideoModel) -> int:
    """How many times the schedule is gone through: once a chained window."""
    frames = model.grid.latent_frames(request.num_frames, loop=request.loop)
    plan = window_plan(request, model, frames)
    return max(1, len(chain_of(plan, frames, None, wraps=request.loop)))


@dataclass(frozen=True, slots=True)
class Part:
    """One segment of a step, and where it came from."""

    canvas: Canvas
    window: Window
    conditional: bool
    segment: Segment


@torch.inference_mode()
def denoise_step(
    jobs: Sequence[Job],
    model: VideoModel,
    packer: Packer,
    max_tokens: int,
    ranks: Ranks | None = None,
) -> dict[Job, Exception]:
    """One step of every job's canvas. All are at the same expert (the scheduler sees to that).

    What goes wrong in the packed part is raised, and no canvas has moved then. What goes wrong in
    one job's own part is returned, and the others have moved.

    ranks: those that take the step together; every one of them calls this with the same jobs.
    """
    canvases = [job.canvas for job in jobs]
    expert = model.expert_at(canvases[0].timestep)
    predictions = predict(canvases, expert, model, packer, max_tokens, ranks)
    failures: dict[Job, Exception] = {}
    for job, canvas in zip(jobs, canvases, strict=True):
        try:
            fresh = None
            if canvas.solver.stochastic:
                shape = canvas.part(canvas.latents).shape
                fresh = noise_for(canvas.seed, canvas.step, shape).to(model.device)
            step = canvas.level
            advance(canvas, expert, predictions, fresh, model.preview)
            for visit in range(1, canvas.resample):
                go_back(canvas, step, visit)
                again = predict([canvas], expert, model, packer, max_tokens, ranks)
                advance(canvas, expert, again, fresh)
        except Exception as error:
            failures[job] = error
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # progress counts steps that are done
    for job in jobs:
        if job not in failures:
            job.count_step()
    return failures


Predictions = dict[tuple[int, bool], Tensor]
"""By canvas (its id) and branch: float32 `[C, T, H, W]`, all windows blended."""


def predict(
    canvases: Sequence[Canvas],
    expert: int,
    model: VideoModel,
    packer: Packer,
    max_tokens: int,
    ranks: Ranks | None = None,
) -> Predictions:
    """The model's predictions for the next step of all canvases, packed."""
    transformer = model.transformer(expert)
    for canvas in canvases:
        if expert not in canvas.contexts:
            canvas.contexts[expert] = model.encode_contexts(transformer, canvas.prompts)
        canvas.impose_known()

    parts = [part for canvas in canvases for part in split(canvas, expert)]
    predictions: dict[tuple[int, Window, bool], Tensor] = {}
    for group in fill(parts if ranks is None else ranks.own(parts), max_tokens, packer):
        batch = packer.pack([part.segment for part in group])
        predicted = transformer(batch) if ranks is None else ranks.predict(transformer, batch)
        outputs = packer.unpack(predicted, batch, transformer.config.out_channels)
        for part, output in zip(group, outputs, strict=True):
            made = output[:, part.segment.anchors :].float()
            predictions[id(part.canvas), part.window, part.conditional] = made
    return join(parts, predictions) if ranks is None else ranks.join(parts, predictions)


def advance(
    canvas: Canvas,
    expert: int,
    predictions: Predictions,
    fresh: Tensor | None,
    preview: LatentPreview | None = None,
) -> None:
    """Join the branches, and take the solver's step."""
    schedule, level = canvas.solver.schedule, canvas.level
    unconditional = predictions.get((id(canvas), False))
    prediction, canvas.guidance_memory = canvas.guidances[expert](
        canvas.part(predictions[id(canvas), True]),
        None if unconditional is None else canvas.part(unconditional),
        level,
        len(schedule),
        canvas.guidance_memory,
    )
    sample = canvas.part(canvas.latents)
    if preview is not None:
        clean = to_x0(schedule.prediction_type, sample, prediction, *schedule.level(level))
        canvas.preview = preview.frames(canvas.with_part(clean))
    stepped, state = canvas.solver.step(canvas.solver_state, level, sample, prediction, noise=fresh)
    canvas.move(stepped, state)
    if canvas.finished:
        canvas.impose_known()


def go_back(canvas: Canvas, step: int, visit: int) -> None:
    """Undo a canvas's step by noise, so that it is taken again from what is known by now.

    A multistep solver forgets its history: it belongs to a path that this sample is not on.
    """
    noise = resampling_noise(canvas.seed, step, visit, canvas.latents.shape).to(canvas.latents)
    canvas.latents = canvas.solver.schedule.go_back(canvas.latents, noise, step)
    canvas.solver_state = canvas.solver.init(step)


def split(canvas: Canvas, expert: int) -> list[Part]:
    """The parts of a canvas's next step: windows of one branch together, as they share texts."""
    branches = (True, False) if canvas.guided_at(expert) else (True,)
    return [
        Part(canvas, window, conditional, canvas.segment(window, expert, conditional=conditional))
        for conditional in branches
        for window in canvas.windows()
    ]


def fill(parts: Sequence[Part], max_tokens: int, packer: Packer) -> Iterator[list[Part]]:
    """Cut a step's parts into batches of at most `max_tokens`, one part at the least."""
    group: list[Part] = []
    tokens = 0
    for part in parts:
        size = packer.num_tokens(part.segment)
        if group and tokens + size > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(part)
        tokens += size
    if group:
        yield group


def join(
    parts: Sequence[Part], predictions: dict[tuple[int, Window, bool], Tensor]
) -> dict[tuple[int, bool], Tensor]:
    """Blend the windows of each canvas (by id) and branch.

    Guidance comes after: its rules look at a whole video.
    """
    joined = {}
    for canvas, conditional in dict.fromkeys((part.canvas, part.conditional) for part in parts):
        windows = canvas.windows()
        made = [predictions[id(canvas), window, conditional] for window in windows]
        blended = blend(made, windows, canvas.window_plan, wraps=canvas.wraps)
        joined[id(canvas), conditional] = blended
    return joined


def decode(latents: Tensor, model: VideoModel | VideoDecoder, *, wraps: bool) -> Iterator[Tensor]:
    """Frames `[n, height, width, 3]` (uint8, on the host), a latent frame's worth at a time.

    latents: normalised, `[C, T, H, W]`.
    """
    for frames in decoding(latents, model, wraps=wraps):
        if frames is not None:
            yield frames


@torch.inference_mode()
def decoding(
    latents: Tensor, model: VideoModel | VideoDecoder, *, wraps: bool
) -> Iterator[Tensor | None]:
    """As `decode`, and None between: wherever the engine may turn to other jobs, or stop.

    A loop's decoder runs in circles until a lap leaves it as it found it: the next lap has no seam.
    """
    latents = latents.to(model.device, model.vae_dtype)
    state = (yield from last_lap_state(latents, model.vae)) if wraps else None
    for latent_frame in latents.split(1, dim=1):
        frames, state = model.vae.decode_chunk(latent_frame[None], state, consume=True)
        made = to_uint8(frames[0])
        del frames  # not held while the next ones are made
        yield made
        del made


def to_uint8(frames: Tensor) -> Tensor:
    """`[3, n, H, W]` in [-1, 1] -> uint8 `[n, H, W, 3]` on the host, rounded as in diffusers."""
    scaled = (frames.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()
