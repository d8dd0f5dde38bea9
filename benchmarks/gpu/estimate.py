"""An estimate of a Wan block's time on an H200, part by part, before any has run.

    PYTHONPATH=.:kernels:benchmarks python benchmarks/gpu/estimate.py

Products run at the rate of a large GEMM, element-wise passes at four fifths of the rate of copies.
Attention follows from the table of ahead-of-time builds (`tests/kernels/resources.json`): registers
and shared memory say how many programs a processor holds. One alone takes its softmax after its
products; two, or two warpgroups that take turns, hide the shorter one behind the other at best.
The rates are assumptions until `benchmarks/results/gpu.jsonl` has the card's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GEMM_FLOPS = 790e12
COPY_BYTES = 4.3e12
OF_COPY = 0.8
"""Share of the rate of copies that an element-wise pass reaches."""
TENSOR_FLOPS_A_CYCLE = 4096
"""Of one processor: 989.4 TFLOP/s in bf16 at 1.83 GHz over 132 of them (NVIDIA H100 and H200 data
sheets)."""
EXPONENTIALS_A_CYCLE = 16
LANES = 128
INSTRUCTIONS_A_SCORE = 3.5
"""Scale and subtract, maximum, sum, and half a conversion of two to bf16."""
REGISTERS, SHARED_BYTES = 65_536, 232_448


@dataclass(frozen=True)
class Case:
    """A model and the tokens of its two guidance branches."""

    name: str
    heads: int
    ffn: int
    blocks: int
    tokens: int
    branches: int = 2
    head_dim: int = 128
    context: int = 512

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


CASES = (
    Case("Wan 14B, 720p, 81 frames", 40, 13_824, 40, 75_600),
    Case("Wan 1.3B, 480p, 81 frames", 12, 8_960, 30, 32_760),
)
BYTES_AN_ELEMENT = {
    "three gated passes": 3 * (2 + 4 + 4 + 2),  # branch, residual in and out (fp32), next input
    "norm and rotation of q and k": 2 * (2 + 2),
    "norm of the text's queries": 2 + 2,
}


@dataclass(frozen=True)
class Kernel:
    """Packed attention as it was compiled. together: programs or warpgroups that run at a time."""

    name: str
    together: int


def kernels() -> Iterator[Kernel]:
    """The portable kernel and the Hopper one, with what a processor holds of each."""
    table = json.loads((ROOT / "tests/kernels/resources.json").read_text())["kernels"]
    launch = json.loads((ROOT / "kernels/sora_kernels/launch.json").read_text())
    row = table["packed_attention/bf16/128/sm_90"]
    threads = 32 * launch["packed_attention"]["sm_90"]["2x128"]["num_warps"]
    held = min(REGISTERS // (row["registers"] * threads), SHARED_BYTES // row["shared_bytes"])
    yield Kernel("portable, `auto`", held)
    yield Kernel("Gluon, by name", 2)  # its two warpgroups of queries


def attention_seconds(case: Case, kernel: Kernel) -> float:
    """Self-attention over each branch, and cross-attention over its text."""
    scores = case.branches * case.tokens * (case.tokens + case.context) * case.heads
    products = 4 * case.head_dim / TENSOR_FLOPS_A_CYCLE
    softmax = 1 / EXPONENTIALS_A_CYCLE + INSTRUCTIONS_A_SCORE / LANES
    cycles = products + softmax if kernel.together < 2 else max(products, softmax)
    return scores * 4 * case.head_dim / GEMM_FLOPS * cycles / products


def product_seconds(case: Case) -> float:
    """Four projections of self-attention, two of cross-attention, and the feed-forward's two."""
    weights = 6 * case.dim**2 + 2 * case.dim * case.ffn
    return 2 * case.branches * case.tokens * weights / GEMM_FLOPS


def pass_seconds(case: Case) -> float:
    elements = case.branches * case.tokens * case.dim
    return elements * sum(BYTES_AN_ELEMENT.values()) / COPY_BYTES / OF_COPY


def rows(launches: int, host_us: float) -> Iterator[str]:
    """launches: of a block. host_us: what they take the host, which counts where the device is done
    before."""
    yield "| block | attention by | attention | products | element-wise | launches | together |"
    yield "|---|---|---|---|---|---|---|"
    for case in CASES:
        for kernel in kernels():
            parts = attention_seconds(case, kernel), product_seconds(case), pass_seconds(case)
            busy = sum(parts)
            waits = max(0.0, host_us * 1e-6 - busy)
            cells = [f"{1e3 * part:.2f} ms" for part in (*parts, waits, busy + waits)]
            cells[3] += f" ({launches}, {host_us:.0f} µs of the host)"
            yield f"| {case.name} | {kernel.name} | " + " | ".join(cells) + " |"


def main() -> None:
    from host_passes import blocks_cost, launches_a_block

    from sora_engine.bench.models import WAN_14B
    from sora_kernels.testing.launches.host import as_card

    with as_card("meta", 90) as driver:
        launches = launches_a_block(WAN_14B, driver).total()
        _, median_ms = blocks_cost(WAN_14B, rounds=10)
    print("\n".join(rows(launches, 1e3 * median_ms / WAN_14B.layers)))


if __name__ == "__main__":
    main()
