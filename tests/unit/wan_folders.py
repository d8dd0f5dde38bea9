"""Tiny Wan folders, as diffusers saves them."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0)]
TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 8}
TINY |= {"ffn_dim": 20, "num_layers": 2, "rope_max_seq_len": 32}
IMAGE = {"image_dim": 16, "added_kv_proj_dim": 24, "in_channels": 36}
VARIANTS = {
    "t2v": {},
    "i2v": IMAGE,
    "first and last frame": {**IMAGE, "pos_embed_seq_len": 10},
    "5b": {"in_channels": 48, "out_channels": 48},
    "no cross-attention norm": {"cross_attn_norm": False, "patch_size": (2, 1, 3)},
}


def transformer(seed=0, **changes):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**{**TINY, **changes})
    for value in model.parameters():
        torch.nn.init.normal_(value)
    return model


def pipeline(boundary_ratio=None, image=False, second=None, **changes):
    parts = {
        "tokenizer": T5Tokenizer(vocab=PIECES, extra_ids=0),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=8, d_model=32, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        "vae": AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1),
        "scheduler": UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True),
        "transformer": transformer(**changes),
        "transformer_2": second,
        "boundary_ratio": boundary_ratio,
    }
    if not image:
        return WanPipeline(**parts)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    parts["image_encoder"] = CLIPVisionModel(
        CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    )
    parts["image_processor"] = CLIPImageProcessorPil()
    return WanImageToVideoPipeline(**parts)
