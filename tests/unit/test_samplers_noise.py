"""Noise as a function of its seed, and solvers that take it, against exact distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from sora_engine.errors import CheckpointError, RequestError
from sora_engine.samplers import free_noise, initial_noise, load_solver, noise_for, read_config

SHAPE = (4, 5, 6, 7)
PINNED = [-0.5270612239837646, -0.19304844737052917]
LARGE = [-0.6358714699745178, -1.2343865633010864, 1.7795177698135376, 0.8088502883911133]
FLOW = {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
}


def test_initial_noise_is_diffusers() -> None:
    expected = randn_tensor((1, *SHAPE), generator=torch.Generator().manual_seed(42))[0]
    assert torch.equal(initial_noise(42, SHAPE), expected)


def test_every_bit_of_a_seed_counts() -> None:
    """torch's own generator takes the lower 32 bits: these pairs were the same video."""
    seen = [initial_noise(7, SHAPE)]
    seen += [initial_noise(7 ^ 1 << bit, SHAPE) for bit in range(63)]
    seen += [initial_noise(seed, SHAPE) for seed in (2**63 - 1, 2**63 - 2**32 - 1, 2**32 - 1)]
    for i, one in enumerate(seen):
        assert one.dtype == torch.float32
        assert abs(float(one.mean())) < 4 / math.sqrt(one.numel())
        for other in seen[:i]:
            assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.2
    for seed in (0, 7, 2**31, 2**32 - 1):
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(initial_noise(seed, SHAPE), drawn)
    # Part of the contract, like those below 2**32: drawn by numpy alone.
    large = initial_noise(7 + 2**32, (4,))
    expected = np.random.RandomState([7, 1]).standard_normal(4).astype(np.float32)
    assert large.tolist() == expected.tolist()
    assert large.tolist() == pytest.approx(LARGE, abs=1e-6)


def test_noise_depends_on_seed_and_step_alone() -> None:
    first = noise_for(7, 3, SHAPE)
    torch.manual_seed(1)
    torch.randn(10)
    assert torch.equal(noise_for(7, 3, SHAPE), first)
    others = [noise_for(7, 2, SHAPE), noise_for(8, 3, SHAPE), noise_for(3, 7, SHAPE)]
    others += [initial_noise(7, SHAPE), initial_noise(10, SHAPE)]
    for other in others:
        assert abs(np.corrcoef(first.flatten(), other.flatten())[0, 1]) < 0.12
    # The numbers themselves are part of the contract: a seed must mean the same video next year.
    assert noise_for(7, 3, (2,)).tolist() == pytest.approx(PINNED, abs=1e-6)
    assert noise_for(2**80, -1, (3,)).shape == (3,)


def test_noise_is_standard_normal() -> None:
    many = torch.stack([noise_for(seed, step, (1000,)) for seed in range(10) for step in range(10)])
    assert abs(float(many.mean())) < 4 / math.sqrt(many.numel())
    assert abs(float(many.var()) - 1) < 4 * math.sqrt(2 / many.numel())


@pytest.mark.parametrize(
    ("frames", "window", "stride"),
    [(40, 16, 8), (41, 16, 4), (50, 21, 16), (37, 8, 8), (30, 13, 5)],
)
def test_free_noise_windows_hold_the_same_frames(frames: int, window: int, stride: int) -> None:
    noise = free_noise(3, (2, frames, 4, 4), window=window, stride=stride)
    assert noise.shape == (2, frames, 4, 4)
    base = initial_noise(3, (2, window, 4, 4))
    assert torch.equal(noise[:, :window], base)
    ids = [
        next(j for j in range(window) if torch.equal(noise[:, i], base[:, j]))
        for i in range(frames)
    ]
    for start in range(0, frames - window + 1, stride):
        assert sorted(ids[start : start + window]) == list(range(window))
    # a shuffle, not a repeat of the first window
    assert ids != [i % window for i in range(frames)]
    assert torch.equal(noise, free_noise(3, (2, frames, 4, 4), window=window, stride=stride))
    assert not torch.equal(noise, free_noise(4, (2, frames, 4, 4), window=window, stride=stride))


def test_free_noise_in_a_loop() -> None:
    window, stride, frames = 12, 4, 44
    noise = free_noise(3, (1, frames, 4, 4), window=window, stride=stride, wrap=True)
    flat = [tuple(noise[0, i].flatten().tolist()) for i in range(frames)]
    for start in range(0, frames, stride):
        assert len({flat[(start + j) % frames] for j in range(window)}) == window
    assert len(set(flat)) == window + frames % window


def test_free_noise_of_one_window_is_plain() -> None:
    for frames in (1, 9, 16):
        shape = (2, frames, 3, 3)
        assert torch.equal(free_noise(5, shape, window=16, stride=8), initial_noise(5, shape))
    with pytest.raises(RequestError, match="stride = 17"):
        free_noise(5, (2, 40, 3, 3), window=16, stride=17)


def test_free_noise_is_standard_normal() -> None:
    noise = free_noise(9, (16, 60, 16, 16), window=21, stride=16)
    independent = 16 * 21 * 256
    assert abs(float(noise.mean())) < 4 * math.sqrt(3 / independent)
    assert abs(float(noise.var()) - 1) < 4 * math.sqrt(6 / independent)


@pytest.mark.parametrize("space", ["flow", "vp"])
@pytest.mark.parametrize(
    ("solver", "options"),
    [("dpm++sde", {}), ("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {}), ("dpm++", {})],
)
def test_gaussian_data_comes_out_gaussian(space: str, solver: str, options: dict[str, Any]) -> None:
    """Data of N(0.4, 0.5^2) have an exact denoiser, so every solver tends to that law."""
    mean, std = 0.4, 0.5
    config = {**FLOW} if space == "flow" else {"_class_name": "UniPCMultistepScheduler"}
    config["prediction_type"] = "sample"
    size = (150, 150)

    def error(n: int) -> float:
        made = load_solver(config, num_inference_steps=n, solver=solver, **options)
        schedule = made.schedule
        sample = initial_noise(0, size).double()
        state = made.init()
        for i in range(n):
            alpha, sigma = schedule.level(i)
            gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
            x0 = mean + gain * (sample - alpha * mean)
            sample, state = made.step(state, i, sample, x0, noise=noise_for(0, i, size))
        return max(abs(float(sample.mean()) - mean), abs(float(sample.std()) - std))

    sampling = 4 * std / 150  # of the mean of so many draws
    assert error(240) < max(sampling, error(60) / 3)
    assert error(240) < 0.02


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_is_algorithm_2(variance: str) -> None:
    """Every training step, written as Ho et al. write it (epsilon, 1-based t), in float64."""
    steps = 40
    config = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "beta_end": 0.2,
        "clip_sample": False,
        "variance_type": variance,
    }
    solver = load_solver(config, num_inference_steps=steps)
    beta = torch.linspace(0.0001, 0.2, steps, dtype=torch.float32).double()
    alpha_bar = torch.cumprod(1 - beta, 0)
    x = ours = initial_noise(1, SHAPE).double()
    state = solver.init()
    for i, t in enumerate(range(steps, 0, -1)):
        z = noise_for(1, i, SHAPE).double()
        b, bar = beta[t - 1], alpha_bar[t - 1]
        eps = torch.tanh(x)
        x = (x - b / (1 - bar).sqrt() * eps) / (1 - b).sqrt()
        if t > 1:
            small = (1 - alpha_bar[t - 2]) / (1 - bar)
            x = x + (b * (small if variance == "fixed_small" else 1)).sqrt() * z
        ours, state = solver.step(state, i, ours, torch.tanh(ours), noise=z)
        assert solver.schedule.timesteps[i] == t - 1
        # alphas_cumprod is float32 in the checkpoint's convention, not in the formula
        torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


def test_refused_settings() -> None:
    sde = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
    }
    with pytest.raises(CheckpointError, match="order 1 or 2"):
        read_config(sde)
    with pytest.raises(CheckpointError, match="algorithm_type = 'dpmsolver'"):
        read_config({**sde, "algorithm_type": "dpmsolver"})
    with pytest.raises(CheckpointError, match="no x0 from epsilon"):
        read_config({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True})
    with pytest.raises(CheckpointError, match="variance_type = 'learned'"):
        read_config({"_class_name": "DDPMScheduler", "variance_type": "learned"})
    with pytest.raises(RequestError, match=r"eta = 0.5 for solver 'unipc'"):
        load_solver(FLOW, num_inference_steps=4, eta=0.5)
    with pytest.raises(RequestError, match=r"eta = 1.5"):
        load_solver(FLOW, num_inference_steps=4, solver="ddim", eta=1.5)
