"""The backend `cuda`: when it serves, and that its binding builds and registers. None of it has run
on a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sora_kernels as sk
from sora_kernels.dispatch import OPS, Case

ROOT = Path(__file__).parents[2]
FUSED = ("norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope")
X = torch.randn(4, 32)
CALLS = {
    "norm_modulate": lambda: sk.norm_modulate(X, backend="cuda"),
    "gate_residual_norm_modulate": lambda: sk.gate_residual_norm_modulate(X, X, backend="cuda"),
    "qk_norm_rope": lambda: sk.qk_norm_rope(
        X.view(4, 2, 16), None, None, None, None, None, across_heads=True, backend="cuda"
    ),
}


@pytest.mark.parametrize("op", FUSED)
def test_it_serves_by_name_alone_and_never_falls_back(op):
    assert all("cuda" not in order for order in OPS[op].order.values())
    with pytest.raises(sk.KernelUnavailableError, match=rf"{op}: cuda cannot serve .* not on cpu"):
        CALLS[op]()


@pytest.mark.parametrize(
    ("op", "width", "trait", "named"),
    [
        ("norm_modulate", 1532, "layer", "1532 channels"),
        ("norm_modulate", 16384, "layer", "16384 channels"),
        ("gate_residual_norm_modulate", 64, "residual torch.float64", "float64 residual"),
        ("qk_norm_rope", 72, "across heads", "head_dim 72"),
        ("qk_norm_rope", 48, "", "powers of two"),
    ],
)
def test_what_it_cannot_serve_is_named(op, width, trait, named):
    case = Case("cuda", 0, torch.bfloat16, width, frozenset({trait}))
    assert named in OPS[op].load("cuda").unsupported(case)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("op", FUSED)
def test_a_library_without_cuda_says_so(op, monkeypatch):
    from sora_kernels import csrc

    monkeypatch.setattr(csrc, "has_cuda", lambda: False)
    case = Case("cuda", 0, torch.bfloat16, 128, frozenset({"across heads"}))
    assert "without nvcc" in OPS[op].load("cuda").unsupported(case)


LOAD = """
import glob, sys, torch
torch.ops.load_library(glob.glob(sys.argv[1] + "/sora_kernels/_native*.so")[0])
for op in ("norm_modulate", "gate_residual_norm_modulate", "norm_rope"):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sora::native_{op}", key), (op, key)
x = torch.randn(4, 32)
y = torch.ops.sora.native_norm_modulate(x, None, None, None, "layer", None, None, 1e-6)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (32,), eps=1e-6))
"""


@pytest.mark.slow
def test_the_binding_builds_links_and_registers(tmp_path):
    """With nvcc, for whatever build of torch is here; loaded where there may be no GPU."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("no nvcc")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    subprocess.run(
        [*command, "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT,
        check=True,
        env={**os.environ, "SORA_CUDA": "1", "SORA_REQUIRE_NATIVE": "1"},
    )
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)
