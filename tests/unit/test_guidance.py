"""Guidance against diffusers' guiders and against the formulas in float64."""

from __future__ import annotations

import pytest
import torch

from sora_engine.guidance import cfg, needs_unconditional


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    return both[0], both[0] + 0.3 * both[1]


def test_cfg_bit_for_bit() -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    cond, uncond = pair()
    for scale in (1.5, 4.0, 7.5):
        expected = ClassifierFreeGuidance(scale).forward(cond[None], uncond[None]).pred[0]
        assert torch.equal(cfg(cond, uncond, scale), expected)
    torch.testing.assert_close(cfg(cond, uncond, 1.0), cond)
    torch.testing.assert_close(cfg(cond, uncond, 0.0), uncond)


@pytest.mark.parametrize(("scale", "needed"), [(0.0, False), (1.0, False), (1.01, True), (5, True)])
def test_when_the_unconditional_branch_is_run(scale: float, needed: bool) -> None:
    assert needs_unconditional(scale) is needed
