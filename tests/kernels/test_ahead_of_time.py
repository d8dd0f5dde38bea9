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
import torch

ROOT = Path(__file__).parents[2]


TABLE = ROOT / "tests" / "kernels" / "resources.json"


def compile_matching(pattern: str) -> subprocess.CompletedProcess[str]:
    """`sora_kernels.aot` in a process of its own: TRITON_INTERPRET is read as kernels are made.

    What it compiles must be in the committed table, and equal to it under the same compiler.
    """
    return run_python("-m", "sora_kernels.aot", "--only", pattern, "--check", str(TABLE))


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_kernels_of_wan_compile_for_hopper():
    """Head_dim 128 and width 1536 in bf16: no spills, no stack, TMA and warpgroup products."""
    pytest.importorskip("triton")
    done = compile_matching(r"^(packed_attention/bf16/128|norm_modulate/bf16/2048)/sm_90$")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    hopper = re.search(r"packed_attention/bf16/128/sm_90 (\{.*\})", done.stdout)
    assert hopper is not None
    row = json.loads(hopper[1])
    assert row["hgmma"] > 0
    assert row["tma"] > 0


def test_the_kernel_of_the_autoencoder_compiles():
    pytest.importorskip("triton")
    done = compile_matching("causal_norm_silu/bf16/384")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


OF_ROTATION = """
from sora_kernels import aot, machine_code
for arch in aot.ARCHITECTURES:
    for build in aot.builds(arch):
        if build.key.startswith("qk_norm_rope/bf16/8192/across/"):
            print(*machine_code.instructions(aot.compiled(build).asm["cubin"]))
"""


def test_rotation_reads_vectors_alone():
    """Weights, cosines and sines in 16 bytes an access, as the row itself, on every architecture.

    Read by the channel they are 18 accesses more, and go through shared memory, with a barrier each
    time, to the threads that need them.
    """
    pytest.importorskip("triton")
    done = run_python("-c", OF_ROTATION)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    for line in done.stdout.splitlines():
        code = line.split()
        loads = [one for one in code if one.startswith("LDG")]
        assert loads
        assert {one.rpartition(".")[2] for one in loads} == {"128"}, loads
        # The sum over all heads crosses warps once.
        assert len([one for one in code if one.startswith("BAR")]) <= 2


def test_the_fast_path_compiles_for_hopper():
    """Gluon: HGMMA, TMA and setmaxnreg in the machine code, and no spills."""
    pytest.importorskip("triton.experimental.gluon")
    done = compile_matching(r"^packed_attention/bf16/128/gluon/sm_90$")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.split(" ", 1)[1])
    assert min(row["hgmma"], row["tma"], row["setmaxreg"]) > 0


@pytest.mark.parametrize("width", [64, 128])
def test_the_fast_path_compiles_for_blackwell(width):
    """Gluon: products of tensor memory, TMA and setmaxnreg in the machine code, and no spills."""
    pytest.importorskip("triton.experimental.gluon")
    done = compile_matching(rf"^packed_attention/bf16/{width}/blackwell/sm_100$")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.split(" ", 1)[1])
    assert min(row["tcgen05"], row["tma"], row["setmaxreg"]) > 0


@pytest.mark.parametrize("name", ["gluon", "blackwell"])
def test_the_fast_path_has_not_run_so_auto_leaves_it_out(name):
    import sora_kernels as sk
    from sora_kernels.attention.api import OP

    assert all(name not in order for order in OP.order.values())
    q = torch.randn(4, 1, 128).bfloat16()
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(sk.KernelUnavailableError, match=f"{name} cannot serve"):
        sk.packed_attention(q, q, q, cu, cu, max_seqlen_q=4, max_seqlen_k=4, backend=name)


@pytest.mark.slow
def test_every_kernel_compiles_at_every_configuration():
    pytest.importorskip("triton")
    done = compile_matching("")
    assert done.returncode == 0, done.stderr


def test_the_committed_table_holds_every_launch_configuration_and_no_fault():
    """Each entry of launch.json on each architecture; Hopper's kernels use what it has."""
    pytest.importorskip("triton")
    from sora_kernels import aot, launch

    committed = json.loads(TABLE.read_text())["kernels"]
    builds = {build.key: build for arch in aot.ARCHITECTURES for build in aot.builds(arch)}
    assert set(committed) == set(builds), "python -m sora_kernels.aot --write " + str(TABLE)
    for arch in aot.ARCHITECTURES:
        entries = {build.entry for build in builds.values() if build.arch == arch}
        assert entries >= {(op, key) for op in launch.KINDS for key in launch.entries(op, arch)}
    assert [fault for key, row in committed.items() for fault in aot.faults(key, row)] == []
    for key, row in committed.items():
        if key.startswith("packed_attention/bf16") and key.endswith("/sm_90"):
            assert row["hgmma"] > 0, key
            assert (row["tma"] > 0) == ("pointers" not in key), key
            # Warps that give up registers to others: a producer beside its consumers.
            assert (row["setmaxreg"] > 0) == ("gluon" in key), key
        if key.startswith("packed_attention/bf16") and key.endswith("/sm_100"):
            assert row["tcgen05"] > 0, key
            assert (row["setmaxreg"] > 0) == ("blackwell" in key), key


def test_a_changed_kernel_differs_from_its_row():
    triton = pytest.importorskip("triton")
    from sora_kernels import aot

    row = {"registers": 40, "spills": 0}
    committed = {"triton": triton.__version__, "kernels": {"k/sm_90": row}}
    assert aot.differences({"k/sm_90": row}, committed) == []
    assert len(aot.differences({"k/sm_90": {**row, "registers": 41}}, committed)) == 1
    assert aot.differences({"n/sm_90": row}, committed) == ["n/sm_90: not in the table"]
    older = {**committed, "triton": "3.0.0"}
    assert aot.differences({"k/sm_90": {**row, "registers": 41}}, older) == []


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
