"""A driver for Triton that stands for a card: it loads and launches nothing, and checks everything.

Limits are CUDA's: of tensor maps from `cuTensorMapEncodeTiled` (driver API), of grids, threads,
registers and shared memory from the programming guide's table of compute capabilities.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sora_kernels.aot import SHARED_LIMIT
from sora_kernels.machine_code import tool
from sora_kernels.testing.faults import FaultError

MOST_GRID = ((1 << 31) - 1, 65_535, 65_535)
MOST_THREADS = 1024  # of a block
REGISTERS = 65_536  # of a multiprocessor
MOST_BOX = 256
SWIZZLED_BYTES = {0: 1 << 30, 1: 32, 2: 64, 3: 128}  # of a box's rows, by CUtensorMapSwizzle
PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 188}


@dataclass(frozen=True)
class Loaded:
    """A kernel as it was compiled: registers a thread, bytes of shared memory a block."""

    name: str
    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class Launch:
    """A launch: the kernel's name, its grid, and the types that Triton gave its arguments."""

    kernel: str
    grid: tuple[int, int, int]
    types: dict[str, Any]


@dataclass
class Record:
    """What came by: kernels that were loaded, launches, and tensor maps that were encoded."""

    loaded: list[Loaded] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    tensor_maps: int = 0


def tensor_map_faults(
    address: int,
    swizzle: int,
    element_bytes: int,
    box: Sequence[int],
    shape: Sequence[int],
    strides: Sequence[int],
) -> list[str]:
    """Why `cuTensorMapEncodeTiled` would refuse. Outermost first; strides in elements."""
    faults = []
    if address % 16:
        faults.append(f"address {address:#x} is not a multiple of 16")
    if not 1 <= len(shape) <= 5:
        faults.append(f"{len(shape)} dimensions; 1 to 5 are due")
    faults += [f"an extent of {size}" for size in shape if not 0 < size <= 1 << 32]
    for stride in strides[:-1]:
        if stride * element_bytes % 16 or not 0 < stride * element_bytes < 1 << 40:
            faults.append(f"a stride of {stride * element_bytes} bytes, no multiple of 16")
    if strides[-1] != 1:
        faults.append(f"a last stride of {strides[-1]}")
    faults += [f"a box of {size}, over {MOST_BOX}" for size in box if not 0 < size <= MOST_BOX]
    row_bytes = box[-1] * element_bytes
    if row_bytes % 16 or row_bytes > SWIZZLED_BYTES[swizzle]:
        faults.append(f"a box of {row_bytes} bytes a row, swizzled over {SWIZZLED_BYTES[swizzle]}")
    return faults


@functools.cache
def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {report}")
    return int(found[1]), int(found[2])


def frame_bytes(arch: int) -> int:
    """What a kernel may keep in local memory without spilling: Triton 3.6 has 8 bytes for its
    tensor maps on sm_120, whatever the tile and however many registers are left."""
    import triton

    return 8 if arch == 120 and triton.__version__.startswith("3.6.") else 0


class Utils:
    """What Triton asks of a device."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and the most threads that a block may have."""
        registers, stack = usage(kernel)
        if stack > frame_bytes(self.driver.arch):
            raise FaultError(f"{name} spills: {stack} bytes of stack a thread")
        self.driver.record.loaded.append(Loaded(name, registers, shared))
        # Registers go to warps in units of 8 a thread.
        room = REGISTERS // (-(-registers // 8) * 8) // 32 * 32
        return 1, 1, registers, 0, min(MOST_THREADS, room)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT[self.driver.arch],
            "multiprocessor_count": PROCESSORS[self.driver.arch],
            "max_num_regs": REGISTERS,
            "warpSize": 32,
        }

    def fill_tma_descriptor_tiled(
        self,
        address: int,
        swizzle: int,
        element_bytes: int,
        element_type: int,
        box: Sequence[int],
        shape: Sequence[int],
        strides: Sequence[int],
        padding: int,
    ) -> str:
        faults = tensor_map_faults(address, swizzle, element_bytes, box, shape, strides)
        if faults:
            raise FaultError("cuTensorMapEncodeTiled: " + ", ".join(faults))
        self.driver.record.tensor_maps += 1
        return "tensor map"

    fill_tma_descriptor = fill_tma_descriptor_tiled  # Triton 3.6


class Launcher:
    """Of one compiled kernel: checks each launch and records it."""

    def __init__(self, source: Any, metadata: Any, driver: Driver) -> None:
        self.driver, self.metadata = driver, metadata
        self.types = dict(zip(source.fn.arg_names, source.signature.values(), strict=True))
        self.descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])

    def __call__(self, *arguments: Any) -> None:
        # Grid, stream, function, packed metadata, launch metadata, two hooks; then the kernel's.
        grid = arguments[:3]
        self.check_grid(grid)
        kernel_arguments = arguments[9:]
        if len(kernel_arguments) != len(self.types):
            raise FaultError(f"{len(kernel_arguments)} arguments for {len(self.types)} parameters")
        descriptors = iter(self.descriptors)
        for (name, kind), value in zip(self.types.items(), kernel_arguments, strict=True):
            self.check_argument(name, kind, value, descriptors)
        self.driver.record.launches.append(
            Launch(self.metadata.name, (int(grid[0]), int(grid[1]), int(grid[2])), self.types)
        )

    def check_grid(self, grid: Sequence[int]) -> None:
        for size, most in zip(grid, MOST_GRID, strict=True):
            if not 0 < size <= most:
                raise FaultError(f"{self.metadata.name}: a grid of {[*grid]}; up to {[*MOST_GRID]}")

    def check_argument(self, name: str, kind: Any, value: Any, descriptors: Any) -> None:
        place = f"{self.metadata.name}: {name}"
        if (due := kind_of(name)) and kind != "constexpr" and not str(kind).startswith(due):
            raise FaultError(f"{place} is {kind}; {' or '.join(due)} is due")
        tensor = value.base if hasattr(value, "block_shape") else value
        if isinstance(tensor, torch.Tensor):
            index, current = tensor.device.index, self.driver.get_current_device()
            if tensor.device.type != "cuda" or index != current:
                raise FaultError(
                    f"{place} is on {tensor.device}, the current device is cuda:{current}"
                )
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            from triton.backends.nvidia.driver import make_tensordesc_arg

            make_tensordesc_arg(value, next(descriptors, None))


def kind_of(name: str) -> tuple[str, ...]:
    """The types that a parameter of this library's kernels may have, by the habit of its name."""
    if name.endswith("_ptr"):
        return ("*",)
    if name.endswith("_source"):
        return ("*", "tensordesc")
    if name in ("eps", "scale2"):
        return ("fp32",)
    return ("i32",)


class Driver:
    """Triton's active driver while a card is pretended. `current`: the thread's current device."""

    def __init__(self, arch: int, devices: int) -> None:
        self.arch, self.devices, self.current = arch, devices, 0
        self.record = Record()
        self.utils = Utils(self)

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(source, metadata, self)

    def get_current_device(self) -> int:
        return self.current

    def set_current_device(self, device: int) -> None:
        self.current = device

    def exchange_device(self, device: int) -> int:
        """As torch's: the device that was current before. Below 0 nothing changes."""
        before = self.current
        if device >= self.devices:
            raise FaultError(f"cuda:{device} of {self.devices} devices")
        if device >= 0:
            self.current = device
        return before

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.current)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return str(ty_to_cpp(kind))
