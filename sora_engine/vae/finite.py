"""Whether what was computed are numbers: NaN and infinity become an error, not a black video."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sora_engine.errors import NonFiniteError


def check_finite(
    tensors: Iterable[Tensor],
    what: str,
    *,
    stage: str,
    dtype: torch.dtype,
    step: int | None = None,
) -> None:
    """Raises NonFiniteError if a tensor holds NaN or infinity.

    what: what the tensors are, with its step where it has one. dtype: what they were computed in,
    on which the advice depends.
    """
    if all(is_finite(tensor) for tensor in tensors):
        return
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        advice = "float16 ends at 65504, and dtype 'bfloat16' or 'float32' would go beyond"
    else:
        advice = (
            "the weights are damaged, or the guidance_scale, shift, sigmas or latents that were "
            "given are too far out: the checkpoint's own would show which"
        )
    raise NonFiniteError(
        f"{stage}: {what} came to NaN or infinity in {name}; {advice}", stage=stage, step=step
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    One sum tells it, without memory of the tensor's size: NaN and infinity do not leave it. Only
    where the sum itself is none, which numbers about 1e32 can do too, each value is looked at.
    """
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    total = tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
