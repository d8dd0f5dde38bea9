"""The canvas: the latent video of one request, what of it is known, and how far it is denoised.

Every task is a canvas. Text to video: nothing is known. Image to video: the first latent frame is.
Extending, connecting, filling: the known frames lie elsewhere. How a model is told what is known
depends on what it was trained for (`KnownMode`); nothing else in the engine does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from sora_engine.denoise.guidance import Guidance
from sora_engine.denoise.packing import Context, Segment
from sora_engine.denoise.windows import SparsePlan, Window, WindowPlan, chain_of, plan_windows
from sora_engine.samplers import Solver, SolverState


class KnownMode(StrEnum):
    """How a checkpoint takes known content."""

    NOISE_LEVEL = "noise_level"
    """Known tokens stand in the sample at noise level 0 (Wan 2.2 TI2V-5B)."""
    CHANNELS = "channels"
    """A mask and the known latents come as further input channels (Wan I2V)."""
    VACE = "vace"
    """Control latents come as further input channels: known content, unknown content, and a mask
    (arXiv 2503.07598)."""
    REPLACEMENT = "replacement"
    """The model knows nothing of it: the known part of the sample is replaced by the known content
    at the step's noise level (arXiv 2201.09865)."""


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Known content of a canvas.

    latents: `[C, T, H, W]`; mask: bool `[T, H, W]`, True where known. Both are None in mode
        CHANNELS and VACE, where `channels [C', T, H, W]` go beside the sample instead.
    """

    mode: KnownMode
    latents: Tensor | None = None
    mask: Tensor | None = None
    channels: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """The text embeddings of a request.

    texts: each `[n, text_dim]`; frame_texts: for each latent frame the index into `texts` of what
    it reads; negative: what the unconditional branch reads; image: CLIP tokens (Wan 2.1 I2V).
    """

    texts: tuple[Tensor, ...]
    frame_texts: tuple[int, ...]
    negative: Tensor | None
    image: Tensor | None = None


@dataclass(slots=True, eq=False)
class Canvas:
    """The latent video of one request.

    latents: float32 `[C, T, H, W]`, the sample at the noise level before `step`.
    noise: the initial noise, same shape.
    wraps: time is a circle (a loop).
    seed: of the fresh noise that stochastic solvers take.
    resample: how often each step is taken (see `VideoRequest`).
    guidances: one for each expert; guidance_memory: what theirs keeps from step to step.
    preview: what the last step makes of the video, uint8 `[T, H, W, 3]`, where the model can tell.
    contexts: by expert, the keys and values of `prompts.texts` and then of `prompts.negative`.
    link: with chained windows, the number of them that are done; `chain` is all of them, in order.
        Every one is taken through the whole schedule: `step` and `num_steps` count over all.
    """

    latents: Tensor
    noise: Tensor
    solver: Solver
    prompts: Prompts
    guidances: tuple[Guidance, ...]
    patch_size: tuple[int, int, int]
    known: Known | None = None
    wraps: bool = False
    seed: int = 0
    resample: int = 1
    window_plan: WindowPlan | SparsePlan | None = None
    solver_state: SolverState = field(default_factory=SolverState)
    contexts: dict[int, list[Context]] = field(default_factory=dict)
    guidance_memory: Tensor | None = None
    preview: np.ndarray | None = None
    link: int = 0
    chain: tuple[Window, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        mask = self._mask_by_level()
        known = None if mask is None else mask.any(dim=2).any(dim=1).cpu()
        total = self.latents.shape[1]
        self.chain = chain_of(self.window_plan, total, known, wraps=self.wraps)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.link * len(self.solver.schedule) + self.level

    @property
    def level(self) -> int:
        """The place on the schedule of the next step."""
        return self.solver_state.step

    @property
    def solver_name(self) -> str:
        return type(self.solver).__name__

    @property
    def num_steps(self) -> int:
        return len(self.solver.schedule) * max(1, len(self.chain))

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def timestep(self) -> float:
        """What the model is told of the noise level before the next step."""
        return self.solver.schedule.timesteps[self.level]

    def guided_at(self, expert: int) -> bool:
        """Whether the next step takes an unconditional prediction."""
        guidance = self.guidances[expert]
        wanted = guidance.needs_unconditional(self.level, len(self.solver.schedule))
        return wanted and self.prompts.negative is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows and branches of one step."""
        _, _, H, W = self.latents.shape
        frames = sum(window.length + len(self.anchors) for window in self.windows())
        branches = 1 if self.prompts.negative is None else 2
        return frames * H * W // math.prod(self.patch_size) * branches

    def windows(self) -> list[Window]:
        """The windows of the next step."""
        if self.chain:
            return [self.chain[self.link]]
        total = self.latents.shape[1]
        return plan_windows(self.window_plan, total, wraps=self.wraps, step=self.step)

    @property
    def settled(self) -> Tensor:
        """Latent frames that earlier windows of the chain have made: bool `[T]`, on the host."""
        settled = torch.zeros(self.latents.shape[1], dtype=torch.bool)
        for window in self.chain[: self.link]:
            settled[window.indices()[window.lead :]] = True
        return settled

    @property
    def anchors(self) -> Tensor:
        """The latent frames that the next step's window sees beside its own: int64 `[a]`."""
        if not self.link or not isinstance(self.window_plan, WindowPlan):
            return torch.empty(0, dtype=torch.int64)
        first = self.chain[0].indices()
        return first[len(first) - self.window_plan.anchors :]

    def part(self, whole: Tensor) -> Tensor:
        """What the next step is about of a tensor `[C, T, H, W]`: the chain's window, or all."""
        return self.windows()[0].of(whole, 1) if self.chain else whole

    def with_part(self, part: Tensor) -> Tensor:
        """The latents with another `part`; what is settled stays as it is."""
        if not self.chain:
            return part
        window = self.windows()[0]
        settled = window.of(self.settled, 0).to(part.device)[:, None, None]
        part = torch.where(settled, self.part(self.latents), part)
        return self.latents.index_copy(1, window.indices().to(part.device), part)

    def move(self, part: Tensor, state: SolverState) -> None:
        """Take the solver's step; at the end of a chained window, turn to the next one."""
        self.latents = self.with_part(part)
        self.solver_state = state
        if not self.chain or self.level < len(self.solver.schedule):
            return
        window = self.windows()[0]
        self.link += 1
        # A lead that no window before has made is made by a later one, from its own noise.
        again = torch.zeros(window.total, dtype=torch.bool)
        again[window.indices()[: window.lead]] = True
        again &= ~self.settled
        again = again.to(self.latents.device)[:, None, None]
        self.latents = torch.where(again, self.noise, self.latents)
        self.solver_state = self.solver.init()
        self.guidance_memory = None

    def keep_latents_alone(self) -> None:
        """Denoising is over: let go of all that only steps need."""
        assert self.finished
        self.contexts.clear()
        self.noise = self.latents
        self.solver_state = SolverState(step=self.level)
        self.known = self.guidance_memory = None

    def impose_known(self) -> None:
        """Put the known content where the model expects it in the sample before the next step."""
        known = self.known
        if known is None or known.latents is None or known.mask is None:
            return
        content = known.latents
        if known.mode is KnownMode.REPLACEMENT and not self.finished:
            content = self.solver.schedule.add_noise(content, self.noise, self.level)
        self.latents = torch.where(known.mask, content, self.latents)

    def segment(self, window: Window, expert: int, *, conditional: bool) -> Segment:
        """The tokens of a window under one guidance branch, those of its anchors first."""
        return Segment(
            latents=self._model_input(window),
            timesteps=self._timesteps(window),
            contexts=self._contexts(window, expert, conditional=conditional),
            sees=self._sees(window),
            anchors=len(self.anchors),
        )

    def _sees(self, window: Window) -> Tensor | None:
        plan = self.window_plan
        if not isinstance(plan, SparsePlan) or plan.holds(window.total):
            return None
        order = window.indices()
        return plan.sees(window.total, wraps=self.wraps, step=self.step)[order][:, order]

    def _model_input(self, window: Window) -> Tensor:
        sample = window.of(self.latents, 1)
        if len(self.anchors):
            anchors = self.latents.index_select(1, self.anchors.to(sample.device))
            sample = torch.cat([anchors, sample], dim=1)
        if self.known is None or self.known.channels is None:
            return sample
        return torch.cat([sample, window.of(self.known.channels, 1).to(sample)])

    def _timesteps(self, window: Window) -> Tensor:
        timesteps = torch.full((window.length,), self.timestep)
        known = self._mask_by_level()
        if known is None and not self.link:
            return timesteps
        mask = window.of(self.settled, 0)[:, None, None].expand(-1, *self.latents.shape[2:])
        if known is not None:
            mask = mask | window.of(known, 0).cpu()
        # Masks cover whole patches (see `prepare`), so the first latent of a patch speaks for it.
        per_token = mask[:, :: self.patch_size[1], :: self.patch_size[2]]
        levels = torch.where(per_token, 0.0, timesteps[:, None, None])
        return torch.cat([levels.new_zeros(len(self.anchors), *levels.shape[1:]), levels])

    def _mask_by_level(self) -> Tensor | None:
        """What the model is told is known by its noise level: bool `[T, H, W]`."""
        known = self.known
        return known.mask if known is not None and known.mode is KnownMode.NOISE_LEVEL else None

    def _contexts(
        self, window: Window, expert: int, *, conditional: bool
    ) -> tuple[tuple[Context, int], ...]:
        contexts = self.contexts[expert]
        frames = torch.cat([self.anchors, window.indices()]).tolist()
        if not conditional:
            return ((contexts[-1], len(frames)),)
        texts = [self.prompts.frame_texts[i] for i in frames]
        return tuple((contexts[text], len(list(group))) for text, group in itertools.groupby(texts))
