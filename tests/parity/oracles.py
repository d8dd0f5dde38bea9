"""Tiny diffusers models with sharpened random weights: the oracles that the engine must equal.

Random weights as they come are forgiving: modulation near zero, logits near flat. `sharpen` scales
modulation tables, norm gains, value and output projections up until every part of the model moves
the result (tests/parity/test_sharpness.py shows it), so that parity means something.
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

TINY_TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def tiny_transformer(seed: int = 0, **overrides: object) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**{**TINY_TRANSFORMER, **overrides}).eval()
    return sharpen(model, seed)


@torch.no_grad()
def sharpen(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Scale the weights that tiny random models leave too weak to notice, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "scale_shift_table" in name:
            parameter.copy_(noise * 0.5)
        elif "norm_q" in name or "norm_k" in name or "norm_added_k" in name:
            parameter.copy_(1.5 + 0.3 * noise)
        elif "norm2.weight" in name:
            parameter.copy_(1.0 + 0.3 * noise)
        elif "pos_embed" in name or name.endswith("norm2.bias"):
            parameter.copy_(0.3 * noise)
        elif "to_v" in name or "to_out" in name or "add_v_proj" in name:
            parameter.mul_(3.0)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())
