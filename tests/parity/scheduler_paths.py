"""A sample's path by a solver and by diffusers' class, with a nonlinear model in the loop."""

from __future__ import annotations

import copy
import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sora_engine.samplers import Solver, load_solver, noise_for

SHAPE = (4, 3, 5, 6)
TOLERANCE = 1e-5
NOISE_SEED = 77

# scheduler_config.json as published with Wan 2.1 T2V (diffusers layout)
WAN_UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.33.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DPM_VP = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction"}
DPM_FLOW = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
UNIPC_VP = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "v_prediction"}


def reference(config: dict[str, Any]) -> Any:
    cls = getattr(diffusers, config["_class_name"])
    return cls(**{k: v for k, v in config.items() if not k.startswith("_")})


def model(x: torch.Tensor, t: float, kind: str = "") -> torch.Tensor:
    """A smooth, bounded, nonlinear prediction that couples neighbours and depends on time."""
    neighbour = torch.roll(x, 1, dims=-1)
    out = torch.tanh(1.5 * x - 0.8 * neighbour + np.sin(t / 100.0))
    # An epsilon far from the sample at pure noise means an x0 of a million, as no model has it.
    return x + (1.0 - t / 1000.0) * out if kind == "flow epsilon" else out


def start(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def kind_of(prediction_type: str, flow: bool) -> str:
    return "flow epsilon" if flow and prediction_type == "epsilon" else prediction_type


def run_reference(
    scheduler: Any, sample: torch.Tensor, first: int = 0, **extra: Any
) -> list[torch.Tensor]:
    config = scheduler.config
    kind = kind_of(
        config.get("prediction_type", ""), config.get("use_flow_sigmas", "shift" in config)
    )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    path = []
    for i, t in enumerate(scheduler.timesteps[first:]):
        out = model(sample, float(t), kind)
        with pytest.MonkeyPatch.context() as patch:
            # The classes that draw their own noise are handed the solver's.
            noise = noise_for(NOISE_SEED, i, SHAPE).to(sample)[None]
            module = sys.modules[type(scheduler).__module__]
            if hasattr(module, "randn_tensor"):
                patch.setattr(module, "randn_tensor", lambda *args, n=noise, **kwargs: n)
            sample = scheduler.step(out[None], t, sample[None], return_dict=False, **extra)[0][0]
        path.append(sample)
    return path


def run_ours(solver: Solver, sample: torch.Tensor) -> list[torch.Tensor]:
    schedule = solver.schedule
    kind = kind_of(schedule.prediction_type, schedule.space == "flow")
    state = solver.init()
    path = []
    for i, t in enumerate(schedule.timesteps):
        noise = noise_for(NOISE_SEED, i, SHAPE) if solver.stochastic else None
        sample, state = solver.step(state, i, sample, model(sample, t, kind), noise=noise)
        path.append(sample)
    return path


def assert_same_schedule(solver: Solver, scheduler: Any, first: int = 0) -> None:
    ours = solver.schedule
    if hasattr(scheduler, "sigmas"):
        assert ours.sigmas == pytest.approx(scheduler.sigmas[first:].tolist(), rel=2e-7, abs=0)
    if scheduler.timesteps.dtype == torch.int64:
        assert list(ours.timesteps) == scheduler.timesteps[first:].tolist()
    else:
        assert ours.timesteps == pytest.approx(scheduler.timesteps[first:].tolist(), rel=2e-7)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def assert_same_path(
    solver: Solver,
    scheduler: Any,
    sample: torch.Tensor,
    first: int = 0,
    last: int | None = None,
    **extra: Any,
) -> None:
    """The float32 path is the class's within 1e-5, the float64 path within 1e-10.

    The class works out its coefficients from float32 levels; given them in float64 it is an exact
    oracle. Twice what its own float32 path loses against that one is added to the first bound:
    in float32 the noise prediction at order 3 amplifies rounding, the class's as ours.
    """
    single = copy.deepcopy(scheduler)
    double = copy.deepcopy(scheduler)
    for levels in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(double, levels):
            setattr(double, levels, getattr(double, levels).double())
    paths = zip(
        run_ours(solver, sample)[:last],
        run_reference(single, sample, first, **extra)[:last],
        run_ours(solver, sample.double())[:last],
        run_reference(double, sample.double(), first, **extra)[:last],
        strict=True,
    )
    exact = 1e-10
    if type(scheduler).__name__.startswith(("FlowMatch", "DPM")):
        exact = 1e-5  # these two step in float32 whatever they are given
    elif type(scheduler).__name__.startswith("DDPM"):
        exact = 1e-9  # where no noise is left to add, this one still adds 1e-10 of it
    for i, (ours, theirs, ours64, theirs64) in enumerate(paths):
        assert distance(ours64, theirs64) <= exact, f"step {i}"
        rounding = distance(theirs, theirs64)
        assert distance(ours, theirs) <= TOLERANCE + 2 * rounding, f"step {i}"


def compare(config: dict[str, Any], n: int, last: int | None = None, **extra: Any) -> None:
    scheduler = reference(config)
    scheduler.set_timesteps(n)
    solver = load_solver(config, num_inference_steps=n, **extra)
    assert_same_schedule(solver, scheduler)
    assert_same_path(solver, scheduler, start(), last=last, **extra)
