"""Linear layers whose weights stay quantised in memory.

`dtype="as-stored"` keeps the matrices of blocks as their file has them: int8, fp8, or blocks of
GGUF. Nothing is lost by that: each product dequantises them. `dtype="int8"` and `"fp8"` lose
something: they quantise what layers read, too, for faster products (int8 on a CPU, fp8 on a GPU
that has it), and int8 quantises whatever the file has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sora_engine.errors import BackendError
from sora_engine.io.loading import submodule
from sora_engine.io.weights.codings import hadamard
from sora_engine.io.weights.merging import Merge
from sora_engine.io.weights.source import PIECE_VALUES, WeightSource
from sora_engine.models.linear import BlockedLinear, InvariantLinear
from sora_kernels import invariant_linear, quant_linear
from sora_kernels.quant import int8
from sora_kernels.quant.native import dequantised

KINDS = ("as-stored", "int8", "fp8")
SCRATCH_BYTES = 64 << 20
"""What a product unpacks at a time on a CPU, at most; oneDNN lays it out once more."""


def split_dtype(dtype: str | torch.dtype) -> tuple[str, str | torch.dtype]:
    """A kind of `KINDS` or "", and the dtype of activations: "as-stored:bfloat16" is both."""
    if isinstance(dtype, str):
        kind, _, rest = dtype.partition(":")
        if kind in KINDS:
            return kind, rest or "auto"
    return "", dtype


def check_kind(kind: str, device: torch.device) -> None:
    """Raises BackendError where such products cannot be taken there."""
    if kind == "int8":
        why = "int8 products are of a CPU" if device.type != "cpu" else int8.problem()
        if why is not None:
            raise BackendError(
                f"dtype 'int8' cannot serve on {device}: {why}; 'as-stored' would work"
            )
    if kind == "fp8":
        able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        if not able:
            raise BackendError(
                f"dtype 'fp8' cannot serve on {device}: fp8 products are of GPUs of compute "
                "capability 8.9 and newer; 'as-stored' would work"
            )


class QuantLinear(nn.Module):
    """A linear layer of a weight as `sora_kernels.quant_linear` takes it.

    The weight and its scale are buffers, so that they visit a device as others do. error: squares
    of what quantising lost and of the weight, where it was done on loading. exact: no row's bits
    may depend on the rows beside it, on any device.
    """

    weight: Tensor
    scale: Tensor | None
    bias: nn.Parameter | None
    error: tuple[float, float] | None = None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        bias: nn.Parameter | None,
        format: str,
        *,
        in_features: int,
        rotation: int = 0,
        backend: str = "auto",
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = in_features, weight.shape[0]
        self.format, self.rotation = format, rotation
        self.backend, self.exact = backend, exact

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, None)

    def with_gelu(self, x: Tensor, approximate: str) -> Tensor:
        """`gelu(self(x))`, `approximate` as of `torch.nn.functional.gelu`."""
        return self._run(x, approximate)

    def hollow(self) -> QuantLinear:
        """A layer of the same shape on the meta device, to rehearse what it will need."""
        made = [
            None if t is None else torch.empty_like(t, device="meta")
            for t in (self.weight, self.scale, self.bias)
        ]
        assert made[0] is not None
        bias = None if made[2] is None else nn.Parameter(made[2], requires_grad=False)
        return QuantLinear(
            made[0], made[1], bias, self.format, in_features=self.in_features,
            rotation=self.rotation, backend=self.backend, exact=self.exact,
        )  # fmt: skip

    def _run(self, x: Tensor, gelu: str | None) -> Tensor:
        if self.rotation:  # of the inputs' groups, which undoes that of the weight's
            matrix = hadamard(self.rotation).to(x.device, x.dtype)
            x = (x.view(len(x), -1, self.rotation) @ matrix).view(x.shape)
        if self.exact:
            dense = dequantised(self.weight, self.scale, self.format, x.dtype)
            return invariant_linear(x, dense, self.bias, gelu=gelu)
        if x.is_meta:  # what is unpacked on a CPU; a GPU's kernel unpacks in registers
            values = self.out_features * self.in_features
            x.new_empty(2 * min(values, SCRATCH_BYTES // x.element_size()))
        return quant_linear(
            x, self.weight, self.scale, self.bias, format=self.format, gelu=gelu,
            backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}, {self.backend}"


class Int8Linear(nn.Module):
    """A linear layer of int8 products on a CPU: its rows of activations are quantised as they come.

    The weight is in oneDNN's layout for good: there is no `state_dict`, and no way back. Sums are
    of integers, so no row's bits depend on the rows beside it.
    """

    format = "int8"
    error: tuple[float, float] | None = None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        # Not a buffer: modules cannot copy, cast or save oneDNN's tensors.
        self.packed: Any = None if weight.is_meta else int8.pack(weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, "")

    def with_gelu(self, x: Tensor, approximate: str) -> Tensor:
        """`gelu(self(x))`, `approximate` as of `torch.nn.functional.gelu`."""
        return self._run(x, approximate)

    def hollow(self) -> Int8Linear:
        """A layer of the same shape on the meta device, to rehearse what it will need."""
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")
        bias = self.bias
        if bias is not None:
            bias = nn.Parameter(torch.empty_like(bias, device="meta"), requires_grad=False)
        return Int8Linear(weight, torch.empty(self.out_features, 1, device="meta"), bias)

    def _run(self, x: Tensor, gelu: str) -> Tensor:
        if x.is_meta:
            codes = torch.empty_like(x, dtype=torch.uint8)
            sums = x.new_empty(len(x), self.out_features, dtype=torch.float32)
            out = x.new_empty(len(x), self.out_features)
            del codes, sums
            return out
        return int8.multiply(x, self.packed, self.bias, gelu)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8 products"


QuantisedLinear = QuantLinear | Int8Linear


@dataclass(frozen=True, slots=True)
class Keeper:
    """`io.loading.Keep` for one kind of `KINDS`. block_lists: of the transformer: what lies outside
    its blocks is dense."""

    kind: str
    block_lists: Sequence[str]

    @property
    def copies(self) -> bool:
        """int8 packs what it reads."""
        return self.kind != "int8"

    def __call__(
        self,
        module: nn.Module,
        name: str,
        weights: WeightSource,
        source: str,
        *,
        device: torch.device | str,
        merge: Merge | None,
    ) -> bool:
        """Put the weight of a block's linear layer in place, quantised; False for others."""
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or name.partition(".")[0] not in self.block_lists:
            return False
        layer = submodule(module, path)
        if type(layer) not in (nn.Linear, InvariantLinear):
            return False
        assert isinstance(layer, nn.Linear)
        made: QuantisedLinear | None
        if self.kind == "int8":
            made = _int8_layer(layer, name, weights, source, device, merge)
        elif merge is not None or weights.kept_format(source) is None:
            return False
        else:
            kept = weights.read_kept(source, device=device)
            product = "scaled_mm" if self.kind == "fp8" else "auto"
            able = kept.format == "float8_e4m3fn" and not kept.rotation
            if kept.scale is not None and kept.scale.shape[1] != 1:
                able = False
            made = QuantLinear(
                kept.weight, kept.scale, layer.bias, kept.format,
                in_features=layer.in_features, rotation=kept.rotation,
                backend=product if able else "auto", exact=isinstance(layer, InvariantLinear),
            )  # fmt: skip
        parent, _, child = path.rpartition(".")
        setattr(submodule(module, parent), child, made)
        return True


def _int8_layer(
    layer: nn.Linear,
    name: str,
    weights: WeightSource,
    source: str,
    device: torch.device | str,
    merge: Merge | None,
) -> Int8Linear:
    """A layer with a scale for each row: as stored, where that is what the file has."""
    rows, width = weights.info(source).shape
    if merge is None and weights.kept_format(source) == "int8":
        kept = weights.read_kept(source, device=device)
        if kept.scale is not None and kept.scale.shape[1] == 1 and not kept.rotation:
            return Int8Linear(kept.weight, kept.scale, layer.bias)
    weight = torch.empty(rows, width, dtype=torch.int8, device=device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=device)
    lost = whole = 0.0
    if not weight.is_meta:
        read: Callable[..., Tensor] = partial(weights.read, source)
        if merge is not None:
            read = partial(merge.read, name, weights, source)
        step = max(1, PIECE_VALUES // width)
        for first in range(0, rows, step):
            part = range(first, min(rows, first + step))
            dense = read(device=device, dtype=torch.float32, rows=part)
            codes, own = int8.quantise_weight(dense)
            weight[part.start : part.stop], scale[part.start : part.stop] = codes, own
            lost += float((codes.float() * own - dense).square().sum(dtype=torch.float64))
            whole += float(dense.square().sum(dtype=torch.float64))
    made = Int8Linear(weight, scale, layer.bias)
    made.error = lost, whole
    return made


def quantised_layers(module: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """The layers of a transformer that are quantised, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLinear | Int8Linear):
            yield name, layer


def lay_out_quantised(hollow: nn.Module, loaded: nn.Module) -> None:
    """Give a module without weights the quantised layers that the loaded one has."""
    for name, layer in list(quantised_layers(loaded)):
        parent, _, child = name.rpartition(".")
        setattr(hollow.get_submodule(parent), child, layer.hollow())


def held_bytes(module: nn.Module) -> int:
    """What the weights of a module take, oneDNN's own among them, where it is on any device."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    size = sum(tensor.nbytes for tensor in tensors.values())
    for layer in module.modules():
        if isinstance(layer, Int8Linear):
            size += layer.out_features * (layer.in_features + 4)
        if isinstance(layer, BlockedLinear):
            size += layer.out_features * layer.in_features * layer.blocked.dtype.itemsize
            size += 0 if layer.bias is None else layer.bias.nbytes
    return size


def formats_of(module: nn.Module) -> dict[str, str]:
    """For receipts: by format, how many layers have it and what is done with it."""
    counts = Counter(
        (layer.format, isinstance(layer, Int8Linear) or layer.backend == "scaled_mm")
        for _, layer in quantised_layers(module)
    )
    return {
        form: f"{count} layers, " + ("activations quantised too" if lossy else "weights alone")
        for (form, lossy), count in sorted(counts.items())
    }


def errors_of(module: nn.Module) -> dict[str, float]:
    """For receipts: by what is lossy, its measured relative error.

    Weights': of what was quantised on loading. Products': of normal activations through the first
    layer of each kind, against the same weight dequantised.
    """
    layers = [layer for _, layer in quantised_layers(module)]
    found: dict[str, float] = {}
    measured = [layer.error for layer in layers if layer.error is not None]
    if measured:
        lost, whole = (sum(part) for part in zip(*measured, strict=True))
        found["int8 weights"] = math.sqrt(lost / whole) if whole else 0.0
    first = next((layer for layer in layers if isinstance(layer, Int8Linear)), None)
    if first is not None and first.packed is not None:
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(64, first.in_features, generator=rng)
        codes, scale = torch.ops.sora.native_quantise_rows(x)
        seen = (codes.float() - int8.ZERO) * scale[:, None]
        found["int8 activations"] = float((seen - x).norm() / x.norm())
    return found
