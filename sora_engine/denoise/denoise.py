"""The way of a request, from its words to its frames. Read it top to bottom.

A `VideoRequest`, checked and with its defaults filled in, is prepared into a `Canvas`: prompts are
encoded as text, known clips as latents. At each step the canvas is cut into `Window`s, each window
becomes a `Segment` for each guidance branch, and the segments of all canvases that are to move now
are laid end to end in one `PackedBatch`, whatever their sizes. The model predicts, windows are
blended, guidance joins the branches, and the canvas's `Solver` takes one step. A finished canvas
is decoded a latent frame at a time (`vae.decoding`). The `runtime.job.Job` that holds the canvas
counts what is done, and can stop it between any two of these.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sora_engine.denoise.adapting import AdapterRun, Adapters
from sora_engine.denoise.camera import camera_control
from sora_engine.denoise.canvas import Canvas, lay_out_canvas, solver_of
from sora_engine.denoise.conditioning import NEGATIVE, Context, Embedding, Prompts
from sora_engine.denoise.guidance import guide
from sora_engine.denoise.known import encode_known, encode_video
from sora_engine.denoise.model import DiffusionModel, Transformer
from sora_engine.denoise.packing import Packer
from sora_engine.denoise.preview import Preview
from sora_engine.denoise.sharing import ALONE, Part, PartPredictions, Predictions, StepSharing
from sora_engine.denoise.windows import chain_of, plan_windows
from sora_engine.errors import NonFiniteError, RequestError
from sora_engine.request import LatentGrid, ResolvedRequest, WindowPlan
from sora_engine.request.ladders import ladder_named
from sora_engine.samplers.noise import free_noise, initial_noise, noise_for, resampling_noise
from sora_engine.samplers.prediction import to_x0
from sora_engine.vae.finite import check_finite, is_finite
from sora_kernels.transfer import to_device


def prepare(request: ResolvedRequest, model: DiffusionModel) -> Canvas:
    """As `preparing`, in one go."""
    stages = preparing(request, model)
    while True:
        try:
            next(stages)
        except StopIteration as done:
            canvas: Canvas = done.value
            return canvas


@torch.inference_mode()
def preparing(request: ResolvedRequest, model: DiffusionModel) -> Generator[None, None, Canvas]:
    """Encode what a request gives, and lay out its canvas at the first step's noise level.

    Yields where the engine may turn to other jobs, or stop: after each latent frame of a clip.
    """
    shape = request.latent_shape(model.grid)
    noise = to_device(initial_latents(request, shape), model.device)
    schedule = solver_of(request, model).schedule
    known, image = yield from encode_known(request, model)
    if known is not None:
        content = [part for part in (known.latents, known.channels) if part is not None]
        check_finite(content, "a known clip", stage="encoding", dtype=model.vae_dtype)
    latents = noise
    if request.ladder and ladder_named(request.ladder).scaled_start:
        latents = noise * schedule.level(0)[1]
    if request.init is not None:
        start = yield from encode_video(request.init, request, model)
        check_finite([start], "the start video", stage="encoding", dtype=model.vae_dtype)
        latents = schedule.add_noise(start, noise, 0)
    return lay_out_canvas(
        request,
        model,
        latents=latents,
        noise=noise,
        prompts=encode_prompts(request, model, shape[1], image),
        known=known,
    )


def initial_latents(request: ResolvedRequest, shape: tuple[int, ...]) -> Tensor:
    """The request's own noise, or that of its seed (float32, on the host)."""
    if request.latents is not None:
        given = request.latents.detach().to("cpu", torch.float32)
        if not is_finite(given):
            raise RequestError("latents hold NaN or infinity; normal noise would work")
        return given
    plan = request.window
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
    request: ResolvedRequest, model: DiffusionModel, latent_frames: int, image: Tensor | None
) -> Prompts:
    """Embeddings of the prompts, and which of them each latent frame reads."""
    texts = list(model.prompt_encoder.encode(prompts_of(request)))
    reused = model.prompt_encoder.reused
    encoded = [tensor for text in texts for tensor in text.values()]
    encoded += [] if image is None else [image]
    check_finite(encoded, "a prompt or an image", stage="encoding", dtype=model.dtype)
    negative = texts.pop() if request.guided else None
    frame_texts = frame_texts_of(request, model.grid, latent_frames)
    cut = model.prompt_encoder.cut(prompts_of(request))
    return Prompts(tuple(texts), frame_texts, negative, image, cut, reused)


def prompts_of(request: ResolvedRequest) -> list[str]:
    """The texts that are encoded: of the shots or the prompt, and last what guidance needs."""
    return [*request.prompts, *([request.negative_prompt] if request.guided else [])]


def frame_texts_of(
    request: ResolvedRequest, grid: LatentGrid, latent_frames: int
) -> tuple[int, ...]:
    """The text that each latent frame reads: that of its middle frame."""
    shot_of_frame = [i for i, shot in enumerate(request.shots) for _ in range(shot.num_frames)]
    if not shot_of_frame:
        return (0,) * latent_frames
    # What is made beyond the last shot is left out at the end, and reads what the last one reads.
    shot_of_frame += shot_of_frame[-1:] * (request.canvas_frames - len(shot_of_frame))
    spans = (grid.frames_of(i, loop=request.loop) for i in range(latent_frames))
    return tuple(shot_of_frame[span[len(span) // 2]] for span in spans)


def step_tokens(request: ResolvedRequest, grid: LatentGrid) -> int:
    """Tokens of one step of a request: all of its windows and branches."""
    _, frames, height, width = request.latent_shape(grid)
    plan = request.window
    if isinstance(plan, WindowPlan) and chain_of(plan, frames, None, wraps=request.loop):
        seen = plan.span
    else:
        windows = plan_windows(plan, frames, wraps=request.loop, step=0)
        seen = sum(window.length for window in windows)
    branches = 2 if request.guided else 1
    return seen * height * width // math.prod(grid.patch) * branches


def num_passes(request: ResolvedRequest, grid: LatentGrid) -> int:
    """How many times the schedule is gone through: once a chained window."""
    frames = request.latent_shape(grid)[1]
    return max(1, len(chain_of(request.window, frames, None, wraps=request.loop)))


def num_steps(request: ResolvedRequest, grid: LatentGrid) -> int:
    """All steps of a run, over all passes."""
    return request.steps_taken * num_passes(request, grid)


@torch.inference_mode()
def denoise_step(
    canvases: Sequence[Canvas],
    model: DiffusionModel,
    packer: Packer,
    max_tokens: int,
    sharing: StepSharing = ALONE,
) -> dict[int, Exception]:
    """One step of every canvas. All are at the same expert (the scheduler sees to that).

    What goes wrong in the packed part is raised, and no canvas has moved then. What goes wrong in
    one canvas's own part, where steps taken again are too, is returned by its index: that canvas is
    of no more use, and the others have moved. So is NonFiniteError for a step that made NaN or
    infinity.

    sharing: who takes the step together; each of them calls this with the same canvases.
    """
    expert = model.expert_at(canvases[0].timestep)
    predictions = predict(canvases, expert, model, packer, max_tokens, sharing)
    failures: dict[int, Exception] = {}
    for i, canvas in enumerate(canvases):
        try:
            fresh = None
            if canvas.solver.stochastic:
                shape = canvas.part(canvas.latents).shape
                fresh = to_device(noise_for(canvas.seed, canvas.step, shape), model.device)
            step_index = canvas.step_index
            advance(canvas, expert, predictions, fresh, model.preview)
            for visit in range(1, canvas.resample):
                go_back(canvas, step_index, visit)
                again = predict([canvas], expert, model, packer, max_tokens, sharing)
                advance(canvas, expert, again, fresh)
        except Exception as error:
            failures[i] = error
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # progress counts steps that are done
    for i, canvas in enumerate(canvases):
        if i not in failures:
            what = f"step {canvas.step} of {canvas.num_steps}"
            try:
                check_finite(
                    [canvas.latents], what, stage="denoising", dtype=model.dtype, step=canvas.step
                )
            except NonFiniteError as error:
                failures[i] = error
    return failures


def predict(
    canvases: Sequence[Canvas],
    expert: int,
    model: DiffusionModel,
    packer: Packer,
    max_tokens: int,
    sharing: StepSharing = ALONE,
) -> Predictions:
    """The model's predictions for the next step of all canvases, packed."""
    transformer = model.transformer(expert)
    for canvas in canvases:
        if expert not in canvas.contexts:
            branches = [_on_device(branch, model.device) for branch in canvas.prompts.branches]
            canvas.contexts[expert] = _contexts(branches, transformer, canvas.adapters_at(expert))
        if canvas.camera is not None and expert not in canvas.controls:
            found = camera_control(canvas.camera, transformer, model.device)
            canvas.controls[expert] = found
        canvas.impose_known()

    parts = [part for canvas in canvases for part in split(canvas, expert)]
    predictions: PartPredictions = {}
    for group in fill(sharing.own(parts), max_tokens, packer):
        batch = packer.pack([part.segment for part in group])
        predicted = sharing.predict(transformer, batch)
        outputs = packer.unpack(predicted, batch, transformer.shape.out_channels)
        for part, output in zip(group, outputs, strict=True):
            # No solver here draws from a learned variance: DDIM and the ODEs need the mean alone.
            mean = output.chunk(2)[0] if model.learned_variance else output
            own_frames = mean[:, part.segment.num_anchors :].float()
            predictions[id(part.canvas), part.window, part.conditional] = own_frames
    return sharing.join(parts, predictions)


def _contexts(
    branches: Sequence[Embedding], transformer: Transformer, adapters: Adapters | None
) -> list[Context]:
    """What each branch is to an expert's layers, with the adapters of a request."""
    if adapters is None:
        return transformer.encode_contexts(branches)
    with transformer.adapting([AdapterRun(adapters)]):
        contexts = transformer.encode_contexts(branches)
    return [replace(context, adapters=adapters) for context in contexts]


def _on_device(embedding: Embedding, device: torch.device) -> Embedding:
    """The mark of an unconditional one stays where it is: nothing reads it."""
    return {name: x if name == NEGATIVE else x.to(device) for name, x in embedding.items()}


def advance(
    canvas: Canvas,
    expert: int,
    predictions: Predictions,
    fresh: Tensor | None,
    preview: Preview | None = None,
) -> None:
    """Join the branches, and take the solver's step."""
    schedule, i = canvas.solver.schedule, canvas.step_index
    unconditional = predictions.get((id(canvas), False))
    prediction, canvas.guidance_memory = guide(
        canvas.guidances[expert],
        canvas.part(predictions[id(canvas), True]),
        None if unconditional is None else canvas.part(unconditional),
        i,
        len(schedule),
        canvas.guidance_memory,
    )
    sample = canvas.part(canvas.latents)
    if preview is not None:
        clean = to_x0(schedule.prediction_type, sample, prediction, *schedule.level(i))
        canvas.preview = preview.frames(canvas.with_part(clean))
    stepped, state = canvas.solver.step(canvas.solver_state, i, sample, prediction, noise=fresh)
    canvas.move(stepped, state)
    if canvas.finished:
        canvas.impose_known()


def go_back(canvas: Canvas, step_index: int, visit: int) -> None:
    """Undo a canvas's step by noise, so that it is taken again from what is known by now.

    A multistep solver forgets its history: it belongs to a path that this sample is not on.
    """
    drawn = resampling_noise(canvas.seed, step_index, visit, canvas.latents.shape)
    noise = to_device(drawn, canvas.latents.device)
    canvas.latents = canvas.solver.schedule.go_back(canvas.latents, noise, step_index)
    canvas.solver_state = canvas.solver.init(step_index)


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
