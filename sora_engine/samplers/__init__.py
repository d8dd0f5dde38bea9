"""Solvers of the sampling ODE and SDE, as pure functions of latents and noise levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sora_engine.errors import RequestError
from sora_engine.samplers.ancestral import DDIMSolver, DDPMSolver
from sora_engine.samplers.config import (
    SOLVERS,
    PredictionType,
    SamplerConfig,
    read_config,
    with_solver,
)
from sora_engine.samplers.dpm import DPMSolver
from sora_engine.samplers.euler import EulerSolver, RenoiseSolver
from sora_engine.samplers.noise import free_noise, initial_noise, noise_for
from sora_engine.samplers.schedule import Schedule
from sora_engine.samplers.schedule_builder import build_schedule
from sora_engine.samplers.solver import Solver, SolverState
from sora_engine.samplers.unipc import UniPCSolver

__all__ = [
    "SOLVERS",
    "DDIMSolver",
    "DDPMSolver",
    "DPMSolver",
    "EulerSolver",
    "PredictionType",
    "RenoiseSolver",
    "SamplerConfig",
    "Schedule",
    "Solver",
    "SolverState",
    "UniPCSolver",
    "build_schedule",
    "free_noise",
    "initial_noise",
    "load_solver",
    "make_solver",
    "noise_for",
    "read_config",
    "with_solver",
]


def load_solver(
    config: Mapping[str, object],
    *,
    solver: str | None = None,
    num_inference_steps: int | None = None,
    shift: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
    eta: float = 0.0,
    path: str | Path | None = None,
) -> Solver:
    """The solver of a `scheduler_config.json`, or of the request's choice, for one request.

    The other arguments are those of `build_schedule`; `path` names the file in errors.
    eta: how much of DDPM's noise DDIM adds, from 0 to 1.
    Raises CheckpointError for the configuration, RequestError for the request.
    """
    return make_solver(
        read_config(config, path=path),
        solver=solver,
        num_inference_steps=num_inference_steps,
        shift=shift,
        mu=mu,
        sigmas=sigmas,
        strength=strength,
        eta=eta,
    )


def make_solver(
    config: SamplerConfig,
    *,
    solver: str | None = None,
    num_inference_steps: int | None = None,
    shift: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
    eta: float = 0.0,
) -> Solver:
    """As `load_solver`, from a configuration that was read before."""
    if solver is not None:
        config = with_solver(config, solver)
    schedule = build_schedule(
        config,
        num_inference_steps=num_inference_steps,
        shift=shift,
        mu=mu,
        sigmas=sigmas,
        strength=strength,
    )
    if not 0.0 <= eta <= 1.0 or (eta > 0.0 and config.solver != "ddim"):
        raise RequestError(
            f"eta = {eta} for solver {config.solver!r}: 'ddim' takes 0 to 1, all others 0"
        )
    if config.prediction_type == "epsilon" and schedule.level(0)[0] == 0.0:
        raise RequestError(
            f"solver {config.solver!r} starts at pure noise, where an epsilon prediction says "
            "nothing about the video; use 'unipc'"
        )
    if config.solver == "unipc":
        assert config.solver_type in ("bh1", "bh2")
        return UniPCSolver(
            schedule,
            order=config.solver_order,
            variant="bh1" if config.solver_type == "bh1" else "bh2",
            predict_x0=config.predict_x0,
            lower_order_final=config.lower_order_final,
            disable_corrector=config.disable_corrector,
        )
    if config.solver == "euler":
        return EulerSolver(schedule)
    if config.solver == "renoise":
        return RenoiseSolver(schedule)
    if config.solver == "ddim":
        return DDIMSolver(schedule, eta=eta, clip=config.clip_sample_range)
    if config.solver == "ddpm":
        return DDPMSolver(schedule, variance=config.variance_type, clip=config.clip_sample_range)
    if config.solver in ("dpm++", "dpm++sde"):
        return DPMSolver(
            schedule,
            order=config.solver_order,
            variant="heun" if config.solver_type == "heun" else "midpoint",
            sde=config.solver == "dpm++sde",
            lower_order_final=config.lower_order_final,
            euler_at_final=config.euler_at_final,
        )
    raise AssertionError(f"solver {config.solver!r} has a name and no class")
