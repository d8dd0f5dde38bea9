"""Schedules and steps against diffusers' scheduler classes, with a nonlinear model in the loop."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sora_engine.samplers import Solver, load_solver

SHAPE = (4, 3, 5, 6)
TOLERANCE = 1e-5

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


def run_reference(scheduler: Any, sample: torch.Tensor, first: int = 0) -> list[torch.Tensor]:
    config = scheduler.config
    kind = kind_of(config.get("prediction_type", ""), config.get("use_flow_sigmas", True))
    scheduler.set_begin_index(first)
    path = []
    for t in scheduler.timesteps[first:]:
        out = model(sample, float(t), kind)
        sample = scheduler.step(out[None], t, sample[None], return_dict=False)[0][0]
        path.append(sample)
    return path


def run_ours(solver: Solver, sample: torch.Tensor) -> list[torch.Tensor]:
    schedule = solver.schedule
    kind = kind_of(schedule.prediction_type, schedule.space == "flow")
    state = solver.init()
    path = []
    for i, t in enumerate(schedule.timesteps):
        sample, state = solver.step(state, i, sample, model(sample, t, kind))
        path.append(sample)
    return path


def assert_same_schedule(solver: Solver, scheduler: Any, first: int = 0) -> None:
    ours = solver.schedule
    assert ours.sigmas == pytest.approx(scheduler.sigmas[first:].tolist(), rel=2e-7, abs=0)
    if scheduler.timesteps.dtype == torch.int64:
        assert list(ours.timesteps) == scheduler.timesteps[first:].tolist()
    else:
        assert ours.timesteps == pytest.approx(scheduler.timesteps[first:].tolist(), rel=2e-7)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def assert_same_path(
    solver: Solver, scheduler: Any, sample: torch.Tensor, first: int = 0, last: int | None = None
) -> None:
    """The float32 path is the class's within 1e-5, the float64 path within 1e-10.

    The class works out its coefficients from float32 levels; given them in float64 it is an exact
    oracle. Twice what its own float32 path loses against that one is added to the first bound:
    in float32 the noise prediction at order 3 amplifies rounding, the class's as ours.
    """
    single = copy.deepcopy(scheduler)
    double = copy.deepcopy(scheduler)
    double.sigmas = double.sigmas.double()
    paths = zip(
        run_ours(solver, sample)[:last],
        run_reference(single, sample, first)[:last],
        run_ours(solver, sample.double())[:last],
        run_reference(double, sample.double(), first)[:last],
        strict=True,
    )
    # FlowMatchEuler steps in float32 whatever it is given.
    exact = 1e-5 if "FlowMatch" in type(scheduler).__name__ else 1e-10
    for i, (ours, theirs, ours64, theirs64) in enumerate(paths):
        assert distance(ours64, theirs64) <= exact, f"step {i}"
        rounding = distance(theirs, theirs64)
        assert distance(ours, theirs) <= TOLERANCE + 2 * rounding, f"step {i}"


def compare(config: dict[str, Any], n: int, last: int | None = None) -> None:
    scheduler = reference(config)
    scheduler.set_timesteps(n)
    solver = load_solver(config, num_inference_steps=n)
    assert_same_schedule(solver, scheduler)
    assert_same_path(solver, scheduler, start(), last=last)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_euler(n: int, shift: float) -> None:
    compare({**EULER, "shift": shift}, n)


@pytest.mark.parametrize(
    "extra",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"shift_terminal": 0.1},
        {"num_train_timesteps": 500},
    ],
)
def test_euler_options(extra: dict[str, Any]) -> None:
    compare({**EULER, **extra}, 9)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_euler_dynamic_shift(kind: str) -> None:
    config = {**EULER, "use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": 0.1}
    scheduler = reference(config)
    scheduler.set_timesteps(8, mu=1.3)
    solver = load_solver(config, num_inference_steps=8, mu=1.3)
    assert_same_schedule(solver, scheduler)
    assert_same_path(solver, scheduler, start())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_wan_unipc(n: int, shift: float) -> None:
    compare({**WAN_UNIPC, "flow_shift": shift}, n)


@pytest.mark.parametrize("n", [2, 5, 11, 24])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["flow_prediction", "sample", "epsilon"])
def test_unipc_flow(kind: str, order: int, variant: str, n: int) -> None:
    extra = {"prediction_type": kind, "solver_order": order, "solver_type": variant}
    # The class's bh1 multiplies an infinite B(h) by 0 in a step to level 0.
    compare({**WAN_UNIPC, **extra}, n, last=-1 if variant == "bh1" else None)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
def test_unipc_variance_preserving(kind: str, order: int, variant: str, n: int) -> None:
    extra = {"prediction_type": kind, "solver_order": order, "solver_type": variant}
    compare({**UNIPC_VP, **extra}, n, last=-1 if variant == "bh1" else None)
    compare({**UNIPC_VP, **extra, "final_sigmas_type": "sigma_min"}, n)


@pytest.mark.parametrize("config", [WAN_UNIPC, UNIPC_VP], ids=["flow", "vp"])
def test_the_last_step_of_bh1_is_the_models_video(config: dict[str, Any]) -> None:
    # Where the class gives nan: of first order, to level 0, so it is the corrected x0 itself.
    config = {**config, "prediction_type": "sample", "solver_type": "bh1"}
    scheduler = reference(config)
    scheduler.set_timesteps(6)
    assert run_reference(scheduler, start())[-1].isnan().all()
    path = run_ours(load_solver(config, num_inference_steps=6), start())
    t = load_solver(config, num_inference_steps=6).schedule.timesteps[-1]
    torch.testing.assert_close(path[-1], model(path[-2], t))


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_in_the_noise_prediction(kind: str, order: int) -> None:
    extra = {"prediction_type": kind, "solver_order": order, "predict_x0": False}
    compare({**UNIPC_VP, **extra, "final_sigmas_type": "sigma_min"}, 12)


@pytest.mark.parametrize(
    "extra",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_order": 3},
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 20.0},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"use_exponential_sigmas": True},
        {"disable_corrector": [0, 1, 5]},
        {"num_train_timesteps": 400},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    ],
)
def test_unipc_variance_preserving_options(extra: dict[str, Any]) -> None:
    compare({**UNIPC_VP, **extra}, 13)


@pytest.mark.parametrize(
    "extra",
    [
        {"use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
        {"shift_terminal": 0.1},
        {"disable_corrector": [0, 3]},
        {"num_train_timesteps": 500},
        {"sigma_max": None, "sigma_min": None, "time_shift_type": "exponential"},
    ],
)
def test_unipc_flow_options(extra: dict[str, Any]) -> None:
    compare({**WAN_UNIPC, **extra}, 13)


@pytest.mark.parametrize("config", [EULER, WAN_UNIPC], ids=["euler", "unipc"])
def test_explicit_sigmas(config: dict[str, Any]) -> None:
    sigmas = [1.0, 0.9, 0.62, 0.3]
    scheduler = reference(config)
    scheduler.set_timesteps(sigmas=np.array(sigmas))
    solver = load_solver(config, sigmas=sigmas)
    assert_same_schedule(solver, scheduler)
    assert_same_path(solver, scheduler, start())


def test_a_requests_shift_is_the_classes_own() -> None:
    scheduler = reference({**WAN_UNIPC, "flow_shift": 7.0})
    scheduler.set_timesteps(10)
    assert_same_schedule(load_solver(WAN_UNIPC, num_inference_steps=10, shift=7.0), scheduler)
    scheduler = reference({**EULER, "shift": 7.0})
    scheduler.set_timesteps(10)
    assert_same_schedule(load_solver(EULER, num_inference_steps=10, shift=7.0), scheduler)
    # another solver than the checkpoint's keeps the checkpoint's shift
    scheduler = reference({**EULER, "shift": 3.0})
    scheduler.set_timesteps(10)
    assert_same_schedule(load_solver(WAN_UNIPC, num_inference_steps=10, solver="euler"), scheduler)


@pytest.mark.parametrize("strength", [0.29, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(
    "config",
    [EULER, WAN_UNIPC, {**WAN_UNIPC, "disable_corrector": [6]}, UNIPC_VP],
    ids=["euler", "unipc", "unipc-without-a-corrector", "unipc-vp"],
)
def test_strength(config: dict[str, Any], strength: float) -> None:
    n = 10
    scheduler = reference(config)
    scheduler.set_timesteps(n)
    first = n - min(int(n * strength), n)
    solver = load_solver(config, num_inference_steps=n, strength=strength)
    assert_same_schedule(solver, scheduler, first)
    video, noise = start(1), start(2)
    scheduler.set_begin_index(first)
    add = getattr(scheduler, "add_noise", None)
    t = scheduler.timesteps[first : first + 1]
    noisy = (
        add(video[None], noise[None], t)[0]
        if add is not None
        else scheduler.scale_noise(video[None], t, noise[None])[0]
    )
    torch.testing.assert_close(solver.schedule.add_noise(video, noise), noisy, rtol=1e-6, atol=1e-6)
    assert_same_path(solver, scheduler, noisy, first)


def test_duplicate_timesteps_are_steps_of_their_own() -> None:
    # With a high shift whole-number timesteps repeat. diffusers then looks the first step up by its
    # timestep and starts at the second one unless it is told where to begin.
    config = {**WAN_UNIPC, "flow_shift": 30.0}
    n = 60
    solver = load_solver(config, num_inference_steps=n)
    timesteps = solver.schedule.timesteps
    assert len(set(timesteps)) < n
    assert timesteps[0] == timesteps[1]
    compare(config, n)


def test_seeded_values_of_wan() -> None:
    # Independent of diffusers: shift 5, three steps, from the formula in exact decimals.
    schedule = load_solver(WAN_UNIPC, num_inference_steps=3, shift=5.0).schedule
    raw = [1.0, 1 - 0.999 / 3, 1 - 2 * 0.999 / 3]
    exact = [5 * s / (1 + 4 * s) for s in raw]
    assert schedule.sigmas[1:] == pytest.approx([*exact[1:], 0.0], rel=1e-6)
    assert schedule.sigmas[0] == pytest.approx(1 - 1e-6, abs=1e-7)
    assert schedule.timesteps == (999.0, float(int(1000 * exact[1])), float(int(1000 * exact[2])))


@pytest.mark.parametrize("kind", ["flow_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("config", [WAN_UNIPC, {**WAN_UNIPC, "solver_order": 3}])
@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_an_ideal_model_ends_at_its_video(name: str, config: dict[str, Any], kind: str) -> None:
    # No reference class: with the exact x0 every solver must end there.
    if name == "euler" and kind == "epsilon":
        pytest.skip("Euler starts at pure noise, where epsilon says nothing of x0")
    config = {**config, "prediction_type": kind}
    solver = load_solver(config, num_inference_steps=9, solver=name)
    x0, eps = start(3).double(), start(4).double()
    sample = solver.schedule.add_noise(x0, eps)
    state = solver.init()
    for i in range(len(solver.schedule)):
        alpha, sigma = solver.schedule.level(i)
        noise = (sample - alpha * x0) / sigma
        out = {"flow_prediction": noise - x0, "sample": x0, "epsilon": noise}[kind]
        sample, state = solver.step(state, i, sample, out)
    assert (sample - x0).abs().max() < 1e-9


def test_the_paths_tell_orders_and_correctors_apart() -> None:
    # A comparison within 1e-5 means something only where a wrong order would be far off.
    a = run_ours(load_solver(WAN_UNIPC, num_inference_steps=8), start())[-1]
    b = run_ours(load_solver({**WAN_UNIPC, "solver_order": 1}, num_inference_steps=8), start())[-1]
    c = run_ours(
        load_solver({**WAN_UNIPC, "disable_corrector": [2]}, num_inference_steps=8), start()
    )[-1]
    assert (a - b).abs().max() / a.abs().max() > 100 * TOLERANCE
    assert (a - c).abs().max() / a.abs().max() > 100 * TOLERANCE
