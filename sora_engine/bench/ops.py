"""The fused operations and attention on a CPU, beside PyTorch written one op at a time; and one
block of a Wan transformer beside diffusers'. `benchmarks/kernels` goes into every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sora_kernels as sk
from sora_engine.bench.models import WanShape
from sora_engine.bench.results import SUBJECT, Measurement
from sora_engine.bench.timing import interleaved
from sora_engine.denoise.packing import PackedBatch, Packer, Segment
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer

EAGER = "eager PyTorch"


@torch.inference_mode()
def ops(
    *, tokens: int = 2048, heads: int = 12, head_dim: int = 128, rounds: int = 7
) -> list[Measurement]:
    """The three fused passes over `[tokens, heads * head_dim]`, and packed attention over five
    uneven segments, each beside the same written op by op."""
    torch.manual_seed(0)
    width = heads * head_dim
    x, residual = torch.randn(tokens, width), torch.randn(tokens, width)
    gate, scale, shift = (torch.randn(1, width) for _ in range(3))
    q, k, v = (torch.randn(tokens, heads, head_dim) for _ in range(3))
    weight = torch.rand(width) + 0.5
    angle = torch.randn(tokens, head_dim // 2)
    cos, sin = angle.cos(), angle.sin()
    lengths = _uneven(tokens)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)

    def modulated(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), eps=1e-6) * (1 + scale) + shift

    def rotated(y: Tensor) -> Tensor:
        y = F.rms_norm(y.flatten(1), (width,), weight, 1e-6).view(y.shape)
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(y)
        out[..., 0::2] = a * cos[:, None] - b * sin[:, None]
        out[..., 1::2] = a * sin[:, None] + b * cos[:, None]
        return out

    def masked() -> Tensor:
        """What a framework without packing does: pad to the longest, and mask."""
        padded = [torch.zeros(len(lengths), longest, heads, head_dim) for _ in range(3)]
        mask = torch.zeros(len(lengths), 1, 1, longest, dtype=torch.bool)
        for i, n in enumerate(lengths):
            mask[i, ..., :n] = True
            for target, source in zip(padded, (q, k, v), strict=True):
                target[i, :n] = source[int(cu[i]) : int(cu[i + 1])]
        wide = [y.transpose(1, 2) for y in padded]
        return F.scaled_dot_product_attention(wide[0], wide[1], wide[2], attn_mask=mask)

    pairs = {
        "norm_modulate": (lambda: sk.norm_modulate(x, scale, shift), lambda: modulated(x)),
        "gate_residual_norm_modulate": (
            lambda: sk.gate_residual_norm_modulate(x, residual, gate, scale, shift),
            lambda: modulated(residual + x * gate),
        ),
        "qk_norm_rope": (
            lambda: sk.qk_norm_rope(q, k, weight, weight, cos, sin, across_heads=True),
            lambda: (rotated(q), rotated(k)),
        ),
        "packed_attention, five uneven segments": (
            lambda: sk.packed_attention(
                q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest
            ),
            masked,
        ),
    }
    return [
        Measurement(
            f"op: {name}, {tokens} tokens of {width}",
            "s",
            interleaved({SUBJECT: ours, EAGER: eager}, rounds),
        )
        for name, (ours, eager) in pairs.items()
    ]


def _uneven(total: int) -> list[int]:
    """Five lengths that sum to `total`: 2%, 12%, 20%, 26%, 40%."""
    lengths = [max(1, total * share // 100) for share in (2, 12, 20, 26)]
    return [*lengths, total - sum(lengths)]


@torch.inference_mode()
def block(shape: WanShape, grid: tuple[int, int, int], rounds: int = 5) -> list[Measurement]:
    """A transformer of one block, embeddings and head included, on one segment; the text's keys
    are at hand here and computed each time there, as both do from step to step.

    grid: in patches. Raises ImportError without diffusers.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    config = {**shape.transformer_config(), "num_layers": 1}
    theirs = WanTransformer3DModel(**config).eval().requires_grad_(False)
    ours = WanTransformer(WanConfig(**config))
    ours.load_state_dict(theirs.state_dict())
    ours = ours.eval().requires_grad_(False).prepare()
    text = torch.randn(512, shape.text_dim)
    latents = torch.randn(shape.channels, grid[0], 2 * grid[1], 2 * grid[2])
    batch = packed(ours, [(latents, text)])
    expected = theirs(latents[None], torch.tensor([500.0]), text[None], return_dict=False)[0]
    actual = Packer((1, 2, 2), torch.device("cpu")).unpack(ours(batch), batch, shape.channels)[0]
    times = interleaved(
        {
            SUBJECT: lambda: ours(batch),
            "diffusers": lambda: theirs(latents[None], torch.tensor([500.0]), text[None]),
        },
        rounds,
    )
    tokens = grid[0] * grid[1] * grid[2]
    difference = float((actual - expected[0]).abs().max() / expected.abs().max())
    return [
        Measurement(
            f"block: width {shape.width}, {tokens} tokens, embeddings and head included",
            "s",
            times,
            figures={"relative difference": difference},
        )
    ]


def packed(
    model: WanTransformer, videos: list[tuple[Tensor, Tensor]], timestep: float = 500.0
) -> PackedBatch:
    """One batch of latents `[C, T, H, W]`, each with its text `[n, text_dim]`, where those lie."""
    contexts = model.encode_contexts([{"text": text} for _, text in videos])
    patch = model.config.patch_size
    segments = [
        Segment(latents, torch.full((latents.shape[1],), timestep), ((context, latents.shape[1]),))
        for (latents, _), context in zip(videos, contexts, strict=True)
    ]
    return Packer(patch, videos[0][0].device).pack(segments)
