"""How fast this machine's CPU is at what models spend their time on: measured once, and kept.

A processor's name does not tell: bf16 products are 16 times as fast as fp32's with AMX, twice with
AVX512-BF16, and slower without either; which attention is faster differs between Intel and AMD.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sora_engine.io.atomic import write_atomically
from sora_engine.io.cache import cache_folder
from sora_engine.models.linear import BlockedLinear, can_block
from sora_engine.vae.native import PackedConv
from sora_kernels import csrc, packed_attention
from sora_kernels.cpu_attention import prefer

logger = logging.getLogger(__name__)

SECONDS = 1.6
"""What all measurements together may take. Those that come late are taken once."""
WIDTH = 1536
"""Of the products measured: Wan 1.3B's."""
ATTENTION = ((1024, 4), (2048, 1))
"""Tokens and heads of the attention measured."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of one core in GFLOP/s, and of copies in GB/s (read and written).

    linear, conv: by dtype. attention: by dtype, and within it by backend; the mean over lengths.
    """

    linear: dict[str, float]
    conv: dict[str, float]
    attention: dict[str, dict[str, float]]
    copy: float

    def gain(self, kind: str) -> float:
        """How many times as fast bfloat16 is as float32: of `linear` or of `conv`."""
        rates: dict[str, float] = getattr(self, kind)
        return rates.get("bfloat16", 0.0) / rates["float32"]

    def __str__(self) -> str:
        def row(rates: dict[str, float]) -> str:
            return ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())

        attention = "; ".join(f"{dtype} {row(rates)}" for dtype, rates in self.attention.items())
        return (
            f"GFLOP/s: products {row(self.linear)}; convolutions {row(self.conv)}; attention "
            f"{attention}; copies {self.copy:.0f} GB/s"
        )

    @classmethod
    def from_dict(cls, saved: dict[str, object]) -> Rates:
        """Raises ValueError, KeyError or TypeError for what `dataclasses.asdict` did not make."""
        found = cls(**saved)  # type: ignore[arg-type]
        flat = [found.copy, *found.linear.values(), *found.conv.values()]
        flat += [rate for rates in found.attention.values() for rate in rates.values()]
        if not all(rate > 0 for rate in flat) or not found.linear["float32"] > 0:
            raise ValueError(f"rates that are none: {saved}")
        found.gain("linear"), found.gain("conv")
        return found


def machine_rates(*, measure: bool = True, cache: Path | None = None) -> Rates | None:
    """This machine's rates; None where they are not known and are not to be measured.

    cache: the file of measurements, `$XDG_CACHE_HOME/sora_engine/machine.json` by default. Where it
    cannot be, every process measures for itself.
    """
    path = cache_folder("machine.json") if cache is None else cache
    key = _key()
    found = _known(path, key) or _of_process.get(key)
    if found is None and measure:
        found = _of_process[key] = measure_rates()
        logger.info("measured this machine's %s", found)
        if path is not None:
            _write(path, {**_read(path), key: dataclasses.asdict(found)})
    return found


_of_process: dict[str, Rates] = {}


def measure_rates(seconds: float = SECONDS) -> Rates:
    """Measure them, in about so many seconds: each kind in turn, and the best of the rounds.

    On one core, and in that thread's CPU time: what else the machine does at the moment would
    otherwise decide, and its ratios with it.
    """
    threads, best = torch.get_num_threads(), {}

    def run() -> None:
        torch.set_num_threads(1)  # of this thread; MKL's is all threads'
        try:
            best.update(_best_rates(seconds))
        finally:
            torch.set_num_threads(threads)

    thread = threading.Thread(target=run, name="sora-rates")
    thread.start()
    thread.join()
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    attention: dict[str, dict[str, float]] = {name: {} for name in names}
    for name in names:
        for backend in ("native", "sdpa"):
            rates = [rate for case, rate in best.items() if case.startswith(f"{backend} {name} ")]
            if rates:
                attention[name][backend] = len(rates) / sum(1 / rate for rate in rates)
    return Rates(
        linear={name: best[f"linear {name}"] for name in names if f"linear {name}" in best},
        conv={name: best[f"conv {name}"] for name in names if f"conv {name}" in best},
        attention={name: rates for name, rates in attention.items() if rates},
        copy=best["copy"],
    )


@torch.inference_mode()
def _best_rates(seconds: float) -> dict[str, float]:
    deadline = time.perf_counter() + seconds
    cases = list(_cases())
    best: dict[str, float] = {}
    for turn in range(20):
        for name, work, run in cases:
            if turn > 1 and time.perf_counter() > deadline:
                return best
            started = time.thread_time()
            run()  # in the first turn layouts are made, and memory is found
            took = time.thread_time() - started
            best[name] = max(best.get(name, 0.0), work / max(took, 1e-9) / 1e9)
    return best


def _cases() -> Iterator[tuple[str, float, Callable[[], object]]]:
    """Name, work (operations, or bytes) and call of each measurement."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.bfloat16 and not has_bfloat16():
            continue
        layer = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        run: nn.Module = BlockedLinear(layer) if can_block(layer.weight) else layer
        x = torch.ones(256, WIDTH, dtype=dtype)
        yield f"linear {name}", 2.0 * len(x) * WIDTH**2, functools.partial(run, x)
        weight = torch.ones(96, 96, 3, 3, 3, dtype=dtype)
        packed = PackedConv(weight, None, (1, 1, 1), (0, 1, 1))
        frames = torch.ones(1, 96, 4, 32, 32, dtype=dtype)
        frames = frames.contiguous(memory_format=torch.channels_last_3d)
        yield (
            f"conv {name}",
            2.0 * weight.numel() * 2 * 32 * 32,
            functools.partial(packed, frames),
        )
        for tokens, heads in ATTENTION:
            q, k, v = (torch.randn(tokens, heads, 128, dtype=dtype) for _ in range(3))
            cu = torch.tensor([0, tokens], dtype=torch.int32)
            for backend in ("native", "sdpa"):
                if backend == "native" and csrc.problem() is not None:
                    continue
                call = functools.partial(
                    packed_attention, q, k, v, cu, cu, max_seqlen_q=tokens, max_seqlen_k=tokens,
                    backend=backend,
                )  # fmt: skip
                yield f"{backend} {name} {tokens}", 4.0 * tokens**2 * heads * 128, call
    source = torch.zeros(1 << 25, dtype=torch.uint8)
    target = torch.empty_like(source)
    yield "copy", 2.0 * source.nbytes, functools.partial(target.copy_, source)


def has_bfloat16() -> bool:
    """Whether oneDNN has products of bfloat16 for this processor, by whatever means."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


CLEARLY = 1.1
"""How many times as fast SDPA is to be in float32, where csrc's attention is the usual one: two
that are equal would change places from measurement to measurement, and bits with them."""


def prefer_attention(rates: Rates | None) -> dict[str, str]:
    """Have `auto` take the attention that is the faster here over long sequences; says which, by
    dtype, with the ratio."""
    if rates is None:
        return {}
    said, taken = {}, {}
    for name, found in rates.attention.items():
        if len(found) < 2:
            continue
        ratio = found["sdpa"] / found["native"]
        backend = "sdpa" if ratio > CLEARLY else "native"
        taken[getattr(torch, name)] = backend
        said[name] = f"{backend} (native {found['native']:.0f} GFLOP/s, sdpa {found['sdpa']:.0f})"
    prefer(taken)
    return said


def _key() -> str:
    parts = (_processor(), torch.__version__, csrc.instruction_set(), WIDTH, ATTENTION)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "flags", "Features")):
                return platform.machine() + line  # on virtual machines the name says little
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _known(path: Path | None, key: str) -> Rates | None:
    try:
        saved = {} if path is None else _read(path)
        return Rates.from_dict(saved[key]) if key in saved else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # a cache: what cannot be read is measured again


def _read(path: Path) -> dict[str, dict[str, object]]:
    try:
        values = json.loads(path.read_bytes())
        return {key: value for key, value in values.items() if isinstance(value, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(path: Path, values: dict[str, dict[str, object]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, json.dumps(values, indent=1).encode())
    except OSError as error:
        logger.info("%s was not written: %s", path, error)
