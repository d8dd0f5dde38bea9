"""A Gluon kernel's own source, run over stand-ins for Triton's language.

The file is compiled as it stands. Only its imports are answered otherwise: `gluon.jit` gives a
kernel that the emulator runs, `gl` and the operations of Hopper and Blackwell are those of this
folder, and a device has as many processors as the emulator was asked for. Descriptors and layouts
are Triton's own classes, so that their checks hold.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_kernels.testing.faults import FaultError
from sora_kernels.testing.gluon.machine import Machine
from sora_kernels.testing.gluon.memory import Operations, Shared, Source, arrays
from sora_kernels.testing.gluon.registers import (
    Array,
    Constexpr,
    Pointer,
    Scalar,
    Tile,
    load,
    plain,
    store,
)
from sora_kernels.testing.gluon.tensor_memory import TensorMemory, commit, multiply


@dataclass
class Launched:
    """What a launch did: its grid, arguments and arrays by name, what each program copied."""

    grid: int
    arguments: dict[str, Any]
    arrays: dict[str, Array]
    copies: list[list[tuple[str, int, int, int]]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Emulator:
    """How launches are emulated, and which there were.

    processors: of the device, so the most programs of a persistent grid. seed, landing: of the
    schedule, as `Machine` has them.
    """

    processors: int = 3
    seed: int = 0
    landing: str = "any"
    launches: list[Launched] = field(default_factory=list)
    operations: Operations | None = None

    @property
    def machine(self) -> Machine:
        return self.ops.machine

    @property
    def ops(self) -> Operations:
        if self.operations is None:
            raise FaultError("a device operation outside a kernel")
        return self.operations

    def launch(self, kernel: Callable[..., object], grid: Sequence[int], arguments: Any) -> None:
        if len(grid) != 1 or not 0 < grid[0] <= self.processors:
            raise FaultError(f"a persistent grid of {grid} on {self.processors} processors")
        done = Launched(int(grid[0]), arguments, arrays(arguments))
        inside = {name: self._argument(name, value, done) for name, value in arguments.items()}
        for program in range(done.grid):
            self.operations = Operations(Machine(self.seed, program, done.grid, self.landing))
            try:
                kernel(**inside)
                machine = self.machine
            finally:
                self.operations = None
            done.copies.append(machine.copies)
            for name, count in machine.counts.items():
                done.counts[name] = max(count, done.counts.get(name, 0))
        self.launches.append(done)

    def _argument(self, name: str, value: Any, done: Launched) -> Any:
        if isinstance(value, Tensor):
            return Pointer(done.arrays[name])
        if hasattr(value, "block_shape"):
            return Source(name, value)
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            return Scalar(value, 32 if abs(value) < 1 << 31 else 64)
        return float(np.float32(value))  # as a launch passes it


class Jitted:
    """What `gluon.jit` makes of a function: called by a kernel, or launched by the host."""

    def __init__(self, function: Callable[..., Any], emulator: Emulator) -> None:
        self.function, self.emulator = function, emulator
        self.signature = inspect.signature(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **kwargs: Any) -> None:
            bound = self.signature.bind(*args, **kwargs).arguments
            self.emulator.launch(self.function, grid, dict(bound))

        return launch


def _specialize(
    emulator: Emulator, parts: Sequence[Any], warps: Sequence[int], registers: Sequence[int]
) -> None:
    if not len(parts) - 1 == len(warps) == len(registers):
        raise FaultError(f"{len(parts)} partitions, {len(warps)} counts of warps")
    emulator.machine.specialize(
        {
            f"{i} {function.function.__name__}": functools.partial(function, *arguments)
            for i, (function, arguments) in enumerate(parts)
        }
    )


def _where(condition: Any, x: Any, y: Any) -> Any:
    if any(isinstance(value, Tile) for value in (condition, x, y)):
        chosen, one, other = (torch.as_tensor(plain(value)) for value in (condition, x, y))
        return Tile(torch.where(chosen, one, other))
    return x if condition else y


def _maximum(x: Any, y: Any) -> Any:
    if isinstance(x, Tile) or isinstance(y, Tile):
        return Tile(torch.maximum(torch.as_tensor(plain(x)), torch.as_tensor(plain(y))))
    return Scalar(max(int(x), int(y)), max(getattr(value, "bits", 32) for value in (x, y)))


def _language(emulator: Emulator) -> SimpleNamespace:
    """`gl`."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    def nothing(*args: Any, **kwargs: Any) -> None:
        """A layout: where values lie is the compiler's, and not emulated."""

    return SimpleNamespace(
        constexpr=Constexpr,
        **{name: getattr(torch, name) for name in ("float32", "int32", "int64")},
        program_id=lambda axis: Scalar(emulator.machine.program),
        num_programs=lambda axis: Scalar(emulator.machine.programs),
        load=load,
        store=store,
        where=_where,
        maximum=_maximum,
        max=lambda x, axis: Tile(x.values.amax(axis)),
        min=lambda x, axis: float(x.values.amin(axis)),
        sum=lambda x, axis: Tile(x.values.sum(axis)),
        exp2=lambda x: Tile(torch.exp2(x.values)),
        log2=lambda x: Tile(torch.log2(x.values)) if isinstance(x, Tile) else math.log2(x),
        zeros=lambda shape, dtype, layout: Tile(torch.zeros([*map(int, shape)], dtype=dtype)),
        arange=lambda first, last, layout: Tile(
            torch.arange(int(first), int(last), dtype=torch.int32)
        ),
        convert_layout=lambda x, layout: x,
        static_range=lambda *bounds: range(*map(int, bounds)),
        allocate_shared_memory=lambda dtype, shape, layout: emulator.ops.allocate(dtype, shape),
        warp_specialize=lambda *args: _specialize(emulator, *args),
        NVMMASharedLayout=NVMMASharedLayout,
        **dict.fromkeys(
            ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"), nothing
        ),
    )


def _hopper(emulator: Emulator) -> SimpleNamespace:
    """`gluon.language.nvidia.hopper`."""
    barrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda bar, count: emulator.ops.init(bar, count),
        wait=lambda bar, phase: emulator.ops.wait(bar, phase),
        arrive=lambda bar, count=1: emulator.ops.arrive(bar, count),
        expect=lambda bar, size: emulator.ops.expect(bar, size),
    )

    def copy(source: Source, at: Sequence[int], bar: Any, tile: Shared) -> None:
        emulator.ops.copy(source, at, bar, tile)

    def product(a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        return emulator.ops.product(a, b, acc, use_acc, is_async)

    return SimpleNamespace(
        fence_async_shared=lambda: emulator.ops.fence(),
        mbarrier=barrier,
        tma=SimpleNamespace(async_copy_global_to_shared=copy),
        warpgroup_mma=product,
        warpgroup_mma_wait=lambda outstanding, results: emulator.ops.wait_products(
            outstanding, results
        ),
    )


def _blackwell(emulator: Emulator) -> SimpleNamespace:
    """`gluon.language.nvidia.blackwell`: Hopper's barriers and copies, tensor memory, products."""
    from triton.experimental.gluon.language.nvidia.blackwell import TensorMemoryLayout

    def product(
        a: Any, b: Any, acc: Any, *, use_acc: bool = True, mbarriers: Sequence[Any] = ()
    ) -> None:
        multiply(emulator.ops, a, b, acc, bool(use_acc), mbarriers)

    hopper = _hopper(emulator)
    return SimpleNamespace(
        TensorMemoryLayout=TensorMemoryLayout,
        allocate_tensor_memory=lambda dtype, shape, layout: TensorMemory.allocate(
            emulator.ops, dtype, shape, layout
        ),
        get_tmem_reg_layout=lambda *args: None,
        tcgen05_mma=product,
        tcgen05_commit=lambda bar: commit(emulator.ops, bar),
        fence_async_shared=hopper.fence_async_shared,
        mbarrier=hopper.mbarrier,
        tma=hopper.tma,
    )


class _Torch:
    """torch, on whose devices there are as many processors as the emulator has."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.cuda = self

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=self.emulator.processors)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def load_kernel(source: str, name: str, emulator: Emulator) -> ModuleType:
    """The module of a kernel's source, whose launches `emulator` runs."""
    language = _language(emulator)

    def jit(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda f: Jitted(f, emulator)
        return Jitted(function, emulator)

    answers: dict[str, Any] = {
        "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(jit=jit, language=language)),
        "triton.experimental.gluon": SimpleNamespace(jit=jit, language=language),
        "triton.experimental.gluon.language.nvidia.hopper": _hopper(emulator),
        "triton.experimental.gluon.language.nvidia.blackwell": _blackwell(emulator),
    }

    def answered(
        name: str,
        names: Any = None,
        local: Any = None,
        wanted: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if name in answers:
            return answers[name]
        if name == "torch" and not wanted:
            return _Torch(emulator)
        return builtins.__import__(name, names, local, wanted or (), level)

    module = ModuleType(name)
    answers["sora_kernels.attention.items"] = module  # the source has it at its beginning
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": answered}
    exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    return module


def kernel_source(name: str = "gluon") -> str:
    """The source of a kernel of packed attention, behind that of what Gluon kernels share."""
    folder = Path(__file__).parents[2] / "attention"
    shared, own = ((folder / f"{part}.py").read_text(encoding="utf-8") for part in ("items", name))
    return shared + own.replace("from __future__ import annotations\n", "", 1)
