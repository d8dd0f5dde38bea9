"""The canvas: the latent video of one request, what of it is known, and how far it is denoised.

Every task is a canvas. Text to video: nothing is known. Image to video: the first latent frame is.
Extending, connecting, filling: the known frames lie elsewhere. How a model is told what is known
depends on what it was trained for (`KnownMode`); nothing else in the engine does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sora_engine.denoise.adapting import Adapters
from sora_engine.denoise.camera import CameraRays
from sora_engine.denoise.conditioning import Context, Prompts
from sora_engine.denoise.drive import Drive
from sora_engine.denoise.model import DiffusionModel
from sora_engine.denoise.packing import Segment
from sora_engine.denoise.windows import Window, chain_of, frames_seen, plan_windows
from sora_engine.request import Guidance, KnownMode, ResolvedRequest, SparsePlan, WindowPlan
from sora_engine.samplers import Solver, SolverState, make_solver
from sora_engine.samplers.length import mu_of_length, spread_levels
from sora_kernels.transfer import to_device


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Known content of a canvas.

    latents: `[C, T, H, W]`; mask: bool `[T, H, W]`, True where known. Both are None in modes
        CHANNELS, FIRST_FRAME and VACE, where `channels [C', T, H, W]` go beside the sample instead.
    levels: the mask on the host, where the model is told of it by the noise level: tokens' levels
        are laid out there, and a step does not wait for it.
    """

    mode: KnownMode
    latents: Tensor | None = None
    mask: Tensor | None = None
    channels: Tensor | None = None
    levels: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.mask is not None and self.mode.by_level:
            object.__setattr__(self, "levels", self.mask.cpu())


@dataclass(slots=True, eq=False)
class Canvas:
    """The latent video of one request.

    latents: float32 `[C, T, H, W]`, the sample at the noise level before `step`.
    noise: the initial noise, same shape.
    wraps: time is a circle (a loop).
    fps: frames a second of the video.
    seed: of the fresh noise that stochastic solvers take.
    resample: how often each step is taken (see `VideoRequest`).
    guidances: one for each expert; guidance_memory: what theirs keeps from step to step.
    preview: what the last step makes of the video, uint8 `[T, H, W, 3]`, where the model can tell.
    contexts: by expert, the keys and values of `prompts.texts` and then of `prompts.negative`.
    adapters: for each expert those of the request; empty where it has none.
    drive: of a canvas that is driven while it is made; it is denoised in one window.
    camera: how the camera moves; controls: by expert, what that adds to each latent frame's tokens.
    chain: with chained windows all of them, in the order in which they are denoised; windows_done:
        how many of them are. Every one is taken through the whole schedule: `step` and `num_steps`
        count over all.
    """

    latents: Tensor
    noise: Tensor
    solver: Solver
    prompts: Prompts
    guidances: tuple[Guidance, ...]
    patch_size: tuple[int, int, int]
    known: Known | None = None
    wraps: bool = False
    fps: float | None = None
    seed: int = 0
    resample: int = 1
    window_plan: WindowPlan | SparsePlan | None = None
    solver_state: SolverState = field(default_factory=SolverState)
    contexts: dict[int, list[Context]] = field(default_factory=dict)
    guidance_memory: Tensor | None = None
    preview: np.ndarray | None = None
    windows_done: int = 0
    adapters: tuple[Adapters | None, ...] = ()
    drive: Drive | None = None
    camera: CameraRays | None = None
    controls: dict[int, Tensor] = field(default_factory=dict)
    chain: tuple[Window, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        levels = None if self.known is None else self.known.levels
        known = None if levels is None else levels.any(dim=2).any(dim=1)
        total = self.latents.shape[1]
        self.chain = chain_of(self.window_plan, total, known, wraps=self.wraps)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.windows_done * len(self.solver.schedule) + self.step_index

    @property
    def step_index(self) -> int:
        """The place of the next step on the schedule."""
        return self.solver_state.step

    @property
    def solver_name(self) -> str:
        return type(self.solver).__name__

    @property
    def cut_prompts(self) -> tuple[str, ...]:
        """A line for each text of which the encoder does not read the end."""
        return self.prompts.cut

    @property
    def texts_reused(self) -> int:
        """How many of its texts were encoded for an earlier request."""
        return self.prompts.reused

    @property
    def num_steps(self) -> int:
        return len(self.solver.schedule) * max(1, len(self.chain))

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def timestep(self) -> float:
        """What the model is told of the noise level before the next step."""
        return self.solver.schedule.timesteps[self.step_index]

    def guided_at(self, expert: int) -> bool:
        """Whether the next step takes an unconditional prediction."""
        guidance = self.guidances[expert]
        wanted = guidance.needs_unconditional(self.step_index, len(self.solver.schedule))
        return wanted and self.prompts.negative is not None

    def adapters_at(self, expert: int) -> Adapters | None:
        """What changes this expert's transformer for the request."""
        return self.adapters[expert] if self.adapters else None

    @property
    def num_windows(self) -> int:
        """How many windows the next step has."""
        return len(self.windows())

    def windows(self) -> list[Window]:
        """The windows of the next step."""
        if self.chain:
            return [self.chain[self.windows_done]]
        total = self.latents.shape[1]
        return plan_windows(self.window_plan, total, wraps=self.wraps, step=self.step)

    @property
    def settled(self) -> Tensor:
        """Latent frames that earlier windows of the chain have made: bool `[T]`, on the host."""
        settled = torch.zeros(self.latents.shape[1], dtype=torch.bool)
        for window in self.chain[: self.windows_done]:
            settled[window.indices()[window.lead :]] = True
        return settled

    @property
    def anchors(self) -> Window | None:
        """The latent frames that the next step's window sees beside its own."""
        plan = self.window_plan
        if not self.windows_done or not isinstance(plan, WindowPlan) or not plan.anchors:
            return None
        first = self.chain[0]
        return Window(first.start + first.length - plan.anchors, plan.anchors, first.total)

    @property
    def num_anchors(self) -> int:
        """How many latent frames those are, or are recalled."""
        if self.drive is not None:
            return self.drive.num_recalled
        return 0 if self.anchors is None else self.anchors.length

    def part(self, whole: Tensor) -> Tensor:
        """What the next step is about of a tensor `[C, T, H, W]`: the chain's window, or all."""
        return self.windows()[0].of(whole, 1) if self.chain else whole

    def with_part(self, part: Tensor) -> Tensor:
        """The latents with another `part`; what is settled stays as it is."""
        if not self.chain:
            return part
        window = self.windows()[0]
        settled = to_device(window.of(self.settled, 0), part.device)[:, None, None]
        part = torch.where(settled, self.part(self.latents), part)
        latents = self.latents.clone()
        for place, own in window.places(latents, part):
            place.copy_(own)
        return latents

    def move(self, part: Tensor, state: SolverState) -> None:
        """Take the solver's step; at the end of a chained window, turn to the next one."""
        self.latents = self.with_part(part)
        self.solver_state = state
        if not self.chain or self.step_index < len(self.solver.schedule):
            return
        window = self.windows()[0]
        self.windows_done += 1
        # A lead that no window before has made is made by a later one, from its own noise.
        again = torch.zeros(window.total, dtype=torch.bool)
        again[window.indices()[: window.lead]] = True
        again &= ~self.settled
        again = to_device(again, self.latents.device)[:, None, None]
        self.latents = torch.where(again, self.noise, self.latents)
        self.solver_state = self.solver.init()
        self.guidance_memory = None

    def keep_latents_alone(self) -> None:
        """Denoising is over: let go of all that only steps need."""
        assert self.finished
        self.contexts.clear()
        self.controls.clear()
        self.adapters = ()
        self.noise = self.latents
        self.solver_state = SolverState(step=self.step_index)
        self.known = self.guidance_memory = None

    def impose_known(self) -> None:
        """Put the known content where the model expects it in the sample before the next step."""
        known = self.known
        if known is None or known.latents is None or known.mask is None:
            return
        content = known.latents
        if known.mode is KnownMode.REPLACEMENT and not self.finished:
            content = self.solver.schedule.add_noise(content, self.noise, self.step_index)
        self.latents = torch.where(known.mask, content, self.latents)

    def segment(self, window: Window, expert: int, *, conditional: bool) -> Segment:
        """The tokens of a window under one guidance branch, those of its anchors first."""
        return Segment(
            latents=self._model_input(window),
            timesteps=self._timesteps(window),
            contexts=self._contexts(window, expert, conditional=conditional),
            sees=self._sees(window),
            num_anchors=self.num_anchors,
            fps=self.fps,
            actions=None if self.drive is None else self.drive.actions,
            places=None if self.drive is None else self.drive.places,
            control=self._control(window, expert),
        )

    def _control(self, window: Window, expert: int) -> Tensor | None:
        if self.camera is None:
            return None
        own = window.of(self.controls[expert], 0)
        if self.anchors is None:
            return own
        return torch.cat([self.anchors.of(self.controls[expert], 0), own])

    def _sees(self, window: Window) -> Tensor | None:
        plan = self.window_plan
        if self.drive is not None:
            return self.drive.sees
        if not isinstance(plan, SparsePlan) or plan.holds(window.total):
            return None
        order = window.indices()
        seen = frames_seen(plan, window.total, wraps=self.wraps, step=self.step)
        return seen[order][:, order]

    def _model_input(self, window: Window) -> Tensor:
        sample = window.of(self.latents, 1)
        if self.anchors is not None:
            sample = torch.cat([self.anchors.of(self.latents, 1), sample], dim=1)
        if self.drive is not None:
            sample = torch.cat([self.drive.recalled.to(sample), sample], dim=1)
        if self.known is None or self.known.channels is None:
            return sample
        return torch.cat([sample, window.of(self.known.channels, 1).to(sample)])

    def _timesteps(self, window: Window) -> Tensor:
        timesteps = torch.full((window.length,), self.timestep, dtype=torch.float32)
        known = None if self.known is None else self.known.levels
        if known is None and not self.windows_done:
            return torch.cat([timesteps.new_zeros(self.num_anchors), timesteps])
        mask = window.of(self.settled, 0)[:, None, None]
        if known is not None:
            # Masks cover whole patches (see `denoise.known`): a patch's first latent speaks for it.
            mask = mask | window.of(known[:, :: self.patch_size[1], :: self.patch_size[2]], 0)
        first = mask[:, :1, :1]
        if bool((mask == first).all()):  # frames are known whole, or not at all
            levels = torch.where(first.flatten(), 0.0, timesteps)
        else:
            levels = torch.where(mask, 0.0, timesteps[:, None, None])
        return torch.cat([levels.new_zeros(self.num_anchors, *levels.shape[1:]), levels])

    def _contexts(
        self, window: Window, expert: int, *, conditional: bool
    ) -> tuple[tuple[Context, int], ...]:
        contexts = self.contexts[expert]
        seen = [window] if self.anchors is None else [self.anchors, window]
        frames = torch.cat([each.indices() for each in seen]).tolist()
        if not conditional:
            recalled = 0 if self.drive is None else self.drive.num_recalled
            return ((contexts[-1], recalled + len(frames)),)
        texts = [self.prompts.frame_texts[i] for i in frames]
        if self.drive is not None:  # what is recalled reads what the first frame does
            texts = texts[:1] * self.drive.num_recalled + texts
        return tuple((contexts[text], len(list(group))) for text, group in itertools.groupby(texts))


def lay_out_canvas(
    request: ResolvedRequest,
    model: DiffusionModel,
    *,
    latents: Tensor,
    noise: Tensor,
    prompts: Prompts,
    known: Known | None,
) -> Canvas:
    """The canvas of a request at the first step of its schedule.

    latents, noise: float32 `[C, T, H, W]`, on one device. Without known content there is nothing
    that taking a step again would make the rest agree with.
    """
    solver = solver_of(request, model)
    scales = (request.guidance_scale, request.guidance_scale_2)[: model.num_experts]
    return Canvas(
        latents=latents,
        noise=noise,
        solver=solver,
        prompts=prompts,
        guidances=tuple(replace(request.guidance, scale=scale) for scale in scales),
        patch_size=model.grid.patch,
        known=known,
        wraps=request.loop,
        fps=request.fps,
        seed=request.seed,
        resample=1 if known is None else request.resample,
        window_plan=request.window,
        solver_state=solver.init(),
        adapters=tuple(model.adapters_of(request.loras)) if request.loras else (),
        camera=CameraRays.of(request, model.grid),
    )


def solver_of(request: ResolvedRequest, model: DiffusionModel) -> Solver:
    """The request's way down its schedule."""
    config = model.sampler_config
    shape = request.latent_shape(model.grid)
    tokens = math.prod(shape[1:]) // math.prod(model.grid.patch)
    steps, sigmas = request.num_inference_steps, request.sigmas
    if sigmas is None and config.spread is not None:
        sigmas = spread_levels(config.spread, steps)
    return make_solver(
        config,
        solver=request.solver,
        num_inference_steps=None if sigmas else steps,
        shift=request.shift,
        mu=None if request.shift is not None else mu_of_length(config, tokens),
        sigmas=sigmas,
        strength=request.strength,
    )
