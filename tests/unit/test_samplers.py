"""Solver states, request errors and configuration errors; what they compute is under parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sora_engine.errors import CheckpointError, RequestError
from sora_engine.samplers import SolverState, load_solver, read_config

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 3,
}
VP = {"_class_name": "UniPCMultistepScheduler"}


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(1.3 * x - t / 500.0)


def start(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (4, 3, 5, 6), generator=torch.Generator().manual_seed(5))


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    solver = load_solver(UNIPC, num_inference_steps=8)
    through, state = start(), solver.init()
    stopped, saved = start(), solver.init()
    for i, t in enumerate(solver.schedule.timesteps):
        through, state = solver.step(state, i, through, model(through, t))
        saved = SolverState.from_dict({k: v.clone() for k, v in saved.to_dict().items()})
        solver = load_solver(UNIPC, num_inference_steps=8)
        stopped, saved = solver.step(saved, i, stopped, model(stopped, t))
        assert torch.equal(through, stopped)
        assert len(state.history) == min(i + 1, 3)
    forgetful = solver.init(7)
    assert not torch.equal(solver.step(forgetful, 7, start(), start())[0], through)


def test_steps_leave_what_they_are_given() -> None:
    solver = load_solver(UNIPC, num_inference_steps=4)
    x, state = start(), solver.init()
    kept = []
    for i, t in enumerate(solver.schedule.timesteps):
        out = model(x, t)
        tensors = [x, out, *state.to_dict().values()]
        copies = [a.clone() for a in tensors]
        again = solver.step(state, i, x, out)[0]
        kept.append((tensors, copies))
        x, state = solver.step(state, i, x, out)
        assert torch.equal(again, x)
    assert all(
        torch.equal(a, b) for tensors, copies in kept for a, b in zip(tensors, copies, strict=True)
    )


@pytest.mark.parametrize("config", [EULER, UNIPC], ids=["euler", "unipc"])
def test_layouts_do_not_matter(config: dict[str, Any]) -> None:
    solver = load_solver(config, num_inference_steps=5)
    a, b = start(4, 3, 5, 6), start(4, 3, 5, 6).movedim(0, -1).reshape(-1, 4)
    state_a, state_b = solver.init(), solver.init()
    for i, t in enumerate(solver.schedule.timesteps):
        a, state_a = solver.step(state_a, i, a, model(a, t))
        b, state_b = solver.step(state_b, i, b, model(b, t))
    torch.testing.assert_close(a.movedim(0, -1).reshape(-1, 4), b, rtol=1e-6, atol=1e-6)


def test_dtypes_come_back_as_they_went() -> None:
    solver = load_solver(UNIPC, num_inference_steps=3)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, state = solver.step(solver.init(), 0, start().to(dtype), start().to(torch.bfloat16))
        assert x.dtype == dtype
        assert state.history[0].dtype == max(torch.float32, dtype, key=lambda d: d.itemsize)


def test_a_state_of_another_step_is_refused() -> None:
    solver = load_solver(UNIPC, num_inference_steps=3)
    with pytest.raises(ValueError, match="for step 0, not for step 1"):
        solver.step(solver.init(), 1, start(), start())
    with pytest.raises(ValueError, match="step 3 is outside of the 3"):
        solver.step(solver.init(3), 3, start(), start())
    with pytest.raises(ValueError, match=r"\[2, 2\] and sample \[4, 3, 5, 6\]"):
        solver.step(solver.init(), 0, start(), start(2, 2))
    with pytest.raises(ValueError, match="not a solver's state"):
        SolverState.from_dict({"step": torch.tensor(1), "momentum": start()})


def test_renoise_takes_its_noise_from_the_caller() -> None:
    solver = load_solver({**EULER, "stochastic_sampling": True}, sigmas=[1.0, 0.5], shift=1.0)
    assert solver.stochastic
    assert not load_solver(EULER, num_inference_steps=2).stochastic
    with pytest.raises(ValueError, match="takes noise"):
        solver.step(solver.init(), 0, start(), start())
    x, v, noise = start().double(), start().double().flip(0), start().double().flip(1)
    out, state = solver.step(solver.init(), 0, x, v, noise=noise)
    torch.testing.assert_close(out, 0.5 * (x - v) + 0.5 * noise)
    end, _ = solver.step(state, 1, out, v, noise=noise)
    torch.testing.assert_close(end, out - 0.5 * v)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({}, "_class_name None"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "EulerAncestral.*those that can"),
        ({"_class_name": ["UniPC"]}, "cannot|can be read"),
        ({**EULER, "flow_shift": 3.0}, "no key 'flow_shift'"),
        ({**EULER, "shift": "3"}, "shift = '3' is not supported; it must be a number above 0"),
        ({**EULER, "shift": 0.0}, "shift = 0.0"),
        ({**EULER, "shift": float("inf")}, "shift = inf"),
        ({**EULER, "invert_sigmas": True}, "invert_sigmas = True"),
        ({**EULER, "use_beta_sigmas": True}, "use_beta_sigmas = True"),
        ({**EULER, "shift_terminal": 1.5}, "shift_terminal = 1.5"),
        ({**EULER, "use_karras_sigmas": True, "use_exponential_sigmas": True}, "only one of them"),
        ({**UNIPC, "solver_order": 4}, "solver_order = 4.*from 1 to 3"),
        ({**UNIPC, "solver_order": True}, "solver_order = True"),
        ({**UNIPC, "solver_p": {}}, "solver_p = {}"),
        ({**UNIPC, "thresholding": True}, "thresholding = True"),
        ({**UNIPC, "prediction_type": "v_prediction"}, "v-prediction is defined for variance"),
        ({**UNIPC, "use_flow_sigmas": False}, "needs flow levels"),
        ({**UNIPC, "use_exponential_sigmas": True}, "gives no flow levels"),
        ({**UNIPC, "predict_x0": False}, "predict_x0 = true"),
        ({**UNIPC, "lower_order_final": False}, "set lower_order_final to true"),
        ({**UNIPC, "final_sigmas_type": "sigma_max"}, "one of zero, sigma_min"),
        ({**UNIPC, "disable_corrector": "all"}, "a list of step numbers"),
        ({**VP, "beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({**VP, "trained_betas": [0.1, 0.2]}, "holds 2 values.*1000"),
        ({**VP, "shift_terminal": 0.1}, "only flow levels are stretched"),
        ({**VP, "use_dynamic_shifting": True}, "only flow levels are shifted"),
    ],
)
def test_configurations_that_cannot_be_carried_out(config: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_config(config, path="model/scheduler/scheduler_config.json")
    assert str(caught.value).startswith("model/scheduler/scheduler_config.json: ")


@pytest.mark.parametrize(
    ("config", "request_", "match"),
    [
        (UNIPC, {}, "num_inference_steps = None"),
        (UNIPC, {"num_inference_steps": 0}, "num_inference_steps = 0"),
        (UNIPC, {"num_inference_steps": 2.5}, "num_inference_steps = 2.5"),
        (
            UNIPC,
            {"num_inference_steps": 5, "strength": 0.0},
            r"strength = 0.0 must lie in \(0, 1\]",
        ),
        (UNIPC, {"num_inference_steps": 5, "strength": 1.01}, "strength = 1.01"),
        (UNIPC, {"num_inference_steps": 5, "strength": 0.1}, "the least that does is 0.2"),
        (UNIPC, {"num_inference_steps": 3, "strength": 0.3}, "the least that does is 0.3334"),
        (UNIPC, {"num_inference_steps": 5, "shift": -1.0}, "shift = -1.0"),
        (UNIPC, {"num_inference_steps": 5, "shift": float("nan")}, "shift = nan"),
        (UNIPC, {"num_inference_steps": 5, "mu": 1.0}, "shifts by a constant"),
        (UNIPC, {"num_inference_steps": 5, "solver": "heun"}, "solver 'heun'.*euler, unipc"),
        (UNIPC, {"sigmas": []}, "at least one level"),
        (UNIPC, {"sigmas": [1.0, 0.5, 0.5]}, "must fall"),
        (UNIPC, {"sigmas": [1.2, 0.5]}, r"lie in \(0, 1\]"),
        (UNIPC, {"sigmas": [1.0, 0.5, 0.0]}, "leave out the final 0"),
        (UNIPC, {"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "3 and 2 sigmas disagree"),
        ({**EULER, "use_dynamic_shifting": True}, {"num_inference_steps": 5}, "pass mu or shift"),
        (
            {**EULER, "shift_terminal": 0.1},
            {"num_inference_steps": 1},
            "shift_terminal 0.1; take 2 or more",
        ),
        (VP, {"sigmas": [1.0, 0.5]}, "explicit levels are for flow"),
        (VP, {"num_inference_steps": 5, "shift": 3.0}, "have no shift"),
        (VP, {"num_inference_steps": 1001}, "more than the 1000 steps"),
        (VP, {"num_inference_steps": 1000}, "does not fall in step"),
        (VP, {"num_inference_steps": 5, "solver": "euler"}, "'ddim' is its first-order"),
        (
            {**UNIPC, "prediction_type": "epsilon"},
            {"num_inference_steps": 5, "solver": "euler"},
            "use 'unipc'",
        ),
    ],
)
def test_requests_that_cannot_be_met(
    config: dict[str, Any], request_: dict[str, Any], match: str
) -> None:
    with pytest.raises(RequestError, match=match):
        load_solver(config, **request_)


@pytest.mark.parametrize("n", [3, 7, 10, 20, 40])
def test_the_least_strength_named_works(n: int) -> None:
    with pytest.raises(RequestError, match="least") as caught:
        load_solver(UNIPC, num_inference_steps=n, strength=0.5 / n)
    least = float(str(caught.value).rsplit(" ", 1)[1])
    assert len(load_solver(UNIPC, num_inference_steps=n, strength=least).schedule) == 1


def test_shift_by_length_is_a_shift() -> None:
    config = {**EULER, "use_dynamic_shifting": True}
    by_mu = load_solver(config, num_inference_steps=6, mu=1.0).schedule
    by_shift = load_solver(config, num_inference_steps=6, shift=2.718281828459045).schedule
    assert by_mu == by_shift
