"""Loading quantised files: the peak is what is kept and little more, and nothing is read twice."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from sora_engine.io.weights.opening import open_weights
from tests.unit.weight_recipes import write_gguf, write_safetensors

# One tensor is a third of the model, as UMT5's table of tokens is nearly a fifth of it.
SHAPES = [(6144, 4096), *[(2048, 4096)] * 3, *[(4096, 2048)] * 2, (2048, 2048), (2048, 2048)]

MEASURE = """
import sys, torch
from torch import nn
from sora_engine.io.loading import load_into
from sora_engine.io.weights.opening import open_weights

def high_water_mark(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

path, dtype, shapes = sys.argv[1], getattr(torch, sys.argv[2]), eval(sys.argv[3])
with open_weights(path) as weights:  # threads and code that any first read brings
    weights.read("0.weight", dtype=dtype, rows=range(8))
with torch.device("meta"):
    module = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in shapes)
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
before = high_water_mark("VmRSS")
with open_weights(path) as weights:
    load_into(module, weights, dtype=dtype)
print(high_water_mark("VmHWM") - before, sum(p.nbytes for p in module.parameters()))
"""


def write(path, kind):
    torch.manual_seed(0)
    tensors = {f"{i}.weight": torch.randn(shape) for i, shape in enumerate(SHAPES)}
    if kind.startswith("Q"):
        write_gguf(path, kind, tensors, chosen=lambda name, value: True)
    else:
        write_safetensors(path, kind, tensors, chosen=lambda name, value: True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "kind", ["fp8_scaled, legacy", "int8 convrot 256", "nvfp4", "Q8_0", "Q4_K"]
)
def test_loading_peaks_below_1_2_times_the_weights(tmp_path, kind):
    path = tmp_path / "big"
    write(path if kind.startswith("Q") else path.with_suffix(".safetensors"), kind)
    (path,) = tmp_path.iterdir()
    for loaded in ("bfloat16", "float32")[: 2 if kind == "Q4_K" else 1]:
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), loaded, repr(SHAPES)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        peak, weights = map(int, result.stdout.split())
        assert weights == sum(map(math.prod, SHAPES)) * getattr(torch, loaded).itemsize
        print(f"{kind} -> {loaded}: peak {peak / weights:.3f} x {weights / 2**20:.0f} MiB")
        assert 0.95 * weights < peak < 1.2 * weights
    path.unlink()


@pytest.mark.parametrize("kind", ["fp8_scaled, legacy", "int8 by row", "mxfp8", "nvfp4"])
def test_each_byte_is_read_once(tmp_path, monkeypatch, kind):
    from sora_engine.io.mapped_file import MappedFile

    path = tmp_path / "w.safetensors"
    write_safetensors(path, kind, {"blocks.0.q.weight": torch.randn(3000, 1024)})
    read = []
    view, fill = MappedFile.view, MappedFile.fill
    monkeypatch.setattr(
        MappedFile,
        "view",
        lambda self, start, end: read.append((start, end)) or view(self, start, end),
    )
    monkeypatch.setattr(
        MappedFile,
        "fill",
        lambda self, start, to: read.append((start, start + to.nbytes)) or fill(self, start, to),
    )
    with open_weights(path) as weights:
        read.clear()  # of the marks
        weights.read("blocks.0.q.weight")
    spans = sorted(read)
    assert len(spans) > 3
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
