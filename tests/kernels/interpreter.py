"""Mends what Triton's interpreter gets wrong with bf16, so that kernels can keep their budget.

It keeps bf16 as uint16 and multiplies matrices of those integers (triton issue 11584), truncates
fp32 to bf16 where hardware rounds to nearest, and does arithmetic on the integers. Kernels here do
arithmetic in fp32 alone, so mending casts and `dot` is enough.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def mend() -> None:
    """Replace the interpreter's casts from and to bf16 and its matrix product, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "mended_for_bfloat16", False):
        return
    original_cast = builder.cast_impl

    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = interpreter.TensorHandle(to_float32(src.data), tl.float32)
            return wide if target == tl.float32 else original_cast(self, wide, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return original_cast(self, src, dst_type)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        factors = [
            to_float32(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32)
            for x in (a, b)
        ]
        return interpreter.TensorHandle(np.matmul(*factors) + d.data, d.dtype.scalar)

    builder.cast_impl = cast
    builder.create_fp_trunc = cast
    builder.create_fp_ext = cast
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding_mode: cast(self, src, dst_type)
    builder.create_dot = dot
    builder.mended_for_bfloat16 = True
