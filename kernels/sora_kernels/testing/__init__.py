"""What kernel tests share: inputs that provoke faults, and how much error a kernel may have.

The error budget is FlashAttention's rule: against an fp64 oracle a kernel may err twice as much as
plain PyTorch does in the same low precision, plus the rounding noise of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GUARD_ROWS = 2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens of segments of these lengths: `[segments + 1]`."""
    return torch.tensor([0, *torch.tensor(list(lengths), dtype=torch.int64).cumsum(0)], dtype=dtype)


def guarded(
    shape: Sequence[int],
    dtype: torch.dtype,
    rng: torch.Generator,
    *,
    magnitude: float = 1.0,
    layout: str = "dense",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random values in a buffer whose every other element is NaN.

    layout: "dense" has NaN rows before and after; "rows" has NaN columns between rows too (a
    row-strided view, as of a fused projection); "gaps" puts a NaN beside every value (the last
    dimension is strided). A kernel that reads outside its tensor shows it as NaN. The values are
    those of `rng`, a CPU's generator, on any device.
    """
    values = (torch.randn(*shape, generator=rng, dtype=torch.float64) * magnitude).to(dtype)
    outer = list(shape)
    outer[0] += 2 * GUARD_ROWS
    if layout == "rows":
        outer[1] += 3
    elif layout == "gaps":
        outer[-1] *= 2
    buffer = torch.full(outer, float("nan"), dtype=dtype, device=device)
    view = buffer[GUARD_ROWS : GUARD_ROWS + shape[0]]
    if layout == "rows":
        view = view[:, 1 : 1 + shape[1]]
    elif layout == "gaps":
        view = view[..., ::2]
    view.copy_(values)
    return view


def error_budget(reference: Tensor, low: Tensor, slack: float = 2.0) -> float:
    """How far a result may lie from the fp64 `reference`, given plain PyTorch's `low` result.

    `slack * max|low - reference| + atol`, atol twice the noise of adding and taking away 0.3 in the
    result's precision (flash-attention, tests/test_flash_attn.py).
    """
    finite = torch.isfinite(reference)
    exact = reference[finite]
    if exact.numel() == 0:
        return 0.0
    rounded = exact.to(low.dtype)
    atol = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()
    # Beside values much above 0.3 the noise is that of the values themselves.
    atol = max(atol, torch.finfo(low.dtype).eps * exact.abs().max().item())
    return slack * (low[finite].double() - exact).abs().max().item() + atol


def check_within_budget(
    name: str,
    result: Tensor,
    reference: Tensor,
    low: Tensor,
    slack: float = 2.0,
    floor: float = 0.0,
) -> None:
    """Raise AssertionError unless `result` keeps its error budget, or `floor` if that is more.

    Infinities must stand in the same places, and nothing may be NaN.
    """
    if result.shape != reference.shape:
        raise AssertionError(f"{name}: shape {[*result.shape]}, not {[*reference.shape]}")
    if result.dtype != low.dtype:
        raise AssertionError(f"{name}: {result.dtype}, not {low.dtype}")
    if torch.isnan(result).any():
        raise AssertionError(f"{name}: {int(torch.isnan(result).sum())} of its values are NaN")
    infinite = torch.isinf(reference)
    if not torch.equal(result[infinite].double(), reference[infinite].double()):
        raise AssertionError(f"{name}: infinities differ")
    finite = ~infinite
    if not finite.any():
        return
    worst = (result[finite].double() - reference[finite].double()).abs().max().item()
    budget = max(floor, error_budget(reference.double(), low, slack))
    if not worst <= budget:
        raise AssertionError(f"{name}: error {worst:.3e} above the budget of {budget:.3e}")
