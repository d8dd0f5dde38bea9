"""Tiny LTX-Video pipelines of diffusers with sharpened random weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tests.parity.latent_models import tiny_t5

TINY_LTX = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8,
    "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 32,
}  # fmt: skip
VAE_090 = {
    "latent_channels": 8, "block_out_channels": (8, 12, 16, 16),
    "decoder_block_out_channels": (8, 12, 16, 16), "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5, "patch_size": 1,
}  # fmt: skip
VAE_091 = {
    **VAE_090, "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3, "upsample_residual": (True,) * 3,
    "decoder_inject_noise": (True, True, True, False), "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}  # fmt: skip
VAE_095 = {
    **VAE_091, "block_out_channels": (8, 16, 32, 64, 128), "layers_per_block": (1,) * 5,
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4, "spatio_temporal_scaling": (True,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "decoder_inject_noise": (False,) * 4, "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 8,
}  # fmt: skip
VAES = {"0.9.0": VAE_090, "0.9.1": VAE_091, "0.9.5": VAE_095}
SHIFTED = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05,
    "base_image_seq_len": 1024, "max_image_seq_len": 4096, "shift_terminal": 0.1,
}  # fmt: skip
"""As the published schedulers of 0.9.0 and 0.9.1 have it."""


@torch.no_grad()
def sharpen(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Scale the weights that tiny random models leave too weak to notice, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "scale_shift_table" in name or "per_channel_scale" in name:
            parameter.copy_(noise * 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif "norm_q" in name or "norm_k" in name:
            parameter.copy_(1 + 0.3 * noise)
        elif any(part in name for part in ("to_v", "to_out", "proj_out", "proj_in")):
            parameter.mul_(3.0)
        elif any(part in name for part in ("to_q", "to_k", "timestep_embedder", "time_embed")):
            parameter.mul_(2.0)
    return model.eval().requires_grad_(False)


def tiny_ltx(seed: int = 0, **overrides: object) -> LTXVideoTransformer3DModel:
    torch.manual_seed(seed)
    return sharpen(LTXVideoTransformer3DModel(**{**TINY_LTX, **overrides}), seed)


def tiny_ltx_vae(version: str = "0.9.0", seed: int = 0, **changes: object) -> AutoencoderKLLTXVideo:
    """8 frames and 8 x 8 pixels to a latent."""
    torch.manual_seed(seed)
    vae = sharpen(AutoencoderKLLTXVideo(**{**VAES[version], **changes}), seed)
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    return vae


def tiny_ltx_pipeline(
    kind: type = LTXPipeline, version: str = "0.9.0", seed: int = 0
) -> LTXPipeline | LTXImageToVideoPipeline | LTXConditionPipeline:
    encoder, tokenizer = tiny_t5(seed)
    shifts = {} if kind is LTXConditionPipeline else SHIFTED
    pipeline = kind(
        transformer=tiny_ltx(seed),
        vae=tiny_ltx_vae(version, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifts),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def packed(noise: torch.Tensor) -> torch.Tensor:
    """`[1, C, T, H, W]` as diffusers' LTXPipeline takes it."""
    return LTXPipeline._pack_latents(noise)
