"""A convolution whose weights are laid out once for the processor that runs it."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_kernels import csrc


@functools.cache
def native_kernels() -> bool:
    """Whether the compiled CPU kernels are there."""
    return csrc.problem() is None


def fuses(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the compiled passes serve `x` with these parameters: on a CPU, where no gradient is
    wanted. On the meta device the answer is that of this machine's own devices."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        return False
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    on_cpu = x.device.type == "cpu" or (x.device.type == "meta" and not torch.cuda.is_available())
    return on_cpu and native_kernels()


def give_back() -> None:
    """Have the C library return freed memory to the system, where it can (glibc).

    It keeps blocks of up to 32 MiB for later use, and plain weights are just that large.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


_laying_out = threading.RLock()
"""Held while weights change their layout: threads may meet at a layer's first run."""


class Layouts:
    """A layer's weights as the processor likes them best, made when they are first asked for.

    A copy or a pickle of it has made none yet.
    """

    def __init__(self, wanted: bool = False, *, onednn: bool = True):
        self.wanted, self.onednn = wanted, onednn
        self._packed: dict[str, Any] = {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        packed = self._packed.get(name)
        if packed is not None:
            return packed
        with _laying_out, torch.inference_mode(False), torch.no_grad():
            if name not in self._packed:
                self._packed[name] = make()
            return self._packed[name]

    def made(self, name: str) -> Any:
        """What was made under this name; None if nothing was."""
        return self._packed.get(name)

    def forget(self, name: str) -> None:
        """Let go of what was made under this name, if anything was."""
        self._packed.pop(name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Layouts, self.wanted, onednn=self.onednn), ()


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
        groups: int = 1,
        onednn: bool = True,
    ):
        self.groups = groups
        self.bias = None if bias is None else bias.detach()
        self.stride, self.padding = tuple(stride), tuple(padding)
        self.blocked = onednn and _onednn_takes(weight)
        if self.blocked:
            # The layout depends on the kernel and the channels; the size is a hint.
            self.weight: Tensor = torch._C._nn.mkldnn_reorder_conv3d_weight(  # type: ignore[attr-defined, call-arg]
                weight.detach().contiguous().to_mkldnn(),
                list(self.padding),
                list(self.stride),
                [1, 1, 1],
                groups,
                [1, groups * weight.shape[1], 4, 32, 32],
            )
        else:
            self.weight = weight.detach().contiguous(memory_format=torch.channels_last_3d)

    def plain_weight(self) -> Tensor:
        """A copy of the weight `[c_out, c_in, kT, kH, kW]` that went in, bit for bit."""
        with torch.inference_mode(False), torch.no_grad():
            return self.weight.to_dense() if self.blocked else self.weight.clone()

    def __call__(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """`[B, c_in, T, H, W] -> [B, c_out, T', H', W']`, and the sum with `beside` of that shape
        where it is given."""
        if not self.blocked:
            y = F.conv3d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
            return y if beside is None else y.add_(beside)
        ones = (1, 1, 1)
        if beside is not None:
            # Added where the products are summed up: a pass over memory less, and a result less.
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, beside.contiguous(memory_format=torch.channels_last_3d), self.weight, self.bias,
                self.padding, self.stride, ones, self.groups, "add", None, None, [], "",
            )  # fmt: skip
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, self.stride, ones, self.groups, "none", [], ""
        )


class PackableConv3d(nn.Conv3d):
    """A 3-D convolution whose weight is laid out on its first run, and if it is frozen, held once.

    Where oneDNN takes it, its blocks are all there is from the first run of the whole kernel on,
    and `parameters()` gives a stand-in of the weight's shape, dtype and device whose values are
    NaN. Whoever reads `weight`, loads, moves or casts the layer has it put together again, bit for
    bit, and blocks are made anew on the next run; `state_dict` and copies have it without that.
    Several threads may run a layer, and read it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.spatial_padding = (0, *(side // 2 for side in self.kernel_size[1:]))
        self.layouts = Layouts()
        self._holder: PackedConv | None = None  # of the weight, where that is let go

    def packed(self) -> PackedConv:
        """The convolution, laid out."""
        packed: PackedConv = self.layouts.get("whole", self._pack_whole)
        return packed

    def packed_last_tap(self) -> PackedConv:
        """The convolution of the last frame of the kernel, laid out.

        A video's first latent frame needs it, and all others the whole kernel: what has been laid
        out for that one is let go with the weight, and made for a single use then.
        """
        with _laying_out:
            holder = self._holder
            if holder is None:
                packed: PackedConv = self.layouts.get("last", lambda: self._pack_last(self.weight))
                return packed
        with torch.inference_mode(False), torch.no_grad():
            return self._pack_last(holder.plain_weight())

    def lay_out(self, wanted: bool, *, onednn: bool) -> None:
        """Have the weight laid out, or not, from the next run on."""
        with _laying_out:
            self.bring_back()
            self.layouts = Layouts(wanted, onednn=onednn)

    def bring_back(self) -> None:
        """Hold the weight as a plain parameter again."""
        with _laying_out:
            if self._holder is None:
                return
            plain, stand_in = self._holder.plain_weight(), self._parameters["weight"]
            assert stand_in is not None
            self._parameters["weight"] = nn.Parameter(plain, requires_grad=stand_in.requires_grad)
            self._holder = None
            self.layouts.forget("whole")
            self.layouts.forget("winograd")

    def _pack_whole(self) -> PackedConv:
        weight = self.weight
        packed = PackedConv(
            weight, self.bias, self.stride, self.spatial_padding, onednn=self.layouts.onednn
        )
        # Meta tensors do as a CPU's: what a decode needs is rehearsed on them.
        if (packed.blocked or weight.is_meta) and not weight.requires_grad:
            # Another parameter, since modules that share their tensors go on using this one.
            stand_in = weight.new_full((1,), float("nan")).expand(weight.shape)
            self._parameters["weight"] = nn.Parameter(stand_in, requires_grad=False)
            self._holder = packed
            self.layouts.forget("last")
        return packed

    def _pack_last(self, weight: Tensor) -> PackedConv:
        return PackedConv(
            weight[:, :, -1:], self.bias, (1, 1, 1), self.spatial_padding,
            onednn=self.layouts.onednn,
        )  # fmt: skip

    # What modules do with their parameters.

    def __getattr__(self, name: str) -> Any:
        if name != "weight" or self.__dict__.get("_holder") is None:
            return super().__getattr__(name)
        with _laying_out:
            self.bring_back()
            return super().__getattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.bring_back()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.bring_back()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _laying_out:
            if keep_vars:  # the parameter itself is wanted
                self.bring_back()
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if self._holder is not None:
                destination[prefix + "weight"] = self._holder.plain_weight()

    def __getstate__(self) -> dict[str, Any]:
        with _laying_out:
            state = {**self.__dict__, "_holder": None}
            if self._holder is not None:
                weight = nn.Parameter(self._holder.plain_weight(), requires_grad=False)
                state["_parameters"] = {**self._parameters, "weight": weight}
            return state


def _onednn_takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
