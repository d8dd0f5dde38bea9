"""The calls of published models: one transformer block, an autoencoder's frames, other attention.

Every call is an op's public function on tensors of the pretended card.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels.quant.formats import BLOCKS, PLAIN
from sora_kernels.testing import offsets
from sora_kernels.testing.faults import FaultError
from sora_kernels.testing.launches.card import OnCard, empty, on_card

TEXT_TOKENS = 512


@dataclass(frozen=True)
class Model:
    """The sizes of a transformer, and the dtype that its activations flow in."""

    name: str
    heads: int
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Batch:
    """Grids of packed segments in tokens (frames, rows, columns), and the tokens of their texts.

    rows: of the modulation table; several where segments are at several noise levels.
    """

    name: str
    grids: tuple[tuple[int, int, int], ...]
    texts: tuple[int, ...] = (40,)
    rows: int = 1

    @property
    def lengths(self) -> list[int]:
        return [t * h * w for t, h, w in self.grids]


MODELS = (Model("Wan 1.3B", 12), Model("Wan 14B", 40), Model("Wan 5B", 24))
SMALL = Model("small fp32", 4, 64, torch.float32)
BATCHES = (
    Batch("480p", ((21, 30, 52),) * 2, (40, 2)),
    Batch("720p", ((21, 45, 80),) * 2, (40, 2)),
    Batch("1080p", ((21, 68, 120),), (200,)),
    Batch("5B 720p", ((31, 22, 40),), (1,)),
    Batch("empty", ((0, 30, 52),)),
    Batch("16 small", tuple((5, 10 + i, 13) for i in range(16)), tuple(range(1, 17)), 16),
)
JOINED = 16_384
"""Tokens up to which queries, keys and values are one projection's columns."""
Call = tuple[str, Callable[[], Any]]


def checked(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    """A call whose results must be dense, on its first argument's card, and of the dtypes of as
    many of its first arguments: in turn, but that the gated pass gives the residual stream first.
    """
    gated = function is sk.gate_residual_norm_modulate
    models = (args[1], args[0]) if gated else args

    def run() -> Any:
        results = function(*args, **kwargs)
        for result, model in zip(
            results if isinstance(results, tuple) else (results,), models, strict=False
        ):
            if result is None:
                continue
            if not isinstance(result, OnCard) or result.card != args[0].card:
                raise FaultError(f"{name}: a result that is not on its inputs' card")
            if not result.is_contiguous():
                raise FaultError(f"{name}: a result with strides of {result.stride()}")
            due = torch.float32 if kwargs.get("return_lse") and model is args[1] else model.dtype
            if result.dtype != due:
                raise FaultError(f"{name}: a result of {result.dtype}; {due} is due")
        return results

    return name, run


def block(model: Model, batch: Batch, index: int = 0, backend: str = "auto") -> Iterator[Call]:
    """What a Wan block calls, self- and cross-attention with their norms, gates and rotation.

    backend: of attention; the fused passes are served by Triton.
    """
    heads, dim, dtype, fp32 = model.heads, model.dim, model.dtype, torch.float32
    tokens = sum(batch.lengths)

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return empty(*shape, dtype=dtype, index=index)

    attended, x = made(tokens, dim), made(tokens, dim, dtype=fp32)  # the residual stream is fp32
    shift, scale, gate = made(batch.rows, 6, dim, dtype=fp32).unbind(1)[:3]
    rows = None if batch.rows == 1 else made(tokens, dtype=torch.int64)
    weight = made(dim)
    modulated = {"kind": "layer", "eps": 1e-6}
    yield checked("norm", sk.norm_modulate, attended, scale, shift, rows, **modulated)
    gated = sk.gate_residual_norm_modulate
    yield checked(
        "gate, affine", gated, attended, x, gate, None, None, rows, weight=weight, bias=weight
    )
    yield checked("gate, plain", gated, attended, x, None, scale, shift, rows, **modulated)
    yield checked("gate, full", gated, attended, x, gate, scale, shift, rows, **modulated)
    if tokens <= JOINED:
        q, k, v = made(tokens, 3 * heads, model.head_dim).split(heads, dim=1)
    else:
        q, k, v = (made(tokens, heads, model.head_dim) for _ in range(3))
    cos, sin = (made(tokens, model.head_dim // 2, dtype=fp32) for _ in range(2))
    across = {"across_heads": True, "eps": 1e-6}
    yield checked("rope", sk.qk_norm_rope, q, k, weight, weight, cos, sin, **across)
    yield checked("norm of q", sk.qk_norm_rope, q, None, weight, None, None, None, **across)
    cu, texts = (on_card(offsets(lengths), index) for lengths in (batch.lengths, _texts(batch)))
    longest = max(batch.lengths)
    plan = None
    if sk.takes_plan(q, backend):
        plan = sk.plan_attention(
            cu, num_tokens=tokens, head_dim=model.head_dim, dtype=dtype, backend=backend
        )
    attention = sk.packed_attention
    own: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": longest, "plan": plan}
    yield checked("self-attention", attention, q, k, v, cu, cu, **own, backend=backend)
    keys = made(sum(_texts(batch)), heads, model.head_dim)
    seen: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": max(_texts(batch))}
    key, value = made(2, heads, model.head_dim).unbind()
    counts = torch.tensor([TEXT_TOKENS - n for n in _texts(batch)], dtype=torch.int32)
    padding = sk.Padding(key, value, on_card(counts, index))
    seen |= {"plan": plan, "padding": padding, "backend": backend}
    yield checked("cross-attention", attention, q, keys, keys, cu, texts, **seen)


def exact(model: Model, batch: Batch, index: int = 0) -> Iterator[Call]:
    """The products of a block whose rows no company changes."""
    dim, hidden = model.dim, 4 * model.dim
    for name, ins, outs, gelu in (
        ("projection", dim, dim, None),
        ("up", dim, hidden, "tanh"),
        ("down", hidden, dim, None),
        ("patches", 64, dim, None),
        ("head", dim, 64, None),
    ):
        x, weight, bias = (
            empty(*shape, dtype=model.dtype, index=index)
            for shape in ((sum(batch.lengths), ins), (outs, ins), (outs,))
        )
        yield checked(name, sk.invariant_linear, x, weight, bias, gelu=gelu)


def adapters(model: Model, batch: Batch, index: int = 0) -> Iterator[Call]:
    """Low-rank changes of a block's products: adapters of different ranks for the segments, and two
    for the first."""
    dim, hidden = model.dim, 4 * model.dim
    cuts = [0, *itertools.accumulate(batch.lengths)]
    rows = [(cuts[0], cuts[1]), *itertools.pairwise(cuts)]
    ranks = [(4, 16, 33, 128)[i % 4] for i in range(len(rows))]
    for name, ins, outs in (("projection", dim, dim), ("up", dim, hidden), ("down", hidden, dim)):
        made = partial(empty, dtype=model.dtype, index=index)
        x, base = made(cuts[-1], ins), made(cuts[-1], outs)
        down, up = [made(r, ins) for r in ranks], [made(outs, r) for r in ranks]
        scales = [0.5] * len(rows)
        yield checked(f"lora {name}", sk.lora_linear, x, base, down, up, rows, scales)


def quantised(model: Model, batch: Batch, index: int = 0) -> Iterator[Call]:
    """A block's products of weights that stay quantised: int8 with a scale a row, fp8 with one, and
    blocks of GGUF."""
    dim, hidden = model.dim, 4 * model.dim
    for name, ins, outs, form in (
        ("projection", dim, dim, "Q8_0"),
        ("up", dim, hidden, "Q4_K"),
        ("down", hidden, dim, "int8"),
        ("fp8", dim, dim, "float8_e4m3fn"),
    ):
        block = BLOCKS.get(form)
        stored = ins if block is None else ins // block.values * block.size_bytes
        x, bias = (
            empty(*shape, dtype=model.dtype, index=index)
            for shape in ((sum(batch.lengths), ins), (outs,))
        )
        weight = empty(outs, stored, dtype=PLAIN.get(form, torch.uint8), index=index)
        scale = None
        if block is None:
            rows = outs if form == "int8" else 1
            scale = empty(rows, 1, dtype=torch.float32, index=index)
        yield checked(
            f"quantised {name}", sk.quant_linear, x, weight, scale, bias, format=form, gelu="tanh"
        )


def _texts(batch: Batch) -> list[int]:
    """A text for each segment, in turn."""
    return [batch.texts[i % len(batch.texts)] for i in range(len(batch.grids))]


def strided(model: Model, index: int = 0, backend: str = "auto") -> Iterator[Call]:
    """Attention on parts of a fused projection: dense heads in wider rows, and rows that TMA
    cannot address. With a log-sum-exp too, as ranks in a ring ask for it."""
    tokens, heads, width = 700, model.heads, model.head_dim
    cu = on_card(offsets([300, 400]), index)
    lengths = {"max_seqlen_q": 400, "max_seqlen_k": 400, "backend": backend}
    fused = empty(tokens, 3 * heads, width, dtype=model.dtype, index=index)
    q, k, v = fused.split(heads, dim=1)
    yield checked("fused projection", sk.packed_attention, q, k, v, cu, cu, **lengths)
    too: dict[str, Any] = {**lengths, "return_lse": True}
    yield checked("fused projection, lse", sk.packed_attention, q, k, v, cu, cu, **too)
    flat = empty(tokens * heads * (width + 1), dtype=model.dtype, index=index)
    odd = flat.view(tokens, heads, width + 1)[..., :width]
    yield checked("odd rows", sk.packed_attention, odd, odd, odd, cu, cu, **lengths)


def factorised(model: Model, batch: Batch, index: int = 0) -> Iterator[Call]:
    """Temporal and windowed attention over a batch's grids."""
    tokens = sum(batch.lengths)
    q = empty(tokens, model.heads, model.head_dim, dtype=model.dtype, index=index)
    yield checked("temporal", sk.temporal_attention, q, q, q, batch.grids)
    cu = on_card(offsets(batch.lengths), index)
    yield checked("windowed", sk.windowed_attention, q, q, q, cu, batch.grids, (3, 9, 9))


def autoencoder(
    pixels: int, index: int = 0, channels: Sequence[int] = (96, 192, 384)
) -> Iterator[Call]:
    """Norm, SiLU and causal padding of an autoencoder's stages, a latent frame at a time."""
    for i, width in enumerate(channels):
        for frames, kept in ((1, 2), (4, 2)):
            size = pixels >> 2 * i
            x = empty(1, frames, size, width, dtype=torch.bfloat16, index=index)
            past = empty(1, kept, size, width, dtype=torch.bfloat16, index=index)
            weight = empty(width, dtype=torch.float32, index=index)
            yield checked(f"causal {width}", sk.causal_norm_silu, x, past, weight, eps=1e-30)


def _grid(rng: random.Random) -> tuple[int, int, int]:
    """Up to 480p."""
    return rng.randint(1, 21), rng.randint(4, 30), rng.randint(4, 52)


def mixed_requests(model: Model, count: int, seed: int = 0) -> Iterator[list[Call]]:
    """Requests as a service has them: any size, alone or packed, guidance or none, any texts."""
    rng = random.Random(seed)
    for _ in range(count):
        packed = rng.choice((1, 1, 2, 2, 3, 16))
        grid = _grid(rng)
        same = rng.random() < 0.5
        grids = tuple(grid if same else _grid(rng) for _ in range(packed))
        texts = tuple(rng.randint(1, TEXT_TOKENS) for _ in range(packed))
        batch = Batch("mixed", grids, texts, rng.choice((1, 2, packed)))
        frames = autoencoder(64 * grid[1] * grid[2])
        yield [*block(model, batch), *frames]
