"""Tiny latent diffusion pipelines of diffusers with sharpened random weights."""

from __future__ import annotations

from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

NAMES = {0: "tench, Tinca tinca", 3: "tiger  shark", 7: "golden retriever"}
TINY_DIT = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "in_channels": 4, "out_channels": 8, "attention_bias": True,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
}  # fmt: skip

TINY_LATTE = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8,
    "num_attention_heads": 3, "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 24,
    "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 4,
}  # fmt: skip


def tiny_kl(seed: int = 0) -> AutoencoderKL:
    """Two stages: pictures are twice as large as their latents."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()


@torch.no_grad()
def sharpen(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Scale the weights that tiny random models leave too weak to notice, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "scale_shift_table" in name:
            parameter.copy_(noise * 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif any(part in name for part in ("to_v", "to_out", "norm1.linear", "proj_out")):
            parameter.mul_(3.0)
        elif any(part in name for part in ("to_q", "to_k", "timestep_embedder", "adaln_single")):
            parameter.mul_(2.0)
    return model.eval().requires_grad_(False)


def tiny_dit(seed: int = 0, **overrides: object) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    return sharpen(DiTTransformer2DModel(**{**TINY_DIT, **overrides}), seed)


def tiny_dit_pipeline(seed: int = 0) -> DiTPipeline:
    pipeline = DiTPipeline(
        transformer=tiny_dit(seed),
        vae=tiny_kl(seed),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label=NAMES,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_latte(seed: int = 0, **overrides: object) -> LatteTransformer3DModel:
    torch.manual_seed(seed)
    return sharpen(LatteTransformer3DModel(**{**TINY_LATTE, **overrides}), seed)


def tiny_t5(seed: int = 0) -> tuple[T5EncoderModel, T5Tokenizer]:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8,
    )  # fmt: skip
    letters = [(f"\u2581{letter}", -1.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    letters += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0), *letters]
    model = T5EncoderModel(config).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name or "layer_norm" in name:
            parameter.data.copy_(1 + 0.5 * torch.randn_like(parameter))
    return model, T5Tokenizer(vocab=pieces, extra_ids=0)


def tiny_latte_pipeline(seed: int = 0) -> LattePipeline:
    encoder, tokenizer = tiny_t5(seed)
    pipeline = LattePipeline(
        transformer=tiny_latte(seed),
        vae=tiny_kl(seed),
        scheduler=DDIMScheduler(clip_sample=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_pixart(seed: int = 0, **overrides: object) -> PixArtTransformer2DModel:
    torch.manual_seed(seed)
    shape = {name: value for name, value in TINY_LATTE.items() if name != "video_length"}
    return sharpen(PixArtTransformer2DModel(**{**shape, **overrides}), seed)


def tiny_pixart_pipeline(seed: int = 0) -> PixArtSigmaPipeline:
    encoder, tokenizer = tiny_t5(seed)
    pipeline = PixArtSigmaPipeline(
        transformer=tiny_pixart(seed),
        vae=tiny_kl(seed),
        scheduler=DDIMScheduler(clip_sample=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline: object, noise: torch.Tensor, **arguments: object) -> torch.Tensor:
    """What diffusers decodes, `[C, T, H, W]`, from this noise: raw latents, as `Video.latents`."""
    decoded: list[torch.Tensor] = []
    decode = pipeline.vae.decode

    def remember(latents: torch.Tensor, **named: object) -> object:
        decoded.append(latents)
        return decode(latents, **named)

    module = type(pipeline).__module__
    with patch(f"{module}.randn_tensor", lambda *_, **__: noise.clone()):
        pipeline.vae.decode = remember
        try:
            pipeline(output_type="pt", **arguments)
        finally:
            del pipeline.vae.decode
    (latents,) = decoded
    return latents.transpose(0, 1)
