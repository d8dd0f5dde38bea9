"""Linear layers: in the layout of the processor that runs them, and with bits that no company
changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_kernels import csrc, invariant_linear
from sora_kernels.quant.native import in_float32

ROWS_HINT = 1024
"""What oneDNN is told of the inputs' length; its layout depends on the weight alone."""


class BlockedLinear(nn.Module):
    """A linear layer in oneDNN's own layout, for float32 and bfloat16 on an x86 CPU.

    On AMD's Zen 4 its products run at 1.1 to 1.2 times the rate of `F.linear`'s in float32 (MKL),
    and at 1.05 times in bfloat16, which are twice as fast. GELU is applied to a tile while it is in
    the cache: with it a feed-forward's first product is 1.3 times as fast in either. From 2 rows on
    a row's bits do not depend on how many there are. The original weight is not kept: there is no
    `state_dict`, and no way back.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach()
        # Not a buffer: modules cannot copy, cast or save oneDNN's tensors.
        self.blocked: Any = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)

    @classmethod
    def without_weight(cls, like: BlockedLinear) -> BlockedLinear:
        """A layer of the same shape on the meta device, to rehearse what it will need."""
        hollow = cls.__new__(cls)
        nn.Module.__init__(hollow)
        hollow.in_features, hollow.out_features = like.in_features, like.out_features
        bias = like.bias
        hollow.bias = None if bias is None else torch.empty_like(bias, device="meta")
        hollow.blocked = torch.empty(like.out_features, like.in_features, device="meta")
        return hollow

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, "none", "")

    def with_gelu(self, x: Tensor, approximate: str) -> Tensor:
        """`gelu(self(x))`, `approximate` as of `torch.nn.functional.gelu`."""
        return self._run(x, "gelu", approximate)

    def _run(self, x: Tensor, activation: str, algorithm: str) -> Tensor:
        if x.ndim == 2 and len(x) == 1:  # a single row is summed in another order than in company
            return self._run(x.expand(2, -1).contiguous(), activation, algorithm)[:1]
        return torch.ops.mkldnn._linear_pointwise(
            x, self.blocked, self.bias, activation, [], algorithm
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class InvariantLinear(nn.Linear):
    """A linear layer that gives a row the same bits whatever rows are beside it, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        return invariant_linear(x, self.weight, self.bias)

    def with_gelu(self, x: Tensor, approximate: str) -> Tensor:
        """`gelu(self(x))`, `approximate` as of `torch.nn.functional.gelu`."""
        return invariant_linear(x, self.weight, self.bias, gelu=approximate)


class WidenedLinear(nn.Linear):
    """A bfloat16 linear layer of a processor without products of bfloat16: multiplied as float32.

    The weight stays in bfloat16, and is widened for each product, which takes the less of it the
    more rows there are. What oneDNN and PyTorch have in its place takes 2.5 to 8 times as long as
    float32 does. No row's bits depend on the rows beside it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, "none", "")

    def with_gelu(self, x: Tensor, approximate: str) -> Tensor:
        """`gelu(self(x))`, `approximate` as of `torch.nn.functional.gelu`."""
        return self._run(x, "gelu", approximate)

    def _run(self, x: Tensor, activation: str, algorithm: str) -> Tensor:
        weight = self.weight.float()
        bias = None if self.bias is None else self.bias.float()

        def multiply(rows: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(
                rows.float(), weight, bias, activation, [], algorithm
            ).to(x.dtype)

        return steady(multiply, x)


class InvariantPatches(nn.Conv3d):
    """A convolution of patches of its own size that `embed_patches` carries out in that way."""


def embed_patches(tokens: Tensor, patch: nn.Conv3d) -> Tensor:
    """Patches `[N, channels * patch volume]` through a convolution of their own size."""
    weight, bias = patch.weight.flatten(1), patch.bias
    if isinstance(patch, InvariantPatches):
        return invariant_linear(tokens, weight, bias)
    return steady(lambda x: F.linear(x, weight, bias), tokens)


def make_invariant(module: nn.Module) -> None:
    """Replace every linear layer within `module`, and every convolution of patches, by one whose
    rows no company changes. Names and parameters stay."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = InvariantLinear
        elif type(child) is nn.Conv3d and child.kernel_size == child.stride:
            child.__class__ = InvariantPatches


def steady(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A linear `layer(x)` of rows `[n, in]`, where no row's bits depend on how many there are.

    On a CPU, products of a few rows take another path through MKL, whose sums are in another order:
    what a request gives would depend on its company. A few rows are made more, and cut again. From
    4 rows a thread on, MKL's and oneDNN's float32 products give each row the same bits.
    """
    if x.device.type not in ("cpu", "meta"):  # meta: memory is rehearsed there
        return layer(x)
    rows, least = x.shape[0], 8 * _num_threads()
    if rows >= least:
        return layer(x)
    return layer(F.pad(x, (0, 0, 0, least - rows)))[:rows]


def _num_threads() -> int:
    return torch.get_num_threads()


# As `torch.compiler.assume_constant_result` marks a function whose result a graph may have in it;
# that would import the compiler, which takes seconds.
_num_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def linear_gelu(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """A linear layer and GELU behind it, in one pass where the layer can."""
    fused: Callable[[Tensor, str], Tensor] | None = getattr(layer, "with_gelu", None)
    if fused is not None:
        return fused(x, approximate)
    return F.gelu(layer(x), approximate=approximate)


def can_block(weight: Tensor) -> bool:
    """Whether a weight can be, and is worth being, kept in oneDNN's layout."""
    if weight.dtype == torch.bfloat16 and (
        not torch.ops.mkldnn._is_mkldnn_bf16_supported() or multiplies_as_float32()
    ):
        return False
    return weight.dtype in (torch.float32, torch.bfloat16) and _goes_through_onednn(weight)


def can_widen(weight: Tensor) -> bool:
    """Whether a weight is in bfloat16 on a processor that has no products of it."""
    return (
        weight.dtype == torch.bfloat16 and _goes_through_onednn(weight) and multiplies_as_float32()
    )


def _goes_through_onednn(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and not weight.requires_grad
        and weight.numel() >= 1 << 14
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


def multiplies_as_float32() -> bool:
    """Whether this processor has no products of bfloat16; False where csrc is not there to tell."""
    return csrc.problem() is None and in_float32()


def block_linears(module: nn.Module) -> None:
    """Replace every linear layer within `module` that gains by it, one after the other."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            if type(child) is nn.Linear and can_block(child.weight):
                setattr(module, name, BlockedLinear(child))
            elif type(child) is nn.Linear and can_widen(child.weight):
                child.__class__ = WidenedLinear
        else:
            block_linears(child)


def lay_out_like(hollow: nn.Module, loaded: nn.Module) -> None:
    """Give a module without weights the layers that the loaded one has in place of its linears."""
    for name, layer in loaded.named_modules():
        if isinstance(layer, InvariantLinear | WidenedLinear):
            hollow.get_submodule(name).__class__ = type(layer)
        if isinstance(layer, BlockedLinear):
            parent, _, child = name.rpartition(".")
            setattr(hollow.get_submodule(parent), child, BlockedLinear.without_weight(layer))
