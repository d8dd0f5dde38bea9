"""Tiny diffusers models with sharpened random weights: the oracles that the engine must equal.

Random weights as they come are forgiving: modulation near zero, logits near flat. `sharpen` scales
modulation tables, norm gains, value and output projections up until every part of the model moves
the result, so that parity means something (`test_the_comparison_would_notice` in test_pipeline.py
and test_vace.py shows it).
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

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


def tiny_vace(seed: int = 0, **overrides: object) -> WanVACETransformer3DModel:
    torch.manual_seed(seed)
    shape = {**TINY_TRANSFORMER, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 96}
    return sharpen(WanVACETransformer3DModel(**{**shape, **overrides}).eval(), seed)


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
        elif "attn2" in name and any(part in name for part in ("to_v", "to_out")):
            parameter.mul_(9.0)
        elif (
            "to_v" in name
            or "to_out" in name
            or name in ("patch_embedding.weight", "proj_out.weight", "vace_patch_embedding.weight")
            or ("vace_blocks" in name and name.endswith(("proj_in.weight", "proj_out.weight")))
        ):
            parameter.mul_(3.0)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


VACE_KINDS = ("vace", "vace-a14b")
KINDS = ("t2v", "i2v", "flf2v", "a14b-t2v", "a14b-i2v", "ti2v-5b", "ti2v-5b-i2v")
"""The published pipelines, each built tiny by `tiny_pipeline`."""

_WORDS = ["a", "red", "blue", "circle", "square", "moves", "left", "right", "on", "white", "cat"]


def takes_image(kind: str) -> bool:
    """Whether the pipeline of this kind animates an image."""
    return kind.endswith(("i2v", "flf2v"))


def tiny_text_encoder(seed: int):
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=256,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [("▁" + word, -1.0) for word in _WORDS]
    pieces += [("▁", -4.0)] + [(chr(c), -5.0) for c in range(ord("a"), ord("z") + 1)]
    return UMT5EncoderModel(config).eval(), T5Tokenizer(vocab=pieces, extra_ids=0)


def tiny_vae(seed: int, *, residual: bool = False) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    config: dict[str, object] = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    if residual:
        config |= {
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.02 * i - 0.4 for i in range(48)],
            "latents_std": [0.5 + 0.03 * i for i in range(48)],
        }
    vae = AutoencoderKLWan(**config).eval()
    with torch.no_grad():  # random encoders see next to nothing of a picture
        vae.encoder.conv_out.weight.mul_(20.0)
    return vae


def tiny_pipeline(kind: str, seed: int, scheduler: str = "unipc") -> DiffusionPipeline:
    """A published Wan pipeline with tiny sharpened random weights, on the CPU at fp32."""
    text_encoder, tokenizer = tiny_text_encoder(seed)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    parts: dict[str, object] = {
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "vae": tiny_vae(seed, residual=kind.startswith("ti2v")),
        "scheduler": UniPCMultistepScheduler(**flow)
        if scheduler == "unipc"
        else FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer_2": None,
    }
    shape: dict[str, object] = {}
    if kind in ("i2v", "flf2v"):
        shape = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24}
        if kind == "flf2v":
            shape["pos_embed_seq_len"] = 10  # two images of a class token and 2 x 2 patches
        torch.manual_seed(seed)
        parts["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=20,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
                projection_dim=8,
            )
        ).eval()
        parts["image_processor"] = CLIPImageProcessor(crop_size=28, size=28)
    elif kind == "a14b-i2v":
        shape = {"in_channels": 36}
    elif kind.startswith("ti2v"):
        shape = {"in_channels": 48, "out_channels": 48}
        parts["expand_timesteps"] = True
    if kind in VACE_KINDS:
        if kind == "vace-a14b":
            parts["transformer_2"] = tiny_vace(seed + 100)
            parts["boundary_ratio"] = 0.875
        pipe = WanVACEPipeline(transformer=tiny_vace(seed), **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    if kind.startswith("a14b"):
        parts["transformer_2"] = tiny_transformer(seed + 100, **shape)
        parts["boundary_ratio"] = 0.875 if kind == "a14b-t2v" else 0.9
    if takes_image(kind):
        parts.setdefault("image_encoder", None)
        parts.setdefault("image_processor", None)
        pipeline = WanImageToVideoPipeline
    else:
        pipeline = WanPipeline
    pipe = pipeline(transformer=tiny_transformer(seed, **shape), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
