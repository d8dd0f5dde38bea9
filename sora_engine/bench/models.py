"""Random models of published shapes: what a benchmark needs no download for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import WanPipeline

WORDS = ("a", "red", "blue", "circle", "square", "moves", "left", "right", "on", "white", "cat")


@dataclass(frozen=True, slots=True)
class WanShape:
    """A Wan pipeline's sizes; text and VAE are those of Wan 2.1 unless said otherwise."""

    heads: int = 12
    head_dim: int = 128
    ffn_dim: int = 8960
    layers: int = 30
    text_dim: int = 4096
    vae_base_dim: int = 96
    channels: int = 16

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def transformer_config(self) -> dict[str, Any]:
        """The transformer's sizes under diffusers' names, which are `WanConfig`'s."""
        return {
            "patch_size": (1, 2, 2),
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "text_dim": self.text_dim,
            "freq_dim": 256,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        }


WAN_1_3B = WanShape()
WAN_14B = WanShape(heads=40, ffn_dim=13824, layers=40)
WAN_5B = WanShape(heads=24, ffn_dim=14336, layers=30, channels=48)


def random_pipeline(shape: WanShape, seed: int = 0) -> WanPipeline:
    """diffusers' Wan pipeline with random weights at fp32; the text encoder has one thin layer.

    Raises ImportError without diffusers.
    """
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS]
    sizes = {"d_model": shape.text_dim, "d_kv": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    pipe = WanPipeline(
        tokenizer=T5Tokenizer(vocab=pieces, extra_ids=0),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=64, **sizes)).eval(),
        vae=AutoencoderKLWan(base_dim=shape.vae_base_dim).eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=WanTransformer3DModel(**shape.transformer_config()).eval(),
    )
    for part in (pipe.text_encoder, pipe.vae, pipe.transformer):
        part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def long_prompt(words: int) -> str:
    """A prompt of so many tokens (one a word, and the end mark) for `random_pipeline`."""
    return " ".join(WORDS[i % len(WORDS)] for i in range(words - 1))
