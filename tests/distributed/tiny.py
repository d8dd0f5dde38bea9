"""A video model small enough for eight ranks on one core; all of them make the same weights."""

from __future__ import annotations

import functools
import zlib
from dataclasses import replace

import torch

from sora_engine.models.video_model import Expert, VideoModel
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.samplers import SamplerConfig
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig

CPU = torch.device("cpu")
Z_DIM = 4


def seeded(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights strong enough that every part of a model moves its result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "scale_shift_table" in name:
                value.copy_(0.5 * noise)
            elif "norm" in name and "bias" not in name:
                value.copy_(1.5 + 0.3 * noise)
            elif value.dim() > 1:
                value.copy_(noise * 1.5 / (value[0].numel() ** 0.5))
            else:
                value.copy_(0.1 * noise)
    return module.eval().requires_grad_(False)


class Texts:
    """Stands for a text encoder: random embeddings of a length and with values of the prompt's."""

    reused = 0

    def cut(self, prompts):
        return ()

    def encode(self, prompts):
        made = []
        for prompt in prompts:
            seed = zlib.crc32(prompt.encode())
            generator = torch.Generator().manual_seed(seed)
            made.append({"text": torch.randn(3 + seed % 5, 16, generator=generator)})
        return made


def vae_config(residual=False):
    stages = {
        "dim_mult": (1, 1, 1 if residual else 2),
        "temperal_downsample": (True, False),
        "num_res_blocks": 1,
    }
    if residual:
        return WanVAEConfig(
            base_dim=4, z_dim=Z_DIM, **stages, latents_mean=(0.0,) * Z_DIM,
            latents_std=(1.0,) * Z_DIM, is_residual=True, in_channels=12, out_channels=12,
            patch_size=2, scale_factor_temporal=2, scale_factor_spatial=8,
        )  # fmt: skip
    return WanVAEConfig(
        base_dim=4, z_dim=Z_DIM, **stages, latents_mean=(0.1,) * Z_DIM, latents_std=(0.9,) * Z_DIM,
        scale_factor_temporal=2, scale_factor_spatial=4,
    )  # fmt: skip


@functools.cache
def tiny_vae(residual=False) -> WanVAE:
    return seeded(WanVAE(vae_config(residual)), 5).prepare()


def tiny_config(heads: int = 5, **more: int) -> WanConfig:
    return WanConfig(
        num_attention_heads=heads, attention_head_dim=12, in_channels=Z_DIM, out_channels=Z_DIM,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, **more,
    )  # fmt: skip


@functools.cache
def tiny_transformer(heads: int = 5) -> WanTransformer:
    return seeded(WanTransformer(tiny_config(heads), text_tokens=16), 3)


@functools.cache
def tiny_camera_model(heads: int = 5) -> VideoModel:
    """The same, and it takes a camera."""
    config = tiny_config(heads, in_dim_control_adapter=12, downscale_factor_control_adapter=4)
    transformer = seeded(WanTransformer(config, text_tokens=16), 4)
    experts = [Expert(lambda: transformer, 0.0, 1, transformer)]
    return replace(tiny_model(heads), experts=experts, takes_camera=True)


@functools.cache
def tiny_model(heads: int = 5) -> VideoModel:
    """Two layers, heads of 12 channels, known content by noise level, a VAE of 2 x 4 x 4."""
    transformer = tiny_transformer(heads)
    vae = tiny_vae()
    return VideoModel(
        name="tiny",
        device=CPU,
        dtype=torch.float32,
        experts=[Expert(lambda: transformer, 0.0, 1, transformer)],
        vae=vae,
        vae_dtype=torch.float32,
        prompt_encoder=Texts(),
        image_encoder=None,
        takes_last_image=False,
        sampler_config=SamplerConfig("unipc", "flow", "flow_prediction", shift=3.0),
        known_mode=KnownMode.NOISE_LEVEL,
        grid=LatentGrid(channels=Z_DIM, vae_spatial=4, patch=(1, 2, 2), time=2),
        defaults=GenerationDefaults(
            height=24, width=40, num_frames=5, fps=8.0, num_inference_steps=3, guidance_scale=3.0
        ),
    )
