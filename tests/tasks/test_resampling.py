"""RePaint's resampling: known frames put into the sample reach the others by going back and forth.

Held against a Gaussian world, where the ideal denoiser and the true answer are known exactly.
"""

from __future__ import annotations

import pytest
import torch

import sora_engine as sora
from sora_engine.denoise.canvas import Canvas, Known
from sora_engine.denoise.conditioning import Prompts
from sora_engine.denoise.denoise import advance, go_back
from sora_engine.request import Guidance, KnownMode
from sora_engine.samplers import SamplerConfig, make_solver
from tests.parity.oracles import relative_error, tiny_pipeline

CORRELATION = 0.9


def ideal_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Of two frames `[1, 2, 1, N]` that are standard normal and correlated."""
    prior = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
    alpha = 1 - sigma
    noisy = alpha**2 * prior + sigma**2 * torch.eye(2, dtype=torch.float64)
    gain = alpha * prior @ torch.linalg.inv(noisy)
    x0 = torch.einsum("ab,cbhn->cahn", gain, x.double())
    return ((x.double() - x0) / sigma).float()


def denoise_known(resample: int, solver: str) -> torch.Tensor:
    """The frame beside one that is known to be 2, of many canvases at once: `[N]`."""
    shape = (1, 2, 1, 20_000)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    config = SamplerConfig(solver=solver, space="flow", prediction_type="flow_prediction")
    made = make_solver(config, num_inference_steps=30)
    mask = torch.zeros(shape[1:], dtype=torch.bool)
    mask[0] = True
    known = Known(KnownMode.REPLACEMENT, latents=torch.full(shape, 2.0), mask=mask)
    canvas = Canvas(
        latents=noise,
        noise=noise,
        solver=made,
        prompts=Prompts((), (), None),
        guidances=(Guidance(scale=1.0),),
        patch_size=(1, 1, 1),
        known=known,
        resample=resample,
        solver_state=made.init(),
    )
    while not canvas.finished:
        step = canvas.step
        for visit in range(resample):
            if visit:
                go_back(canvas, step, visit)
            canvas.impose_known()
            sigma = canvas.solver.schedule.level(canvas.step)[1]
            predictions = {(id(canvas), True): ideal_velocity(canvas.latents, sigma)}
            advance(canvas, 0, predictions, None)
    assert torch.equal(canvas.latents[0, 0, 0], torch.full((shape[-1],), 2.0))
    return canvas.latents[0, 1, 0]


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_resampling_comes_nearer_to_the_true_answer(solver):
    """Given 2, the other frame has mean 1.8 and variance 0.19."""
    mean, variance = 2 * CORRELATION, 1 - CORRELATION**2
    once, often = denoise_known(1, solver), denoise_known(8, solver)
    assert abs(often.mean() - mean) < 0.5 * abs(once.mean() - mean)
    assert abs(often.mean() - mean) < 0.15
    assert abs(often.var() - variance) < 0.15


def test_going_back_gives_the_level_its_noise():
    """A sample behind a step, noised back, has the mean and the spread of the level before it."""
    config = SamplerConfig(solver="euler", space="flow", prediction_type="flow_prediction")
    schedule = make_solver(config, num_inference_steps=6, shift=3.0).schedule
    generator = torch.Generator().manual_seed(1)
    for i in range(len(schedule)):
        alpha, sigma = schedule.target(i)
        first, second = (torch.randn(200_000, generator=generator) for _ in range(2))
        back = schedule.go_back(alpha * 1.7 + sigma * first, second, i)
        alpha, sigma = schedule.level(i)
        assert float(back.mean()) == pytest.approx(1.7 * alpha, abs=0.01)
        assert float(back.std()) == pytest.approx(sigma, abs=0.01)


def test_a_request_asks_for_it(tmp_path):
    pipe = tiny_pipeline("t2v", 0)
    pipe.save_pretrained(tmp_path)
    clip = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8).numpy()
    values = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 3, "seed": 1}
    with sora.Engine.from_pretrained(tmp_path, device="cpu") as engine:

        def make(**more):
            return engine.generate(sora.VideoRequest("a red circle", **values, **more)).latents

        plain, again = make(clips=[sora.Clip(clip)]), make(clips=[sora.Clip(clip)], resample=1)
        assert torch.equal(plain, again)
        often = make(clips=[sora.Clip(clip)], resample=3)
        assert relative_error(often[:, :3], plain[:, :3]) < 1e-5
        assert relative_error(often[:, 3:], plain[:, 3:]) > 1e-2
        assert torch.equal(make(resample=3), make())  # nothing is known
        with pytest.raises(sora.RequestError, match="resample must be from 1 to 50, got 0"):
            make(resample=0)
    trained = pytest.raises(sora.RequestError, match="resample is 2: this checkpoint was trained")
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine, trained:
        engine.generate(sora.VideoRequest("a", num_frames=1, resample=2))
