"""Which dtypes a checkpoint runs in here: those asked for, or the machine's and its own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sora_engine.io.weights.opening import open_weights
from sora_engine.models.device import resolve_dtype, resolve_vae_dtype
from sora_engine.models.machine import Rates, has_bfloat16, machine_rates, prefer_attention

logger = logging.getLogger(__name__)

WORTH = 1.8
"""How many times as fast as float32 bfloat16 has to be on a CPU for `"auto"` to take it: twice, or
nearly. AVX512-BF16 doubles the rate at best, measured at 1.9 to 2.0; AMX gives 3 to 8 times."""
LARGE_BYTES = 256 << 20
"""Weights from which on the machine is measured, if it has not been: they take longer to read."""
QUANTISED = "quantised"


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of transformers and autoencoder, and by name why `"auto"` has become what it has:
    `dtype`, `vae_dtype`, and the attention of each dtype."""

    dtype: torch.dtype
    vae_dtype: torch.dtype
    chosen: Mapping[str, str] = field(default_factory=dict)


def settle_precision(
    dtype: str | torch.dtype,
    vae_dtype: str | torch.dtype,
    device: torch.device,
    *,
    weights: Sequence[Path],
    vae_backend: str = "auto",
    exact: bool = False,
) -> Precision:
    """What to run in. On a CPU `dtype="auto"` is bfloat16 where the machine's products are
    `WORTH` times as fast in it, and the files hold no value that it would round: they are in
    bfloat16, or quantised. `vae_dtype="auto"` is bfloat16 beside such a transformer where
    convolutions are faster, too. With `exact` both are float32.

    weights: the transformers' files. Raises BackendError, and CheckpointError for the files.
    """
    taken = resolve_dtype(dtype, device)
    if device.type != "cpu":
        return Precision(taken, resolve_vae_dtype(vae_dtype, device, taken, vae_backend))
    own = stored_as(weights)
    wanted = dtype == "auto" and not exact and own in ("bfloat16", QUANTISED) and has_bfloat16()
    large = sum(_bytes(path) for path in weights) >= LARGE_BYTES
    rates = machine_rates(measure=wanted or large)
    chosen = {} if exact else {f"attention, {k}": v for k, v in prefer_attention(rates).items()}
    if dtype == "auto":
        taken, chosen["dtype"] = _by_rates(own, rates if wanted else None, exact)
    coded = resolve_vae_dtype(vae_dtype, device, taken, vae_backend)
    if vae_dtype == "auto" and vae_backend != "onnx" and not exact:
        gain = 0.0 if rates is None or not has_bfloat16() else rates.gain("conv")
        if taken == torch.bfloat16 and gain >= WORTH:
            coded = torch.bfloat16
            chosen["vae_dtype"] = f"bfloat16: convolutions are {gain:.1f} times as fast in it here"
    for name, why in chosen.items():
        logger.info("%s: %s", name, why)
    return Precision(taken, coded, chosen)


def _by_rates(own: str, rates: Rates | None, exact: bool) -> tuple[torch.dtype, str]:
    """The dtype on a CPU, and why. rates: None where nothing speaks for bfloat16."""
    if exact:
        return torch.float32, "float32: exact"
    if rates is None:
        why = f"the weights are {own}" if own not in ("bfloat16", QUANTISED) else "no bfloat16 here"
        return torch.float32, f"float32: {why}"
    gain = rates.gain("linear")
    if gain < WORTH:
        return torch.float32, f"float32: products are {gain:.1f} times as fast in bfloat16 here"
    return (
        torch.bfloat16,
        f"bfloat16: products are {gain:.1f} times as fast in it here, and the weights are {own}",
    )


def stored_as(paths: Sequence[Path]) -> str:
    """The dtype of most values of some files, such as "bfloat16", or "quantised". Headers alone are
    read."""
    counts: Counter[torch.dtype] = Counter()
    size = 0
    for path in paths:
        with open_weights(path) as weights:
            files = set()
            for name in weights:
                info = weights.info(name)
                counts[info.dtype] += torch.Size(info.shape).numel()
                files.add(weights.path_of(name))
        size += sum(file.stat().st_size for file in files)
    if not counts:
        return "empty"
    ((dtype, _),) = counts.most_common(1)
    # Quantised weights say the dtype in which they are decoded.
    if size < 1.9 * counts.total():
        return QUANTISED
    return str(dtype).removeprefix("torch.")


def _bytes(path: Path) -> int:
    """Of a file, or of the folder of an index's shards."""
    if path.suffix == ".json":
        return sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
    return path.stat().st_size
