"""Guidance against diffusers' guiders and against the formulas in float64."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import guiders

from sora_engine.denoise.guidance import apg, cfg, cfg_zero_star, guide, rescaled
from sora_engine.errors import RequestError
from sora_engine.request import Guidance
from sora_engine.request.guidance import needs_unconditional


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    return both[0], both[0] + 0.3 * both[1]


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_cfg_bit_for_bit() -> None:
    cond, uncond = pair()
    for scale in (1.5, 4.0, 7.5):
        guider = guiders.ClassifierFreeGuidance(scale)
        assert torch.equal(
            cfg(cond, uncond, scale), guider.forward(cond[None], uncond[None]).pred[0]
        )
    torch.testing.assert_close(cfg(cond, uncond, 1.0), cond)
    torch.testing.assert_close(cfg(cond, uncond, 0.0), uncond)


@pytest.mark.parametrize(("scale", "needed"), [(0.0, False), (1.0, False), (1.01, True), (5, True)])
def test_when_the_unconditional_branch_is_run(scale: float, needed: bool) -> None:
    assert needs_unconditional(scale) is needed


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_cfg(rescale: float) -> None:
    cond, uncond = pair()
    guider = guiders.ClassifierFreeGuidance(6.0, guidance_rescale=rescale)
    ours = rescaled(cfg(cond, uncond, 6.0), cond, rescale)
    assert_close(ours, guider.forward(cond[None], uncond[None]).pred[0])
    if rescale == 1.0:
        assert_close(ours.std(), cond.std())


def test_cfg_zero_star() -> None:
    cond, uncond = pair()
    guider = guiders.ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=0)
    guider.set_state(0, 10, torch.tensor(999))
    ours = cfg_zero_star(cond, uncond, 5.0)
    assert_close(ours, guider.forward(cond[None], uncond[None]).pred[0])
    # The paper: what is left of cond is orthogonal to the unconditional prediction.
    c, u = cond.double().flatten(), uncond.double().flatten()
    nearest = (c @ u) / (u @ u)
    assert abs(float((c - nearest * u) @ u)) < 1e-9
    exact = nearest * u + 5.0 * (c - nearest * u)
    assert_close(ours.double().flatten(), exact)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eta": 0.0},
        {"eta": 0.4, "norm_threshold": 2.0},
        {"eta": 0.0, "norm_threshold": 3.0, "momentum": -0.5},
        {"momentum": 0.7},
    ],
)
def test_apg_over_several_steps(options: dict[str, float]) -> None:
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=4.0,
        adaptive_projected_guidance_momentum=options.get("momentum"),
        adaptive_projected_guidance_rescale=options.get("norm_threshold", 0.0),
        eta=options.get("eta", 1.0),
    )
    if "momentum" in options:
        from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

        guider.momentum_buffer = MomentumBuffer(options["momentum"])
    guidance = Guidance("apg", 4.0, **options)
    running = None
    for step in range(4):
        cond, uncond = pair(step)
        ours, running = guide(guidance, cond, uncond, step, 4, running)
        assert_close(ours, guider.forward(cond[None], uncond[None]).pred[0])


def test_apg_takes_away_what_lies_along_the_prediction() -> None:
    cond, uncond = (t.double() for t in pair())
    guided, _ = apg(cond, uncond, 4.0, eta=0.0)
    assert abs(float(((guided - uncond) * cond).sum())) < 1e-9
    plain, _ = apg(cond, uncond, 4.0)
    torch.testing.assert_close(plain, cfg(cond, uncond, 4.0))
    short, _ = apg(cond, uncond, 1.0, norm_threshold=0.5)
    assert float((short - uncond).norm()) == pytest.approx(0.5)
    same, _ = apg(cond, cond, 4.0, norm_threshold=0.5)
    torch.testing.assert_close(same, cond)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.15, 0.8), (0.5, 0.5), (0.3, 1.0)])
def test_intervals(start: float, stop: float) -> None:
    cond, uncond = pair()
    guidance = Guidance(scale=5.0, start=start, stop=stop)
    guider = guiders.ClassifierFreeGuidance(5.0, start=start, stop=stop)
    for step in range(13):
        guider.set_state(step, 13, torch.tensor(0))
        expected = guider.forward(cond[None], uncond[None]).pred[0]
        assert guidance.needs_unconditional(step, 13) is (guider.num_conditions == 2)
        given = uncond if guidance.needs_unconditional(step, 13) else None
        assert torch.equal(guide(guidance, cond, given, step, 13)[0], expected)


def test_zero_init() -> None:
    cond, uncond = pair()
    guidance = Guidance("cfg_zero_star", 5.0, zero_init_steps=2)
    guider = guiders.ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=2)
    for step in range(4):
        guider.set_state(step, 4, torch.tensor(0))
        ours, _ = guide(guidance, cond, uncond, step, 4)
        assert_close(ours, guider.forward(cond[None], uncond[None]).pred[0])
    assert not guidance.needs_unconditional(1, 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "pag"}, "'pag' is not known; choose cfg"),
        ({"start": 0.6, "stop": 0.4}, "0.6 to 0.4"),
        ({"stop": 1.2}, "0.0 to 1.2"),
        ({"rescale": -0.1}, "rescale = -0.1"),
        ({"zero_init_steps": 1}, "belongs to cfg_zero_star"),
        ({"eta": 0.2}, r"eta = 0.2 belongs to apg, and cfg does not.*Guidance\('apg', eta=0.2\)"),
        ({"momentum": -0.5}, "momentum = -0.5 belongs to apg, and cfg does not read it"),
        ({"kind": "cfg_zero_star", "norm_threshold": 5}, "norm_threshold = 5 belongs to apg"),
        ({"kind": "apg", "zero_init_steps": 2}, "belongs to cfg_zero_star, and apg does not"),
        ({"kind": "apg", "eta": float("nan")}, "guidance eta must be finite, got nan"),
        ({"kind": "apg", "momentum": "0.5"}, "guidance momentum must be a number, got '0.5'"),
        ({"rescale": float("nan")}, "guidance rescale must be finite, got nan"),
        ({"start": None}, "guidance start must be a number, got None"),
        ({"scale": float("inf")}, "guidance scale must be finite, got inf"),
        ({"scale": True}, "guidance scale must be a number, got True"),
        ({"kind": "cfg_zero_star", "zero_init_steps": -1}, "zero_init_steps = -1 must be 0 or"),
        ({"kind": "cfg_zero_star", "zero_init_steps": 1.5}, "must be an integer, got 1.5"),
    ],
)
def test_guidance_that_makes_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        Guidance(**options)


def test_numbers_of_numpy_become_plain_ones() -> None:
    """A rule goes into files as JSON, which has no others."""
    given = Guidance("apg", np.float32(3.5), eta=torch.tensor(0.5), momentum=np.int64(-1))
    plain = Guidance("apg", 3.5, eta=0.5, momentum=-1.0)
    assert given == plain
    assert json.loads(json.dumps(dataclasses.asdict(given))) == dataclasses.asdict(plain)


def test_a_guided_step_needs_both_predictions() -> None:
    cond, _ = pair()
    with pytest.raises(ValueError, match="step 3 of 8 is guided"):
        guide(Guidance(scale=3.0), cond, None, 3, 8)
