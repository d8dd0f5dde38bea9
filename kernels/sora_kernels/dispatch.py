"""Which backend serves an op: resolved once per device and shape class, logged, never silent."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sora_kernels.admission import admitted

logger = logging.getLogger("sora_kernels")


class KernelUnavailableError(RuntimeError):
    """A backend asked for by name cannot serve this call; the message says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a choice of backend depends on. `width`: head_dim or channels; `traits` are an op's."""

    device_type: str
    device_index: int | None
    dtype: torch.dtype
    width: int
    traits: frozenset[str] = frozenset()

    @staticmethod
    def of(tensor: torch.Tensor, *traits: str) -> Case:
        device = tensor.device
        return Case(
            device.type, device.index, tensor.dtype, tensor.shape[-1], frozenset(traits) - {""}
        )

    def __str__(self) -> str:
        index = "" if self.device_index is None else f":{self.device_index}"
        traits = "".join(f", {trait}" for trait in sorted(self.traits))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device_type}{index} {dtype} width {self.width}{traits}"


class Backend(Protocol):
    """A backend module: `run`, and `unsupported`, which says why it cannot serve a case.

    It may have `outrun` as well, which says where another is faster: `auto` goes on to the next.
    """

    run: Callable[..., Any]

    def unsupported(self, case: Case) -> str | None: ...


@dataclass(frozen=True)
class Op:
    """An op and where its backends live.

    `modules` maps a backend's name to its module, imported on first use; `order` lists the names
    that `auto` tries on a device type, best first, behind those that were admitted on this kind of
    card. `reference` always comes last.
    """

    name: str
    modules: Mapping[str, str]
    order: Mapping[str, Sequence[str]]
    _chosen: dict[tuple[str, Case], Backend] = field(default_factory=dict, repr=False)

    def load(self, backend: str) -> Backend:
        return importlib.import_module(self.modules[backend])  # type: ignore[return-value]

    def check_name(self, backend: str) -> None:
        if backend != "auto" and backend not in self.modules:
            raise ValueError(
                f"{self.name} has no backend {backend!r}; it has 'auto', "
                + ", ".join(map(repr, self.modules))
            )

    def resolve(self, backend: str, case: Case) -> Backend:
        """The module that serves `case`. Raises ValueError for an unknown name and
        KernelUnavailableError when a named backend cannot serve."""
        key = (backend, case)
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._pick(backend, case)
        return chosen

    def served(self) -> list[tuple[str, Case, str]]:
        """What was resolved so far: the name asked for, the case, and the backend that serves."""
        names = {path: name for name, path in self.modules.items()}
        return [
            (asked, case, names[str(getattr(module, "__name__", ""))])
            for (asked, case), module in list(self._chosen.items())
        ]

    def choose_again(self) -> None:
        """Forget what `auto` was resolved to: what a choice depends on has changed."""
        self._chosen.clear()

    def _pick(self, backend: str, case: Case) -> Backend:
        self.check_name(backend)
        if backend != "auto":
            module = self.load(backend)
            reason = module.unsupported(case)
            if reason is not None:
                raise KernelUnavailableError(
                    f"{self.name}: {backend} cannot serve {case}: {reason}"
                )
            return module
        device = torch.device(case.device_type, case.device_index or 0)
        ahead = admitted(self.name, device, case.dtype, case.width)
        for name in (*ahead, *self.order.get(case.device_type, ()), "reference"):
            module = self.load(name)
            reason = module.unsupported(case)
            if reason is None and hasattr(module, "outrun"):
                reason = module.outrun(case)
            if reason is None:
                logger.info("%s on %s: %s", self.name, case, name)
                return module
            logger.debug("%s on %s: not %s: %s", self.name, case, name, reason)
        raise KernelUnavailableError(f"{self.name}: no backend serves {case}")


OPS: dict[str, Op] = {}


def declare(name: str, modules: Mapping[str, str], order: Mapping[str, Sequence[str]]) -> Op:
    """Enter an op into the list that `backends` reports."""
    op = OPS[name] = Op(name, modules, order)
    return op


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_gradless(op: Op, backend: str) -> None:
    """Raise for an input that requires grad when a backend without gradients was asked for."""
    op.check_name(backend)
    if backend not in ("auto", "reference"):
        raise ValueError(
            f"{op.name}: an input requires grad and backend={backend!r} has no gradient; "
            "use backend='reference', or call it under torch.no_grad()"
        )


def backends(device: str | torch.device = "cpu") -> dict[str, dict[str, str | None]]:
    """For each op, each backend and why it cannot serve bf16 (fp32 on a CPU) on `device`.

    The widths are 128, the segments short. None means that it can.
    """
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    case = Case(device.type, device.index, dtype, 128, frozenset({"short"}))
    report: dict[str, dict[str, str | None]] = {}
    for op in OPS.values():
        report[op.name] = {}
        for name in op.modules:
            try:
                report[op.name][name] = op.load(name).unsupported(case)
            except ImportError as error:
                report[op.name][name] = f"cannot be imported: {error}"
    return report
