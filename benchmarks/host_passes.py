"""What the host does for one pass of a transformer on a GPU, and how many kernels it launches.

    PYTHONPATH=.:kernels python benchmarks/host_passes.py

No GPU is needed: tensors are on the meta device, and ops take them for a card's, up to a driver
that launches nothing (`sora_kernels.testing.launches.host`). Times are this thread's on a
processor. They have Python, torch's dispatcher and the launchers in them, and neither CUDA's driver
nor cuBLAS nor the encoding of tensor maps. A pass of one block is taken off, so that a figure is of
blocks alone. Launches are torch's kernels and Triton's: views and allocations are none, and a
product with its bias and GELU is one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import sora_kernels as sk
from sora_engine.bench.models import WAN_1_3B, WAN_14B, WanShape
from sora_engine.denoise.packing import PackedBatch, Packer, Segment
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_kernels.testing.launches.driver import Driver
from sora_kernels.testing.launches.host import as_card, count_launches

META = torch.device("meta")
SMALL = (5, 30, 26)
"""Latent frames, rows and columns: 975 tokens a branch of guidance, where the host limits."""


def hollow(shape: WanShape) -> WanTransformer:
    """A transformer laid out as on a GPU, without weights."""
    with META:
        model = WanTransformer(WanConfig.from_dict(shape.transformer_config()))
    return model.bfloat16().eval().requires_grad_(False).lay_out_for_cuda()


def guided(model: WanTransformer, text_tokens: int) -> PackedBatch:
    """A batch of both branches of one request, at one noise level."""
    packer = Packer(model.config.patch_size, META)
    texts = [model.example_embedding(text_tokens, META) for _ in range(2)]
    frames = SMALL[0]
    return packer.pack(
        [
            Segment(
                torch.empty(model.config.in_channels, *SMALL, device=META),
                torch.full((frames,), 500.0),
                ((context, frames),),
            )
            for context in model.encode_contexts(texts)
        ]
    )


def launches_a_block(shape: WanShape, driver: Driver, text_tokens: int = 512) -> Counter[str]:
    """Kernels of one block, by name. text_tokens: of 512, to which texts are padded."""
    counts = []
    for layers in (3, 2):
        model = hollow(replace(shape, layers=layers))
        batch = guided(model, text_tokens)
        counts.append(count_launches(partial(model, batch), driver))
    return counts[0] - counts[1]


def milliseconds(call: Callable[[], object]) -> float:
    """Of this thread on its processor."""
    began = time.thread_time()
    call()
    return (time.thread_time() - began) * 1e3


def blocks_cost(shape: WanShape, rounds: int, text_tokens: int = 512) -> tuple[float, float]:
    """Milliseconds of a pass's blocks: the least and the median of `rounds`."""
    models = [hollow(shape), hollow(replace(shape, layers=1))]
    batches = [guided(model, text_tokens) for model in models]
    whole: list[float] = []
    one: list[float] = []
    with torch.inference_mode():
        for i in range(rounds + 2):
            for model, batch, times in zip(models, batches, (whole, one), strict=True):
                took = milliseconds(partial(model, batch))
                if i > 1:  # the first ones look at each kind of call
                    times.append(took)
    share = shape.layers / (shape.layers - 1)
    least, median = min(whole) - min(one), statistics.median(whole) - statistics.median(one)
    return least * share, median * share


def calls(heads: int = 40, head_dim: int = 128, tokens: int = 1950) -> dict[str, Callable[[], Any]]:
    """Calls of a block's ops, by name."""
    dim = heads * head_dim

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    x, residual = made(tokens, dim), made(tokens, dim, dtype=torch.float32)
    gate, scale, shift = made(1, 6, dim, dtype=torch.float32).unbind(1)[:3]
    q, k, v = made(tokens, 3 * heads, head_dim).split(heads, dim=1)
    weight, angles = made(dim), made(tokens, head_dim // 2, dtype=torch.float32)
    offsets = made(3, dtype=torch.int32)
    turn = (q, k, weight, weight, angles, angles)
    longest = {"max_seqlen_q": tokens // 2, "max_seqlen_k": tokens // 2}
    return {
        "norm_modulate": partial(sk.norm_modulate, x, scale, shift),
        "gate_residual_norm_modulate": partial(
            sk.gate_residual_norm_modulate, x, residual, gate, scale, shift
        ),
        "qk_norm_rope": partial(sk.qk_norm_rope, *turn, across_heads=True),
        "packed_attention": partial(sk.packed_attention, q, k, v, offsets, offsets, **longest),
    }


def microseconds(call: Callable[[], Any], count: int = 2000) -> float:
    """Of this thread on its processor: the least of three means."""
    call()
    call()

    def several() -> None:
        for _ in range(count):
            call()

    return min(milliseconds(several) for _ in range(3)) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--text-tokens", type=int, default=512)
    options = parser.parse_args()
    with as_card("meta", 90) as driver:
        print("| model | launches a block | blocks | host work, the least | median |")
        print("|---|---|---|---|---|")
        for name, shape in (("Wan 1.3B", WAN_1_3B), ("Wan 14B", WAN_14B)):
            found = launches_a_block(shape, driver, options.text_tokens)
            least, median = blocks_cost(shape, options.rounds, options.text_tokens)
            times = f"{least:.1f} ms | {median:.1f} ms"
            print(f"| {name} | {found.total()} | {shape.layers} | {times} |", flush=True)
        with torch.inference_mode():
            took = {name: microseconds(call) for name, call in calls().items()}
    print("\nA call: " + ", ".join(f"{name} {each:.0f} us" for name, each in took.items()))
    print("\nA block: " + ", ".join(f"{count} {kernel}" for kernel, count in found.items()))


if __name__ == "__main__":
    main()
