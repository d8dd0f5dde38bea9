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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sora_engine.canvas import Canvas, Prompts
from sora_engine.clips import encode_known, encode_video, last_lap_state
from sora_engine.guidance import needs_unconditional
from sora_engine.job import Job
from sora_engine.models.video_model import VideoDecoder, VideoModel
from sora_engine.packing import Packer, Segment
from sora_engine.request import ResolvedRequest
from sora_engine.samplers import make_solver
from sora_engine.samplers.noise import free_noise, initial_noise, noise_for
from sora_engine.windows import Window, WindowPlan, blend


@torch.inference_mode()
def prepare(request: ResolvedRequest, model: VideoModel) -> Canvas:
    """Encode what a request gives, and lay out its canvas at the first step's noise level."""
    shape = model.grid.shape(request.height, request.width, request.num_frames, loop=request.loop)
    plan = window_plan(request, model, shape[1])
    noise = initial_latents(request, shape, plan).to(model.device)
    solver = make_solver(
        model.sampler_config,
        solver=request.solver,
        num_inference_steps=None if request.sigmas else request.num_inference_steps,
        shift=request.shift,
        sigmas=request.sigmas,
        strength=request.strength,
    )
    known, image = encode_known(request, model)
    latents = noise
    if request.init is not None:
        start = encode_video(request.init, request, model)
        latents = solver.schedule.add_noise(start, noise, 0)
    return Canvas(
        latents=latents,
        noise=noise,
        solver=solver,
        prompts=encode_prompts(request, model, shape[1], image),
        guidances=tuple(
            replace(request.guidance, scale=scale)
            for scale in (request.guidance_scale, request.guidance_scale_2)[: model.num_experts]
        ),
        patch_size=model.grid.patch,
        known=known,
        wraps=request.loop,
        window_plan=plan,
        seed=request.seed,
        solver_state=solver.init(),
    )


def initial_latents(
    request: ResolvedRequest, shape: tuple[int, ...], plan: WindowPlan | None
) -> Tensor:
    """The request's own noise, or that of its seed (float32, on the host)."""
    if request.latents is not None:
        return request.latents.detach().to("cpu", torch.float32)
    if plan is not None and plan.free_noise and not plan.holds(shape[1]):
        return free_noise(
            request.seed, shape, window=plan.length, stride=plan.stride, wrap=request.loop
        )
    return initial_noise(request.seed, shape)


def encode_prompts(
    request: ResolvedRequest, model: VideoModel, latent_frames: int, image: Tensor | None
) -> Prompts:
    """Text embeddings, and which of them each latent frame reads: that of its middle frame."""
    prompts = [request.prompt]
    frame_texts = [0] * latent_frames
    if request.shots:
        prompts = [shot.prompt for shot in request.shots]
        shot_of_frame = [i for i, shot in enumerate(request.shots) for _ in range(shot.num_frames)]
        spans = (model.grid.frames_of(i, loop=request.loop) for i in range(latent_frames))
        frame_texts = [shot_of_frame[span[len(span) // 2]] for span in spans]
    guided = needs_unconditional(request.guidance_scale)
    if guided:
        prompts.append(request.negative_prompt)
    texts = model.text_encoder.encode(prompts)
    negative = texts.pop() if guided else None
    return Prompts(tuple(texts), tuple(frame_texts), negative, image)


def window_plan(
    request: ResolvedRequest, model: VideoModel, latent_frames: int
) -> WindowPlan | None:
    """The request's windows, or those of the model's trained length where the video is longer."""
    if request.window is not None:
        return request.window
    trained = model.defaults.max_window
    if trained is None or latent_frames <= trained:
        return None
    return WindowPlan(trained, max(1, trained // 4) if trained > 1 else 0)


@dataclass(frozen=True, slots=True)
class Part:
    """One segment of a step, and where it came from."""

    canvas: Canvas
    window: Window
    conditional: bool
    segment: Segment


@torch.inference_mode()
def denoise_step(jobs: Sequence[Job], model: VideoModel, packer: Packer, max_tokens: int) -> None:
    """One step of every job's canvas. All are at the same expert (the scheduler sees to that)."""
    canvases = [job.canvas for job in jobs]
    expert = model.expert_at(canvases[0].timestep)
    transformer = model.transformer(expert)
    for canvas in canvases:
        if expert not in canvas.contexts:
            canvas.contexts[expert] = model.encode_contexts(transformer, canvas.prompts)
        canvas.impose_known()

    parts = [part for canvas in canvases for part in split(canvas, expert)]
    predictions: dict[tuple[int, Window, bool], Tensor] = {}
    for group in fill(parts, max_tokens, packer):
        batch = packer.pack([part.segment for part in group])
        outputs = packer.unpack(transformer(batch), batch, transformer.config.out_channels)
        for part, output in zip(group, outputs, strict=True):
            predictions[id(part.canvas), part.window, part.conditional] = output.float()

    for job, canvas in zip(jobs, canvases, strict=True):
        conditional = join(canvas, True, predictions)
        unconditional = join(canvas, False, predictions) if canvas.guided_at(expert) else None
        prediction, canvas.guidance_memory = canvas.guidances[expert](
            conditional, unconditional, canvas.step, canvas.num_steps, canvas.guidance_memory
        )
        fresh = None
        if canvas.solver.stochastic:
            fresh = noise_for(canvas.seed, canvas.step, canvas.latents.shape).to(model.device)
        canvas.latents, canvas.solver_state = canvas.solver.step(
            canvas.solver_state, canvas.step, canvas.latents, prediction, noise=fresh
        )
        if canvas.finished:
            canvas.impose_known()
        job.count_step()


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
    canvas: Canvas, conditional: bool, predictions: dict[tuple[int, Window, bool], Tensor]
) -> Tensor:
    """Blend one branch's windows. Guidance comes after: its rules look at a whole video."""
    windows = canvas.windows()
    parts = [predictions[id(canvas), window, conditional] for window in windows]
    return blend(parts, windows, canvas.window_plan, wraps=canvas.wraps)


@torch.inference_mode()
def decode(latents: Tensor, model: VideoModel | VideoDecoder, *, wraps: bool) -> Iterator[Tensor]:
    """Frames `[n, height, width, 3]` (uint8, on the host), a latent frame's worth at a time.

    latents: normalised, `[C, T, H, W]`. A loop's decoder runs in circles until a lap leaves it as
    it found it: the next lap has no seam.
    """
    latents = latents.to(model.device, model.vae_dtype)
    state = last_lap_state(latents, model.vae) if wraps else None
    for latent_frame in latents.split(1, dim=1):
        frames, state = model.vae.decode_chunk(latent_frame[None], state, consume=True)
        yield to_uint8(frames[0])


def to_uint8(frames: Tensor) -> Tensor:
    """`[3, n, H, W]` in [-1, 1] -> uint8 `[n, H, W, 3]` on the host, rounded as in diffusers."""
    scaled = (frames.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()
