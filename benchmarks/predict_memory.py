"""Prints the tables of docs/wan.md: what Wan 2.1 T2V 1.3B takes on disk and in memory.

    PYTHONPATH=.:kernels python benchmarks/predict_memory.py

Everything is built on the meta device, at the published shapes and without weights: parameters are
counted, and the engine's own planner rehearses the request. Nothing is downloaded, nothing is run.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import torch

from sora_engine.bench.models import WAN_1_3B
from sora_engine.config import Limits
from sora_engine.distributed import layout_cost
from sora_engine.models.video_model import Expert, VideoModel
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.request import (
    GenerationDefaults,
    KnownMode,
    LatentGrid,
    VideoRequest,
    resolve_request,
)
from sora_engine.runtime.memory import MemoryPlan, MemoryPlanner
from sora_engine.samplers import read_config
from sora_engine.text import PromptEncoder
from sora_engine.text.t5_layers import T5Layers, T5Shape
from sora_engine.text.t5_tokenizer import T5Tokenizer
from sora_engine.text.umt5 import UMT5Encoder
from sora_engine.vae.fit import FittedCoder
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig

# google/umt5-xxl's config.json, the encoder of all Wan models.
UMT5_XXL = T5Shape(
    vocab_size=256_384,
    d_model=4096,
    d_kv=64,
    d_ff=10_240,
    num_layers=24,
    num_heads=64,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
    feed_forward_proj="gated-gelu",
    bias_in_each_layer=True,
)
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
PROMPT_TOKENS = 64
DTYPES = (torch.bfloat16, torch.float32)
SIZES = ((480, 832, 81), (480, 832, 17), (480, 832, 1))
GB = 1e9


def hollow_model(dtype: torch.dtype) -> VideoModel:
    """Wan 2.1 T2V 1.3B without its weights. The VAE computes in `dtype`, as on a GPU."""
    meta = torch.device("meta")
    with meta:
        transformer = WanTransformer(WanConfig(**WAN_1_3B.transformer_config())).to(dtype)
        text = T5Layers(UMT5_XXL).to(dtype)
        vae = WanVAE(WanVAEConfig(base_dim=WAN_1_3B.vae_base_dim)).to(dtype)
    coder = FittedCoder(vae, dtype=dtype, device=meta, budget_bytes=1 << 62)
    words = cast("T5Tokenizer", SimpleNamespace(ids=lambda text, most: [0] * PROMPT_TOKENS))
    return VideoModel(
        name="Wan 2.1 T2V 1.3B",
        device=meta,
        dtype=dtype,
        experts=[Expert(lambda: transformer, 0.0, 0, transformer.eval().requires_grad_(False))],
        vae=coder,
        vae_dtype=dtype,
        prompt_encoder=PromptEncoder({"text": UMT5Encoder(text, words)}),
        image_encoder=None,
        takes_last_image=False,
        sampler_config=read_config(SCHEDULER),
        known_mode=KnownMode.REPLACEMENT,
        grid=LatentGrid(channels=16, vae_spatial=8, patch=(1, 2, 2), time=4),
        defaults=GenerationDefaults(
            height=480, width=832, num_frames=81, fps=16.0, num_inference_steps=50,
            guidance_scale=5.0, max_window=21,
        ),
    )  # fmt: skip


def num_parameters(module: torch.nn.Module) -> int:
    """A tensor that two layers share counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def plan_of(model: VideoModel, height: int, width: int, num_frames: int) -> MemoryPlan:
    """What the engine's planner says of a request with guidance, in whole frames."""
    limits = Limits()
    request = resolve_request(
        VideoRequest("a prompt", height=height, width=width, num_frames=num_frames),
        model, limits,
    )  # fmt: skip
    return MemoryPlanner(model, limits.max_batch_tokens, None).plan(request)


def weights_table() -> list[str]:
    model = hollow_model(torch.bfloat16)
    layers = model.vae.layers
    assert layers is not None
    parts = {
        "transformer": num_parameters(model.loaded_transformer),
        "text encoder, UMT5-XXL": sum(map(num_parameters, model.prompt_encoder.modules)),
        "VAE": num_parameters(layers),
    }
    parts["together"] = sum(parts.values())
    rows = ["| part | parameters | in bf16 | in fp32 |", "|---|---|---|---|"]
    for name, count in parts.items():
        rows.append(f"| {name} | {count:,} | {2 * count / GB:.2f} GB | {4 * count / GB:.2f} GB |")
    return rows


def step_flops(height: int, width: int, num_frames: int) -> float:
    """Of a step with guidance."""
    transformer = layout_cost.TransformerCost(
        layers=WAN_1_3B.layers, heads=WAN_1_3B.heads, head_dim=WAN_1_3B.head_dim,
        ffn=WAN_1_3B.ffn_dim, patch_channels=4 * WAN_1_3B.channels,
    )  # fmt: skip
    frames = (num_frames - 1) // 4 + 1
    video = layout_cost.VideoCost(frames=frames, height=height // 8, width=width // 8)
    return layout_cost.layouts_by_cost(1, transformer, video)[0].flops


def peaks_table() -> list[str]:
    head = [f"{stage}, {name}" for name in ("bf16", "fp32") for stage in ("denoise", "decode")]
    rows = [f"| 832x480 | {' | '.join(head)} | a step |", "|---" * 6 + "|"]
    models = [hollow_model(dtype) for dtype in DTYPES]
    for height, width, num_frames in SIZES:
        cells = []
        for model in models:
            plan = plan_of(model, height, width, num_frames)
            cells += [f"{plan.denoise / GB:.2f} GB", f"{plan.decode / GB:.2f} GB"]
        cells.append(f"{step_flops(height, width, num_frames) / 1e12:.0f} TFLOP")
        frames = "1 frame" if num_frames == 1 else f"{num_frames} frames"
        rows.append(f"| {frames} | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    print("\n".join([*weights_table(), "", *peaks_table()]))
