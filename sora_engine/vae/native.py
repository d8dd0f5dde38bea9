"""A convolution whose weights are laid out once for the processor that runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import csrc


@functools.cache
def native_kernels() -> bool:
    """Whether the compiled CPU kernels are there."""
    return csrc.problem() is None


class Layouts:
    """A layer's weights as the processor likes them best, made when they are first asked for."""

    def __init__(self, wanted: bool = False, *, onednn: bool = True):
        self.wanted, self.onednn = wanted, onednn
        self._made: dict[str, Any] = {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[name] = make()
        return self._made[name]


class PackedConv:
    """A 3-D convolution with frozen weights, for channels-last inputs.

    On a CPU the weights are kept in oneDNN's own layout. `F.conv3d` would convert them on every
    call, which takes as long as the convolution itself where frames are small, and for few channels
    and a batch of one it does not choose oneDNN at all but unfolds the input (27 times its size).
    Elsewhere the weights are kept channels-last.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        *,
        onednn: bool = True,
    ):
        self.bias = None if bias is None else bias.detach()
        self.stride, self.padding = tuple(stride), tuple(padding)
        self.weight = weight.detach().contiguous(memory_format=torch.channels_last_3d)
        self.blocked: Tensor | None = None
        if onednn and _onednn_takes(self.weight):
            # The layout depends on the kernel and the channels; the size is a hint.
            self.blocked = torch._C._nn.mkldnn_reorder_conv3d_weight(  # type: ignore[attr-defined, call-arg]
                self.weight.contiguous().to_mkldnn(),
                list(self.padding),
                list(self.stride),
                [1, 1, 1],
                1,
                [1, weight.shape[1], 4, 32, 32],
            )
            self.weight = weight.detach()  # only the blocked copy is read

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, c_in, T, H, W] -> [B, c_out, T', H', W']`."""
        if self.blocked is None:
            return F.conv3d(x, self.weight, self.bias, self.stride, self.padding)
        ones = (1, 1, 1)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.blocked, self.bias, self.padding, self.stride, ones, 1, "none", [], ""
        )


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
