"""Linear layers in each form that their weights may have in memory, and with adapters of rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sora_kernels as sk
from sora_engine.bench.results import SUBJECT, Measurement
from sora_engine.bench.timing import interleaved
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.quantising import quantise
from sora_engine.models.linear import block_linears
from sora_engine.models.lora import AdaptedLinear, LayerChange, Stretch
from sora_engine.models.quantised import Int8Linear, Keeper, QuantLinear
from sora_kernels.quant import int8

ADAPTERS = 5


@torch.inference_mode()
def linear(
    *, tokens: int = 1056, width: int = 1536, hidden: int = 8960, rounds: int = 5
) -> list[Measurement]:
    """A projection and a feed-forward's two products, by form of the weight; and a projection with
    five adapters of rank 32 on five sixths of the rows, beside none."""
    torch.manual_seed(0)
    found = []
    for name, ins, outs in (
        ("projection", width, width),
        ("up", width, hidden),
        ("down", hidden, width),
    ):
        samples = interleaved(_forms(tokens, ins, outs), rounds)
        found.append(
            Measurement(
                f"linear: {name}, {tokens} rows, {ins} to {outs}",
                "s",
                samples,
                figures={
                    f"{form}, GFLOP/s": 2e-9 * tokens * ins * outs / min(times)
                    for form, times in samples.items()
                },
            )
        )
    samples = interleaved(_adapted(tokens, width), rounds)
    found.append(
        Measurement(
            f"linear: {ADAPTERS} adapters of rank 32 in one batch, {tokens} rows", "s", samples
        )
    )
    return found


def _forms(tokens: int, ins: int, outs: int) -> dict[str, Callable[[], Tensor]]:
    x = torch.randn(tokens, ins)
    half = x.bfloat16()
    dense = nn.Linear(ins, outs).requires_grad_(False)
    low = nn.Linear(ins, outs, dtype=torch.bfloat16).requires_grad_(False)
    codes, scale = int8.quantise_weight(dense.weight)
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        SUBJECT: (_prepacked(dense), x),
        "bf16": (_prepacked(low), half),
        "int8 kept": (QuantLinear(codes, scale, dense.bias, "int8", in_features=ins), x),
    }
    kept = QuantLinear(codes, scale, low.bias, "int8", in_features=ins)
    layers["int8 kept, bf16"] = (kept, half)
    for form, size, values in (("Q8_0", 34, 32), ("Q4_K", 144, 256), ("Q6_K", 210, 256)):
        if ins % values:
            continue
        raw = torch.randint(0, 60, (outs, ins // values, size), dtype=torch.uint8).flatten(1)
        for suffix, given, bias in (("", x, dense.bias), (", bf16", half, low.bias)):
            layers[form + suffix] = (QuantLinear(raw, None, bias, form, in_features=ins), given)
    if int8.problem() is None:
        layers["int8 products"] = (Int8Linear(codes, scale, dense.bias), x)
        layers["int8 products, bf16"] = (Int8Linear(codes, scale, low.bias), half)
        for to in ("int8", "q8_0"):
            layers[f"int8 products, {to} file"] = (_of_file(dense, to), x)
    return {name: _call(layer, given) for name, (layer, given) in layers.items()}


def _of_file(dense: nn.Linear, to: str) -> nn.Module:
    """The layer that `dtype="int8"` makes of a file in which the weight is int8 or Q8_0."""
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Linear(dense.in_features, dense.out_features, device="meta")])
    name = "blocks.0.weight"
    with tempfile.TemporaryDirectory() as folder:
        plain, made = Path(folder) / "plain.safetensors", Path(folder) / "made"
        save_file({name: dense.weight}, plain)
        with open_weights(plain) as source:
            quantise(source, made, to, rename=lambda own: own, architecture="bench")
        with open_weights(made) as source:
            keep = Keeper("int8", ["blocks"])
            keep(module, name, source, name, device="cpu", merge=None)
    layer = module.blocks[0]
    layer.bias = dense.bias
    return layer


def _prepacked(layer: nn.Linear) -> nn.Module:
    holder = nn.Sequential(layer)
    block_linears(holder)
    return holder[0]


def _call(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _adapted(tokens: int, width: int) -> dict[str, Callable[[], Tensor]]:
    x, dense = torch.randn(tokens, width), nn.Linear(width, width).requires_grad_(False)
    base = _prepacked(dense)
    each = tokens // (ADAPTERS + 1)
    stretches = []
    for i in range(ADAPTERS):
        change = LayerChange(torch.randn(32, width), torch.randn(width, 32), 0.5)
        stretches.append(Stretch([(change, 1.0)], i * each, (i + 1) * each))
    adapted = AdaptedLinear(base, stretches)
    sk.lora_linear(x[:1], x[:1], [], [], [], [])  # which backend serves is settled
    return {SUBJECT: lambda: adapted(x), "no adapters": lambda: base(x)}
