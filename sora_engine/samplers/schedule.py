"""The noise levels that a sample goes through, and the timestep the model is told at each.

The numbers are diffusers' to the last float32 bit where its class has them: the model was trained
on such timesteps, and the tests hold every schedule to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from sora_engine.errors import RequestError
from sora_engine.samplers.config import PredictionType, SamplerConfig, Space

_NUDGE = 1e-6  # how far below 1 a flow level must stay for its log signal-to-noise to be finite


@dataclass(frozen=True)
class Schedule:
    """Noise levels `sigmas [n + 1]` (the last one is where the sample ends) and `timesteps [n]`.

    space "flow": a level is `s` in `x = (1 - s) x0 + s eps`, from 1 down to 0.
    space "vp": a level is the ratio of noise to signal, `x = (x0 + s eps) / sqrt(1 + s^2)`.
    Timesteps are what the model is conditioned on: `1000 s` for flow Euler, whole numbers for the
    others. `start` is how many steps of the full schedule were left out at its beginning because
    the start is a video (`strength`). `targets [n]`, where given, are the levels at which the steps
    arrive, which in diffusers' DDIM need not be those at which the next steps set out.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    prediction_type: PredictionType
    space: Space
    start: int = 0
    targets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1 or not self.timesteps:
            raise ValueError(
                f"{len(self.timesteps)} timesteps need one more level, not {len(self.sigmas)}"
            )

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    @property
    def num_inference_steps(self) -> int:
        """The steps of the full schedule, with those that `strength` left out."""
        return self.start + len(self)

    def level(self, i: int) -> tuple[float, float]:
        """(alpha, sigma) of `x = alpha x0 + sigma eps` before step i; `i == n` is the end."""
        return levels(self.space, self.sigmas[i])

    def target(self, i: int) -> tuple[float, float]:
        """(alpha, sigma) at which step i arrives."""
        return levels(self.space, self.sigmas[i + 1] if self.targets is None else self.targets[i])

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, i: int = 0) -> torch.Tensor:
        """`x0` (any shape) brought to the level before step i with `noise` of the same shape."""
        alpha, sigma = self.level(i)
        return alpha * x0 + sigma * noise

    def go_back(self, x: torch.Tensor, noise: torch.Tensor, i: int) -> torch.Tensor:
        """A sample behind step i, noised back to the level before it (arXiv 2201.09865, eq. 9)."""
        (alpha, sigma), (alpha_after, sigma_after) = self.level(i), self.target(i)
        kept = alpha / alpha_after
        return kept * x + math.sqrt(max(sigma**2 - (kept * sigma_after) ** 2, 0.0)) * noise

    def from_strength(self, strength: float) -> Schedule:
        """The last `int(n * strength)` steps (SDEdit, arXiv 2108.01073; diffusers' video-to-video).

        Raises RequestError unless strength is in (0, 1] and leaves a step.
        """
        n = len(self)
        if not 0.0 < strength <= 1.0:
            raise RequestError(f"strength = {strength} must lie in (0, 1]")
        kept = min(int(n * strength), n)
        if kept == 0:
            raise RequestError(
                f"strength = {strength} of {n} steps leaves no step; the least that does is "
                f"{math.ceil(1e4 / n) / 1e4:g}"
            )
        first = n - kept
        return replace(
            self,
            sigmas=self.sigmas[first:],
            timesteps=self.timesteps[first:],
            targets=None if self.targets is None else self.targets[first:],
            start=self.start + first,
        )


def levels(space: Space, s: float) -> tuple[float, float]:
    """(alpha, sigma) with `x = alpha x0 + sigma eps` at the level `s` of a schedule, in float64."""
    if space == "flow":
        return 1.0 - s, s
    if s == math.inf:
        return 0.0, 1.0
    alpha = 1.0 / math.sqrt(1.0 + s * s)
    return alpha, s * alpha


def log_snr(level: tuple[float, float]) -> float:
    """lambda = log(alpha / sigma), half the log signal-to-noise ratio; inf where sigma is 0."""
    alpha, sigma = level
    if sigma == 0.0:
        return math.inf
    return math.log(alpha) - math.log(sigma)


def build_schedule(
    config: SamplerConfig,
    *,
    num_inference_steps: int | None = None,
    shift: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
) -> Schedule:
    """The schedule of `config.solver` for a request.

    num_inference_steps: how many steps; may be left out when `sigmas` are given.
    shift: overrides the checkpoint's; `s' = shift s / (1 + (shift - 1) s)`. `mu` is the same as
        diffusers' dynamic shifting writes it (exp(mu) is the shift when it is exponential).
    sigmas: the flow levels to set out from, falling, the final 0 left out. As in diffusers they go
        through the shift; `shift=1` takes them as they are.
    strength: start part-way, see `Schedule.from_strength`.
    Raises RequestError that names the value.
    """
    given = None if sigmas is None else _checked_sigmas(config, sigmas, num_inference_steps)
    n = num_inference_steps if given is None else len(given)
    if n is None or isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise RequestError(f"num_inference_steps = {n!r} must be a whole number of 1 or more")
    if config.space == "vp":
        if shift is not None or mu is not None:
            raise RequestError(
                f"shift = {mu if shift is None else shift!r}: this checkpoint's levels are "
                "variance preserving and have no shift; leave it out"
            )
        if n > config.num_train_timesteps:
            raise RequestError(
                f"num_inference_steps = {n} is more than the {config.num_train_timesteps} steps "
                "that the checkpoint was trained with"
            )
        if config.solver in ("unipc", "dpm++", "dpm++sde"):
            schedule = _vp_schedule(config, n)
        else:
            schedule = _discrete_schedule(config, n)
    else:
        resolved = _resolved_shift(config, shift, mu)
        if config.shift_terminal is not None and n == 1:
            raise RequestError(
                "num_inference_steps = 1 cannot both start at level 1 and be stretched to end at "
                f"the checkpoint's shift_terminal {config.shift_terminal}; take 2 or more"
            )
        if config.solver == "unipc":
            schedule = _unipc_flow_schedule(config, n, resolved, given)
        elif config.solver.startswith("dpm++"):
            schedule = _dpm_flow_schedule(config, n, resolved, given)
        else:
            schedule = _euler_schedule(config, n, resolved, given)
    _check_falling(schedule, config)
    return schedule if strength is None else schedule.from_strength(strength)


def _checked_sigmas(
    config: SamplerConfig, sigmas: Sequence[float], num_inference_steps: int | None
) -> np.ndarray:
    given = [float(s) for s in sigmas]
    if config.space == "vp":
        raise RequestError(
            f"sigmas = {given}: this checkpoint's levels are variance preserving; explicit levels "
            "are for flow checkpoints"
        )
    if not given:
        raise RequestError("sigmas = [] gives no step; list at least one level in (0, 1]")
    if num_inference_steps is not None and num_inference_steps != len(given):
        raise RequestError(
            f"num_inference_steps = {num_inference_steps} and {len(given)} sigmas disagree; "
            "leave one out"
        )
    if given[-1] == 0.0:
        raise RequestError(f"sigmas = {given}: leave out the final 0, it is always added")
    falls = all(a > b for a, b in pairwise(given))
    if not falls or not all(0.0 < s <= 1.0 for s in given):
        raise RequestError(f"sigmas = {given} must fall and lie in (0, 1]")
    return np.array(given)


def _resolved_shift(config: SamplerConfig, shift: float | None, mu: float | None) -> float:
    if shift is not None and mu is not None:
        raise RequestError(f"shift = {shift} and mu = {mu} say the same thing; leave one out")
    if mu is not None:
        if not config.use_dynamic_shifting:
            raise RequestError(f"mu = {mu}: the checkpoint shifts by a constant; pass shift")
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    if shift is None:
        if config.use_dynamic_shifting:
            raise RequestError(
                "the checkpoint's shift depends on the video's length; pass mu or shift"
            )
        shift = config.shift
    if not (math.isfinite(shift) and shift > 0.0):
        raise RequestError(f"shift = {shift} must be a number above 0")
    return float(shift)


def _check_falling(schedule: Schedule, config: SamplerConfig) -> None:
    """Steps of no length divide by zero in multistep solvers; only the last may have none."""
    s = schedule.sigmas
    for i in range(len(schedule)):
        last = i == len(schedule) - 1
        if s[i + 1] > s[i] or (s[i + 1] == s[i] and not last) or not math.isfinite(s[i + 1]):
            raise RequestError(
                f"num_inference_steps = {len(schedule)}: the level does not fall in step {i} "
                f"({s[i]:g} to {s[i + 1]:g}); take fewer steps (the checkpoint's "
                f"timestep_spacing is {config.timestep_spacing})"
            )


def _shifted(s: np.ndarray, shift: float) -> np.ndarray:
    return shift * s / (1 + (shift - 1) * s)


def _stretched(s: np.ndarray, terminal: float | None) -> np.ndarray:
    """Levels stretched about 1 so that the last is `terminal` (LTX-Video)."""
    if terminal is None:
        return s
    clean = 1 - s
    return 1 - clean * (1 - terminal) / clean[-1]


def _spaced(config: SamplerConfig, first: float, last: float, n: int) -> np.ndarray:
    """n levels from `first` down to `last`, spaced as Karras et al. (arXiv 2206.00364, eq. 5) or
    evenly in their logarithm."""
    first = config.sigma_max if config.sigma_max is not None else first
    last = config.sigma_min if config.sigma_min is not None else last
    ramp = np.linspace(0, 1, n)
    if config.sigma_spacing == "karras":
        rho = 7.0
        high, low = first ** (1 / rho), last ** (1 / rho)
        return (high + ramp * (low - high)) ** rho
    return np.exp(np.linspace(math.log(first), math.log(last), n))


def _finished(
    config: SamplerConfig,
    s: np.ndarray,
    timesteps: np.ndarray,
    final: float,
) -> Schedule:
    return Schedule(
        sigmas=tuple(float(v) for v in np.append(s, final).astype(np.float32)),
        timesteps=tuple(float(t) for t in timesteps),
        prediction_type=config.prediction_type,
        space=config.space,
    )


def _euler_schedule(
    config: SamplerConfig, n: int, shift: float, given: np.ndarray | None
) -> Schedule:
    """FlowMatchEulerDiscreteScheduler: timesteps are the float levels times 1000."""
    train = config.num_train_timesteps
    s: np.ndarray
    if given is not None:
        s = given.astype(np.float32)
    else:
        # The ends of the training schedule, which is itself shifted, in float32; so the shift acts
        # twice on the lower end, as it does in the reference.
        ends = torch.tensor([train, 1], dtype=torch.float32) / train
        if not config.use_dynamic_shifting:
            ends = shift * ends / (1 + (shift - 1) * ends)
        s = np.linspace(ends[0].item() * train, ends[1].item() * train, n) / train
    s = _stretched(_shifted(s, shift), config.shift_terminal)
    if config.sigma_spacing is not None:
        s = _spaced(config, float(s[0]), float(s[-1]), n)
    s = s.astype(np.float32)
    return _finished(config, s, s * np.float32(train), 0.0)


def _unipc_flow_schedule(
    config: SamplerConfig, n: int, shift: float, given: np.ndarray | None
) -> Schedule:
    """UniPCMultistepScheduler with flow sigmas: timesteps are cut to whole numbers, so that two
    neighbouring steps can share one."""
    train = config.num_train_timesteps
    if config.sigma_spacing == "karras":
        if given is not None:
            raise RequestError(f"sigmas = {given.tolist()}: the checkpoint spaces its own levels")
        ratios = _vp_ratios(config)
        s = _spaced(config, float(ratios[-1]), float(ratios[0]), n)
        s = s / (s + 1)
    else:
        s = np.linspace(1, 1 / train, n + 1)[:-1] if given is None else given
        s = _stretched(_shifted(s, shift), config.shift_terminal)
        s = _below_one(s)
    final = s[-1] if config.final_sigmas_type == "sigma_min" else 0.0
    return _finished(config, s, (s * train).astype(np.int64), final)


def _dpm_flow_schedule(
    config: SamplerConfig, n: int, shift: float, given: np.ndarray | None
) -> Schedule:
    """DPMSolverMultistepScheduler with flow sigmas: starts a training step below 1."""
    train = config.num_train_timesteps
    if given is not None:
        s = _below_one(_shifted(given, shift))
    else:
        clean = np.linspace(1, 1 / train, n + 1)
        s = _shifted(1.0 - clean, shift)[::-1][:-1]
    final = _vp_ratios(config)[0] if config.final_sigmas_type == "sigma_min" else 0.0
    return _finished(config, s, (s * train).astype(np.int64), float(final))


def _below_one(s: np.ndarray) -> np.ndarray:
    if abs(s[0] - 1) < _NUDGE:
        s = s.copy()
        s[0] -= _NUDGE
    return s


def alphas_cumprod(config: SamplerConfig) -> torch.Tensor:
    """The squared signal level after each training step, float32 [num_train_timesteps]."""
    n = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, n, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        ends = config.beta_start**0.5, config.beta_end**0.5
        betas = torch.linspace(*ends, n, dtype=torch.float32) ** 2
    else:  # squaredcos_cap_v2: Nichol and Dhariwal, arXiv 2102.09672, eq. 17

        def signal(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = torch.tensor(
            [min(1 - signal((i + 1) / n) / signal(i / n), 0.999) for i in range(n)],
            dtype=torch.float32,
        )
    if config.rescale_betas_zero_snr:
        betas = _without_terminal_signal(betas)
    products = torch.cumprod(1.0 - betas, dim=0)
    if config.rescale_betas_zero_snr and config.solver in ("unipc", "dpm++", "dpm++sde"):
        products[-1] = 2**-24  # these solvers need a finite first level
    return products


def _without_terminal_signal(betas: torch.Tensor) -> torch.Tensor:
    """Betas moved so that the last step leaves no signal (Lin et al., arXiv 2305.08891, alg. 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    products = root**2
    return 1 - torch.cat([products[:1], products[1:] / products[:-1]])


def _vp_ratios(config: SamplerConfig) -> np.ndarray:
    """sqrt((1 - a) / a), noise to signal after each training step, float32, rising."""
    products = alphas_cumprod(config)
    return np.array(((1 - products) / products) ** 0.5)


def _spread_timesteps(spacing: str, last: int, train: int, n: int, offset: int) -> np.ndarray:
    """n of the timesteps 0..last-1, falling, for multistep solvers (which leave the lowest out)."""
    if spacing == "linspace":
        return np.linspace(0, last - 1, n + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(n, 0, -1) * (last // (n + 1)) + offset
    return np.arange(last, 0, -train / n).round().astype(np.int64) - 1


def _vp_schedule(config: SamplerConfig, n: int) -> Schedule:
    """UniPC and DPM-Solver++ on variance-preserving levels."""
    ratios = _vp_ratios(config)
    train = config.num_train_timesteps
    logs = np.log(ratios)
    if config.sigma_spacing is None:
        last = train
        if config.solver != "unipc":
            products = alphas_cumprod(config)
            snr = torch.log(torch.sqrt(products)) - torch.log(torch.sqrt(1 - products))
            floor = torch.tensor(config.lambda_min_clipped, dtype=torch.float32)
            last = train - int(torch.searchsorted(snr.flip(0), floor))
        timesteps = _spread_timesteps(config.timestep_spacing, last, train, n, config.steps_offset)
        if timesteps.min() < 0 or timesteps.max() >= train:
            raise RequestError(
                f"num_inference_steps = {n} asks for timesteps {timesteps.max()} to "
                f"{timesteps.min()}, outside of the {train} trained ones; take another number"
            )
        s = np.interp(timesteps, np.arange(len(ratios)), ratios)
    else:
        if config.sigma_spacing == "lu":
            # arXiv 2206.00927: even steps in the log signal-to-noise ratio.
            s = np.exp(np.linspace(0, 1, n) * (logs[0] - logs[-1]) + logs[-1])
        else:
            s = _spaced(config, ratios[-1].item(), ratios[0].item(), n)
        timesteps = np.array([_timestep_of(v, logs) for v in s])
        # The reference classes round some of these before they cut them to whole numbers.
        cosine = config.beta_schedule == "squaredcos_cap_v2"
        if config.sigma_spacing != "exponential" and (config.solver == "unipc" or not cosine):
            timesteps = timesteps.round()
        timesteps = timesteps.astype(np.int64)
    final = 0.0
    if config.final_sigmas_type == "sigma_min":
        unipc_spaced = config.solver == "unipc" and config.sigma_spacing is not None
        final = float(s[-1]) if unipc_spaced else float(ratios[0])
    return _finished(config, s, timesteps, final)


def _timestep_of(s: float, logs: np.ndarray) -> float:
    """The training timestep at the noise-to-signal ratio `s`, interpolated in its logarithm."""
    log = np.log(np.maximum(s, 1e-10))
    low = int(np.clip(np.searchsorted(logs, log, side="right") - 1, 0, len(logs) - 2))
    weight = np.clip((logs[low] - log) / (logs[low] - logs[low + 1]), 0, 1)
    return float((1 - weight) * low + weight * (low + 1))


def _discrete_schedule(config: SamplerConfig, n: int) -> Schedule:
    """DDIM and DDPM: training timesteps, each with the level it was trained at."""
    train = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        timesteps = np.linspace(0, train - 1, n).round()[::-1].astype(np.int64)
    elif config.timestep_spacing == "leading":
        timesteps = np.arange(n - 1, -1, -1) * (train // n) + config.steps_offset
    else:
        timesteps = np.round(np.arange(train, 0, -train / n)).astype(np.int64) - 1
    if timesteps.min() < 0 or timesteps.max() >= train:
        raise RequestError(
            f"num_inference_steps = {n} asks for timesteps {timesteps.max()} to "
            f"{timesteps.min()}, outside of the {train} trained ones; take another number"
        )
    products = alphas_cumprod(config).double().numpy()
    with np.errstate(divide="ignore"):
        ratios = np.sqrt((1 - products) / products)
    final = 0.0 if config.set_alpha_to_one or config.solver != "ddim" else float(ratios[0])
    s = tuple(float(ratios[t]) for t in timesteps)
    targets = None
    if config.fixed_stride and config.solver == "ddim":
        previous = timesteps - train // n
        targets = tuple(float(ratios[t]) if t >= 0 else final for t in previous)
        if targets[:-1] == s[1:] and targets[-1] == final:
            targets = None
    return Schedule(
        sigmas=(*s, final),
        timesteps=tuple(float(t) for t in timesteps),
        prediction_type=config.prediction_type,
        space="vp",
        targets=targets,
    )
