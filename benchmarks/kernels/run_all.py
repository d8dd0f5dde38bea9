"""All numerics on a device, then the benchmark.

`--device cuda` is for a GPU; on the CPU it is a dry run of the same path.
The benchmark's JSON goes to `--output`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import sora_kernels as sk
from sora_kernels.testing import check_within_budget, generator, offsets

HERE = Path(__file__).parent


def check_attention(backend: str, device: str, dtype: torch.dtype, lengths: list[int]) -> None:
    rng = generator(len(lengths))
    q, k, v = (torch.randn(sum(lengths), 4, 128, generator=rng).to(device, dtype) for _ in range(3))
    cu = offsets(lengths).to(device)
    limits = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}

    def call(backend: str, cast: torch.dtype) -> torch.Tensor:
        inputs = (x.to(cast) for x in (q, k, v))
        return sk.packed_attention(*inputs, cu, cu, **limits, backend=backend)

    low, ref = call("reference", dtype), call("reference", torch.float64)
    out = call(backend, dtype)
    check_within_budget(f"packed_attention {backend}", out, ref, low, slack=4.0)
    if not torch.equal(out, call(backend, dtype)):
        raise AssertionError(f"packed_attention {backend}: a second run differs")


def check_norm(backend: str, device: str, dtype: torch.dtype) -> None:
    rng = generator(1)
    x, residual = (torch.randn(333, 1536, generator=rng).to(device, dtype) for _ in range(2))
    table = torch.randn(3, 1536, generator=rng).to(device)
    index = (torch.arange(333) % 3).to(device)

    def call(backend: str, cast: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = x.to(cast), residual.to(cast)
        return sk.gate_residual_norm_modulate(*inputs, table, table, table, index, backend=backend)

    low, ref, out = call("reference", dtype), call("reference", torch.float64), call(backend, dtype)
    for name, result, expected, plain in zip(("residual", "y"), out, ref, low, strict=True):
        check_within_budget(f"gated {backend} {name}", result, expected, plain, slack=4.0)


def check_plain_norm(backend: str, device: str, dtype: torch.dtype) -> None:
    rng = generator(5)
    x = torch.randn(333, 1536, generator=rng).to(device, dtype)
    table = torch.randn(333, 1536, generator=rng).to(device)

    def call(backend: str, cast: torch.dtype) -> torch.Tensor:
        return sk.norm_modulate(x.to(cast), table, table, kind="rms", backend=backend)

    low, ref = call("reference", dtype), call("reference", torch.float64)
    check_within_budget(f"norm {backend}", call(backend, dtype), ref, low, slack=4.0)


def check_causal(backend: str, device: str, dtype: torch.dtype) -> None:
    rng = generator(6)
    x, past = (torch.randn(1, n, 77, 384, generator=rng).to(device, dtype) for n in (3, 2))
    weight = torch.randn(384, generator=rng).to(device)

    def call(backend: str, cast: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return sk.causal_norm_silu(x.to(cast), past.to(cast), weight, backend=backend)

    low, ref, out = call("reference", dtype), call("reference", torch.float64), call(backend, dtype)
    for name, result, expected, plain in zip(("joined", "cache"), out, ref, low, strict=True):
        check_within_budget(f"causal {backend} {name}", result, expected, plain, slack=4.0)


def check_rope(backend: str, device: str, dtype: torch.dtype) -> None:
    rng = generator(2)
    q, k = (torch.randn(333, 12, 128, generator=rng).to(device, dtype) for _ in range(2))
    angle = torch.randn(333, 64, generator=rng).to(device)
    weight = torch.randn(1536, generator=rng).to(device)

    def call(backend: str, cast: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        tables = (weight, weight, angle.cos(), angle.sin())
        return sk.qk_norm_rope(q.to(cast), k.to(cast), *tables, across_heads=True, backend=backend)

    low, ref, out = call("reference", dtype), call("reference", torch.float64), call(backend, dtype)
    for name, result, expected, plain in zip("qk", out, ref, low, strict=True):
        assert result is not None
        assert expected is not None
        assert plain is not None
        check_within_budget(f"qk_norm_rope {backend} {name}", result, expected, plain, slack=4.0)


def check_grids(backend: str, device: str, dtype: torch.dtype, windowed: bool) -> None:
    rng = generator(3)
    grids = [(9, 6, 10), (16, 4, 4)]
    tokens = [t * h * w for t, h, w in grids]
    q, k, v = (torch.randn(sum(tokens), 4, 64, generator=rng).to(device, dtype) for _ in range(3))
    cu = offsets(tokens).to(device)

    def call(backend: str, cast: torch.dtype) -> torch.Tensor:
        inputs = [x.to(cast) for x in (q, k, v)]
        if windowed:
            return sk.windowed_attention(*inputs, cu, grids, (3, 5, 5), backend=backend)
        return sk.temporal_attention(*inputs, grids, backend=backend)

    low, ref = call("reference", dtype), call("reference", torch.float64)
    name = "windowed" if windowed else "temporal"
    check_within_budget(f"{name} {backend}", call(backend, dtype), ref, low, slack=4.0)


def check_mask(backend: str, device: str, dtype: torch.dtype) -> None:
    """Each frame sees its neighbours, the first frame and a key frame."""
    rng = generator(4)
    grid = (9, 6, 10)
    tokens = 9 * 6 * 10
    q, k, v = (torch.randn(tokens, 4, 64, generator=rng).to(device, dtype) for _ in range(3))
    cu = offsets([tokens]).to(device)
    at = torch.arange(9)
    mask = (at[:, None] - at[None]).abs() <= 1
    mask[:, [0, 5]] = True

    def call(backend: str, cast: torch.dtype) -> torch.Tensor:
        # The table has no entry for fp64, and the reference takes a plan of any tile.
        plan = sk.plan_attention(
            cu, num_tokens=tokens, head_dim=64, dtype=dtype, grids=[grid], masks=mask
        )
        inputs = (x.to(cast) for x in (q, k, v))
        return sk.windowed_attention(*inputs, cu, [grid], (-1, -1, -1), plan=plan, backend=backend)

    low, ref = call("reference", dtype), call("reference", torch.float64)
    check_within_budget(f"mask {backend}", call(backend, dtype), ref, low, slack=4.0)


Check = Callable[[str, str, torch.dtype], None]


def check_linear(backend: str, device: str, dtype: torch.dtype) -> None:
    rng, shapes = generator(6), ((777, 200), (300, 200), (300,))
    x, weight, bias = (torch.randn(*s, generator=rng).to(device, dtype) for s in shapes)

    def call(rows: torch.Tensor, backend: str, cast: torch.dtype) -> torch.Tensor:
        inputs = (t.to(cast) for t in (rows, weight, bias))
        return sk.invariant_linear(*inputs, gelu="tanh", backend=backend)

    y, ref = call(x, backend, dtype), call(x, "reference", torch.float64)
    low = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    check_within_budget(f"linear {backend}", y, ref, low, slack=4.0)
    for first, last in ((0, 1), (100, 777), (640, 700)):
        if not torch.equal(call(x[first:last], backend, dtype), y[first:last]):
            raise AssertionError(f"linear {backend}: rows {first} to {last} change in company")


def check_lora(backend: str, device: str, dtype: torch.dtype) -> None:
    rng = generator(7)
    made = [torch.randn(*s, generator=rng).to(device, dtype) for s in ((777, 200), (777, 300))]
    ranks, rows, scales = (4, 20, 33), [(0, 300), (250, 600), (600, 700)], [1.0, -0.5, 2.0]
    down = [torch.randn(r, 200, generator=rng).to(device, dtype) for r in ranks]
    up = [torch.randn(300, r, generator=rng).to(device, dtype) for r in ranks]

    def call(backend: str, cast: torch.dtype) -> torch.Tensor:
        x, base, *factors = (t.to(cast) for t in (*made, *down, *up))
        return sk.lora_linear(x, base, factors[:3], factors[3:], rows, scales, backend=backend)

    low, ref = call("reference", dtype), call("reference", torch.float64)
    check_within_budget(f"adapters {backend}", call(backend, dtype), ref, low, slack=4.0)


def check_quant(backend: str, device: str, dtype: torch.dtype) -> None:
    rng = generator(9)
    x = torch.randn(777, 256, generator=rng).to(device)
    raw = torch.randint(0, 256, (300, 144), generator=rng, dtype=torch.uint8)
    raw[:, :4] = torch.full((300, 2), 0.01).half().view(torch.uint8)
    raw = raw.to(device)

    def call(backend: str, cast: torch.dtype) -> torch.Tensor:
        return sk.quant_linear(x.to(cast), raw, format="Q4_K", backend=backend)

    low, ref = call("reference", dtype), call("reference", torch.float64)
    check_within_budget(f"Q4_K {backend}", call(backend, dtype), ref, low, slack=4.0)


def checks() -> Iterator[tuple[str, str, Check]]:
    """Each check with its op and its name: of a backend, a device and a dtype, against fp64."""
    for lengths in ([300, 1, 0, 777], [256, 256, 256]):
        yield "packed_attention", f"segments {lengths}", partial(check_attention, lengths=lengths)
    yield "invariant_linear", "linear, rows in any company", check_linear
    yield "lora_linear", "adapters", check_lora
    yield "quant_linear", "Q4_K", check_quant
    yield "norm_modulate", "norm", check_plain_norm
    yield "causal_norm_silu", "causal norm", check_causal
    yield "gate_residual_norm_modulate", "gated norm", check_norm
    yield "qk_norm_rope", "rope", check_rope
    yield "temporal_attention", "temporal", partial(check_grids, windowed=False)
    yield "windowed_attention", "windowed", partial(check_grids, windowed=True)
    yield "windowed_attention", "windowed, masked", check_mask


def numerics(device: str) -> None:
    """Every backend that can serve bf16 (fp32 on a CPU), against fp64."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    report = sk.backends(device)
    for op, _, check in checks():
        for backend, problem in report[op].items():
            if problem is None and backend != "reference":
                check(backend, device, dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--only-numerics", action="store_true")
    options = parser.parse_args()
    numerics(options.device)
    print(f"numerics on {options.device}: every backend keeps its error budget")
    if options.only_numerics:
        return 0
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--benchmark-enable", str(HERE)]
    if options.output:
        command.append(f"--benchmark-json={options.output}")
    return subprocess.run(
        command, env={**os.environ, "SORA_BENCH_DEVICE": options.device}, check=False
    ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
