"""Schedules and steps against diffusers' scheduler classes, with a nonlinear model in the loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sora_engine.samplers import load_solver
from tests.parity.scheduler_paths import (
    DDIM,
    DPM_FLOW,
    DPM_VP,
    EULER,
    TOLERANCE,
    UNIPC_VP,
    WAN_UNIPC,
    assert_same_path,
    assert_same_schedule,
    compare,
    model,
    reference,
    run_ours,
    run_reference,
    start,
)


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


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_fresh_noise_each_step(n: int) -> None:
    compare({**EULER, "stochastic_sampling": True}, n)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
def test_dpm_variance_preserving(kind: str, order: int, variant: str, n: int) -> None:
    extra = {"prediction_type": kind, "solver_order": order, "solver_type": variant}
    compare({**DPM_VP, **extra}, n)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("config", ["flow", "vp"])
def test_dpm_sde(config: str, order: int, variant: str, n: int) -> None:
    base = DPM_FLOW if config == "flow" else DPM_VP
    extra = {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "solver_type": variant}
    compare({**base, **extra}, n)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 20, 50])
@pytest.mark.parametrize("kind", ["flow_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_flow(order: int, kind: str, n: int) -> None:
    compare({**DPM_FLOW, "solver_order": order, "prediction_type": kind}, n)


@pytest.mark.parametrize("n", [7, 16])
@pytest.mark.parametrize(
    "extra",
    [
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"use_exponential_sigmas": True},
        {"use_lu_lambdas": True},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_order": 3},
        {"lower_order_final": False, "solver_order": 3},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ],
)
def test_dpm_options(extra: dict[str, Any], n: int) -> None:
    compare({**DPM_VP, **extra}, n)


@pytest.mark.parametrize("n", [1, 2, 7, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
def test_ddim(kind: str, eta: float, n: int) -> None:
    compare({**DDIM, "prediction_type": kind, "clip_sample": False}, n, eta=eta)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize(
    "extra",
    [
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.4},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"steps_offset": 1},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 300},
    ],
)
def test_ddim_and_ddpm_options(extra: dict[str, Any], n: int, name: str) -> None:
    config = {**DDIM, "_class_name": name, "prediction_type": "v_prediction", **extra}
    compare(config, n)
    if name == "DDIMScheduler":
        compare({**config, "set_alpha_to_one": False}, n)


@pytest.mark.parametrize("n", [1, 2, 10, 40])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
def test_ddpm(kind: str, variance: str, n: int) -> None:
    extra = {"prediction_type": kind, "variance_type": variance, "clip_sample": False}
    compare({"_class_name": "DDPMScheduler", **extra}, n)


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


@pytest.mark.parametrize(
    ("config", "name", "equal"),
    [
        (WAN_UNIPC, "dpm++", DPM_FLOW),
        (WAN_UNIPC, "dpm++sde", {**DPM_FLOW, "algorithm_type": "sde-dpmsolver++"}),
        (WAN_UNIPC, "renoise", {**EULER, "stochastic_sampling": True}),
        (EULER, "unipc", WAN_UNIPC),
        ({**DPM_FLOW, "solver_order": 3}, "unipc", WAN_UNIPC),
        (UNIPC_VP, "dpm++", DPM_VP),
        (
            {**DDIM, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
            "unipc",
            UNIPC_VP,
        ),
        (
            {**DDIM, "prediction_type": "v_prediction"},
            "ddpm",
            {
                "_class_name": "DDPMScheduler",
                "prediction_type": "v_prediction",
                "clip_sample": False,
            },
        ),
    ],
)
def test_a_requests_solver_is_its_class(
    config: dict[str, Any], name: str, equal: dict[str, Any]
) -> None:
    solver = load_solver(config, num_inference_steps=8, solver=name)
    scheduler = reference(equal)
    scheduler.set_timesteps(8)
    assert_same_schedule(solver, scheduler)
    assert_same_path(solver, scheduler, start())


@pytest.mark.parametrize("strength", [0.29, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(
    "config",
    [EULER, WAN_UNIPC, {**WAN_UNIPC, "disable_corrector": [6]}, UNIPC_VP, DPM_VP, DPM_FLOW],
    ids=["euler", "unipc", "unipc-without-a-corrector", "unipc-vp", "dpm-vp", "dpm-flow"],
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


# Euler starts at pure noise, where an epsilon prediction says nothing of x0.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in ("unipc", "euler", "dpm++", "ddim")
        for kind in ("flow_prediction", "sample", "epsilon")
        if kind != "epsilon" or name in ("unipc", "dpm++")
    ],
)
@pytest.mark.parametrize("config", [WAN_UNIPC, {**WAN_UNIPC, "solver_order": 3}])
def test_an_ideal_model_ends_at_its_video(name: str, config: dict[str, Any], kind: str) -> None:
    # No reference class: with the exact x0 every solver must end there.
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


def test_few_steps_are_counted_before_strength() -> None:
    # DPM-Solver lowers its order at the end of schedules under 15 steps, the left-out ones counted.
    config = {**DPM_VP, "solver_order": 3}
    scheduler = reference(config)
    scheduler.set_timesteps(20)
    solver = load_solver(config, num_inference_steps=20, strength=0.5)
    assert_same_path(solver, scheduler, start(), first=10)
