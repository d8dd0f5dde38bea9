"""Linear layers as cuBLAS has them: GELU in a product's epilogue, one product for several layers.

Both save launches, which is what small batches wait for. Neither has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_JOINED_ROWS = 16_384
"""Rows up to which layers of one input are one product. Its result is kept as long as any part of
it: from here on that memory is worth more than two launches, which the device no longer notices."""


class CublasLinear(nn.Linear):
    """A linear layer on a CUDA device."""

    def with_gelu(self, x: Tensor, approximate: str) -> Tensor:
        """`gelu(self(x))`, `approximate` as of `torch.nn.functional.gelu`: "tanh" in the product's
        epilogue, where cuBLAS has that form alone."""
        if approximate != "tanh" or self.bias is None or x.ndim != 2:
            return F.gelu(self(x), approximate=approximate)
        return torch._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True)


class JoinedLinears:
    """Frozen linear layers of one input, whose weights become rows of one tensor, as one product.

    The layers go on to serve by themselves. A layer that was replaced, or whose weight was, is not
    served from here.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        self.sizes = [layer.out_features for layer in layers]
        for layer, part in zip(layers, self.weight.split(self.sizes), strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
        if self.bias is not None:
            for layer, part in zip(layers, self.bias.split(self.sizes), strict=True):
                layer.bias = nn.Parameter(part, requires_grad=False)
        self._places = tuple(layer.weight.data_ptr() for layer in layers)

    def serves(self, layers: tuple[nn.Module, ...], x: Tensor) -> bool:
        """Whether `layers` are these, as they were joined, and x has few rows."""
        if layers != self.layers or x.shape[0] > MOST_JOINED_ROWS:
            return False
        if torch.compiler.is_compiling():  # addresses are unknown there
            return True
        return self._places == tuple(layer.weight.data_ptr() for layer in self.layers)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each layer of x `[rows, in]`: columns `[rows, out]` of one result."""
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=1)


def can_join(layers: Sequence[nn.Module]) -> bool:
    """Whether they are plain, frozen linear layers of one kind."""
    kinds = set()
    for layer in layers:
        if type(layer) not in (nn.Linear, CublasLinear):
            return False
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if weight.requires_grad:
            return False
        kinds.add((weight.shape[1], weight.dtype, weight.device, layer.bias is None))
    return len(kinds) == 1


def lay_out_for_cuda(block: nn.Module, one_input: Sequence[str]) -> None:
    """Give a block's linear layers these forms.

    one_input: names, within the block, of layers of one parent that read one input. The parent has
    them as `joined`, where they can be.
    """
    for layer in block.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = CublasLinear
    layers = [block.get_submodule(name) for name in one_input]
    if layers and can_join(layers):
        parent = block.get_submodule(one_input[0].rpartition(".")[0])
        parent.joined = JoinedLinears(layers)  # type: ignore[arg-type,assignment]
        # The weights that were copied are given back at once: of all blocks they are a third of
        # the model, in pieces that nothing else is as large as.
        torch.cuda.empty_cache()
