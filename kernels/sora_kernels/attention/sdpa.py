"""Packed attention by `torch.nn.functional.scaled_dot_product_attention`.

Each run of equal segments is one dense call on strided views, with no copy of q, k or v: on a CPU
this reaches the GEMM rate where padded, nested and block-diagonal forms do not (126 GFLOP/s against
38, 5 and 22 on two AVX2 cores). On a device it reads the offsets, which waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.attention.operands import Operands
from sora_kernels.attention.padding import beside, laid_out
from sora_kernels.dispatch import Case
from sora_kernels.segments import Run, batched, equal_runs

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(case: Case) -> str | None:
    if case.dtype not in _DTYPES:
        return f"{case.dtype} is not one of fp32, fp16 and bf16"
    if case.device_type == "cpu":
        return None
    if "lse" in case.traits:
        return "torch's SDPA returns no log-sum-exp on this device"
    return None


def _dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """q, k, v: `[batch, heads, tokens, head_dim]` views; bias: float32, what is added to scores."""
    if bias is None and not return_lse:
        return F.scaled_dot_product_attention(q, k, v, scale=scale), None
    # The CPU's flash kernel computes the log-sum-exp anyway, and takes a bias in fp32 beside
    # narrower queries: the public function drops the one and refuses the other.
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=scale
    )


def run(call: Operands) -> tuple[Tensor, Tensor]:
    if call.q.device.type != "cpu":
        call = laid_out(call)
    q, k, v, scale, return_lse = call.q, call.k, call.v, call.scale, call.return_lse
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    lse = call.lse()
    runs = equal_runs(*call.offsets(), call.padding_counts())
    parts = [part for part in runs if part.q_len > 0]

    def attend(part: Run) -> tuple[Tensor, Tensor | None]:
        keys, values, bias = beside(
            call,
            part,
            batched(k, part.k_start, part.k_len, part.segments),
            batched(v, part.k_start, part.k_len, part.segments),
            torch.float32,
        )
        queries = batched(q, part.q_start, part.q_len, part.segments)
        return _dense(queries, keys, values, scale, bias, return_lse)

    if len(parts) == 1 and (parts[0].k_len > 0 or parts[0].padded) and not return_lse:
        dense, _ = attend(parts[0])
        return dense.transpose(1, 2).reshape(q.shape), lse
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for part in parts:
        rows = slice(part.q_start, part.q_stop)
        if part.k_len == 0 and not part.padded:
            out[rows] = 0
            if return_lse:
                lse[rows] = float("-inf")
            continue
        dense, dense_lse = attend(part)
        batched(out, part.q_start, part.q_len, part.segments).copy_(dense)
        if return_lse and dense_lse is not None:
            rows_view = lse[rows].unflatten(0, (part.segments, part.q_len))
            rows_view.copy_(dense_lse.transpose(1, 2))
    return out, lse
