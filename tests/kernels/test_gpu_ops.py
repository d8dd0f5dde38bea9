"""Every op on a GPU by each of its backends there, under the random cases of the CPU's tests.

`pytest -m gpu` runs them, with kernels that are compiled for the GPU. Where there is none they are
skipped, but for the one that shows that kernels are compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_checks import (
    attention_cases,
    check_a_thousand_segments,
    check_attention,
    check_neighbours_do_not_leak,
    check_temporal,
    check_windowed,
    grid_cases,
)
from gpu_runs import asks_for_gpu
from hypothesis import given
from linear_checks import check_linear, linear_cases
from lora_checks import check_lora, lora_cases
from norm_checks import (
    causal_cases,
    check_causal,
    check_gated,
    check_norm_modulate,
    check_rope,
    modulation_cases,
    plain_causal,
    rope_cases,
)
from quant_checks import check_quant, quant_cases

import sora_kernels as sk

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(
    ("markers", "asked"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("gpu or slow", True),
        ("not slow", False),
        ("slow", False),
        ("not gpu", False),
        ("", False),
    ],
)
def test_which_runs_ask_for_the_gpu(markers, asked):
    assert asks_for_gpu(markers) == asked


def test_a_run_that_asks_for_the_gpu_compiles():
    """`test_kernels_are_compiled`, by the command that a GPU's owner gives."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "are_compiled", __file__],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.gpu
def test_kernels_are_compiled():
    triton = pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from sora_kernels.modulate.triton import norm_rows

    assert not triton.knobs.runtime.interpret
    assert isinstance(norm_rows, JITFunction)


def served(op, backend):
    """The backend, or a skip where it cannot serve here."""
    reason = sk.backends("cuda")[op][backend]
    if reason is not None:
        pytest.skip(reason)
    return backend


FUSED = pytest.mark.parametrize("backend", ["triton", "cuda"])


@pytest.mark.gpu
@needs_gpu
@FUSED
@given(modulation_cases(max_tokens=200, channels=(8, 64, 200, 1536, 5120)))
def test_norm_modulate(backend, case):
    check_norm_modulate(case, served("norm_modulate", backend), device="cuda")


@pytest.mark.gpu
@needs_gpu
@FUSED
@given(modulation_cases(max_tokens=200, channels=(8, 64, 200, 1536, 5120)))
def test_gate_residual_norm_modulate(backend, case):
    check_gated(case, served("gate_residual_norm_modulate", backend), device="cuda")


@pytest.mark.gpu
@needs_gpu
@FUSED
@given(rope_cases(max_tokens=100, head_dims=(16, 64, 128)))
def test_qk_norm_rope(backend, case):
    check_rope(case, served("qk_norm_rope", backend), device="cuda")


@pytest.mark.gpu
@needs_gpu
@given(quant_cases(max_rows=700))
def test_quant_linear(case):
    check_quant(case, served("quant_linear", "triton"), device="cuda")


@pytest.mark.gpu
@needs_gpu
@given(lora_cases(max_rows=700, sizes=(1, 33, 64, 200, 1536)))
def test_lora_linear(case):
    check_lora(case, served("lora_linear", "triton"), device="cuda")


@pytest.mark.gpu
@needs_gpu
@given(linear_cases(max_rows=700, sizes=(1, 33, 64, 200, 1536)))
def test_invariant_linear(case):
    check_linear(case, served("invariant_linear", "triton"), device="cuda")


@pytest.mark.gpu
@needs_gpu
@given(causal_cases())
def test_causal_norm_silu(case):
    check_causal(plain_causal(case), served("causal_norm_silu", "triton"), device="cuda")


@pytest.mark.gpu
@needs_gpu
@given(attention_cases(max_length=400))
def test_packed_attention(case):
    check_attention(case, served("packed_attention", "triton"), device="cuda")


@pytest.mark.gpu
@needs_gpu
@given(attention_cases(max_length=400, head_dims=(64, 128)))
def test_packed_attention_by_gluon(case):
    if case["dtype"] == torch.float32:
        case = {**case, "dtype": torch.bfloat16}
    check_attention(case, served("packed_attention", "gluon"), device="cuda")


@pytest.mark.gpu
@needs_gpu
@given(grid_cases())
def test_temporal_attention(case):
    check_temporal(case, served("temporal_attention", "triton"), device="cuda")


@pytest.mark.gpu
@needs_gpu
@given(grid_cases(max_segments=2, head_dims=(16, 40, 128)))
def test_windowed_attention(case):
    check_windowed(case, served("windowed_attention", "triton"), device="cuda")


@pytest.mark.gpu
@needs_gpu
def test_a_thousand_segments_in_any_order():
    check_a_thousand_segments(served("packed_attention", "triton"), device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("lens", [([5, 33, 7], [20, 3, 18]), ([6, 6, 6], [19, 19, 19])])
def test_neighbours_do_not_leak(lens):
    check_neighbours_do_not_leak(served("packed_attention", "triton"), *lens, device="cuda")
