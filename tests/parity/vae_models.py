"""Tiny autoencoders in pairs: diffusers' `AutoencoderKLWan` the oracle, ours with its weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan

from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig

_STATS48 = {
    "latents_mean": [0.05 * i - 1.0 for i in range(48)],
    "latents_std": [0.4 + 0.03 * i for i in range(48)],
}
_WAN22: dict[str, Any] = {
    "base_dim": 4,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    **_STATS48,
}
# The deep ones have the published models' depth, and all but their width.
LAYOUTS: dict[str, dict[str, Any]] = {
    "wan21": {"base_dim": 4, "num_res_blocks": 1},
    "wan21-deep": {"base_dim": 4},
    "wan22": _WAN22 | {"num_res_blocks": 1},
    "wan22-deep": _WAN22,
    "three-stages": {
        "base_dim": 4,
        "dim_mult": [1, 2, 4],
        "temperal_downsample": [True, True],
        "num_res_blocks": 1,
        "scale_factor_spatial": 4,
    },
    "three-stages-half-time": {
        "base_dim": 6,
        "decoder_base_dim": 4,
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [False, True],
        "num_res_blocks": 1,
        "scale_factor_spatial": 4,
        "scale_factor_temporal": 2,
    },
    # Time doubles where channels shrink: only there do the duplicated frames of a pair differ.
    "residual-early-time": {
        "base_dim": 4,
        "dim_mult": [1, 1, 2, 2],
        "temperal_downsample": [True, False, True],
        "num_res_blocks": 1,
        "is_residual": True,
    },
    "two-stages-residual": {
        "base_dim": 4,
        "dim_mult": [2, 2],
        "temperal_downsample": [True],
        "num_res_blocks": 2,
        "is_residual": True,
        "scale_factor_spatial": 2,
        "scale_factor_temporal": 2,
    },
}


def make_pair(
    layout: str | dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    prepared: bool = True,
) -> tuple[AutoencoderKLWan, WanVAE]:
    """The two classes with one set of weights, frozen; ours laid out for inference or not.

    Gains and biases are random too, so that a layer that ignores one is found out; the last
    convolution is scaled so that hardly a pixel is clipped.
    """
    torch.manual_seed(seed)
    values = LAYOUTS[layout] if isinstance(layout, str) else layout
    oracle = AutoencoderKLWan(**values).eval().requires_grad_(False)
    for name, parameter in oracle.named_parameters():
        if name.endswith("gamma"):
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    oracle.decoder.conv_out.weight.mul_(0.3)
    ours = WanVAE(WanVAEConfig.from_dict(dict(oracle.config))).requires_grad_(False)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return oracle.to(dtype), ours.to(dtype).prepare(prepared)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; shapes must agree."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got.double() - want.double()).norm() / want.double().norm())
