"""Kernels compiled with no GPU: the machine code spills nothing and uses what the hardware has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compile_matching(pattern: str) -> subprocess.CompletedProcess[str]:
    """`sora_kernels.aot` in a process of its own: TRITON_INTERPRET is read as kernels are made."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "sora_kernels.aot", "--only", pattern],
        env={**environment, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_kernels_of_wan_compile_for_hopper():
    """Head_dim 128 and width 1536 in bf16: no spills, no stack, TMA and warpgroup products."""
    pytest.importorskip("triton")
    done = compile_matching(r"(packed_attention/bf16/128|norm_modulate/bf16/1536)/sm_90")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    hopper = re.search(r"packed_attention/bf16/128/sm_90 (\{.*\})", done.stdout)
    assert hopper is not None
    row = json.loads(hopper[1].replace("'", '"'))
    assert row["hgmma"] > 0
    assert row["tma"] > 0


@pytest.mark.slow
def test_every_kernel_compiles_at_every_configuration():
    pytest.importorskip("triton")
    done = compile_matching("")
    assert done.returncode == 0, done.stderr


def test_a_spill_is_a_fault():
    from sora_kernels import aot

    row = {"spills": 0, "stack_bytes": 0, "shared_bytes": 1000}
    assert aot.faults("k/sm_120", row) == []
    assert aot.faults("k/sm_120", {**row, "spills": 3}) == ["k/sm_120: 3 spills"]
    assert len(aot.faults("k/sm_120", {**row, "shared_bytes": 101_377})) == 1


def compile_cuda(source: Path, arch: str, folder: Path) -> str:
    done = subprocess.run(
        [
            *("nvcc", "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"),
            *("-Xptxas", "-v", "-c", str(source), "-o", str(folder / f"{source.stem}.{arch}.o")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def check_cuda(source: str, arch: str, folder: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    report = compile_cuda(ROOT / "csrc" / "cuda" / source, arch, folder)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert spills
    assert set(spills) == {("0", "0")}


def test_cuda_rope_compiles_without_spills(tmp_path):
    check_cuda("rope.cu", "90a", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", ["norm.cu", "rope.cu"])
def test_cuda_kernels_compile_without_spills(source, arch, tmp_path):
    check_cuda(source, arch, tmp_path)
