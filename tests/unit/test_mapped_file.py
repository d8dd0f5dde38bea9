"""Bytes out of a file, at once or behind: as the file has them, or an error; none is left open."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io import mapped_file
from sora_engine.io.loading import load_into
from sora_engine.io.mapped_file import Copies, MappedFile, room
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.quantised import Keeper, QuantLinear
from sora_kernels.quant import int8
from sora_kernels.quant.formats import dequantise
from tests.unit.weight_recipes import write_gguf, write_safetensors

SIZES = (1, 300, (1 << 18) + 7, (1 << 20) + 1, 0, (4 << 20) + 3, 1 << 19)


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "weights"
    made.write_bytes(os.urandom(sum(SIZES)))
    return made


def spans():
    start = 0
    for size in SIZES:
        yield start, size
        start += size


def read_all(path):
    """Tensors of all sizes in turn."""
    file = MappedFile(path)
    try:
        return [file.read(start, (size,), torch.uint8) for start, size in spans()], file
    except BaseException:
        file.close()
        raise


def check(made, path):
    data = path.read_bytes()
    for (start, size), tensor in zip(spans(), made, strict=True):
        assert bytes(tensor.numpy()) == data[start : start + size]


def open_files(path):
    found = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [f for f in found if os.path.lexists(f) and os.readlink(f) == str(path)]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("run", [1 << 19, 1 << 30])
def test_what_is_copied_behind_is_there_at_the_end(path, monkeypatch, run, kept):
    monkeypatch.setattr(mapped_file, "RUN_BYTES", run)
    monkeypatch.setattr(mapped_file, "PIECE_BYTES", 1 << 20)
    with Copies() as copies, copies.behind(kept=kept):
        made, file = read_all(path)
    file.close()
    check(made, path)
    made[2].zero_()  # and no other tensor has any of its bytes
    rest = MappedFile(path)
    made[2] = rest.view(301, 301 + SIZES[2]).clone()
    rest.close()
    check(made, path)


def test_kept_tensors_are_read_together_and_what_lies_between_is_not(path, monkeypatch):
    """Near ones by one read; across a gap, backwards and in another file by reads of their own."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    files, read = [MappedFile(path), MappedFile(other)], []
    read_into = MappedFile._read_into

    def noted(self, memory, start):
        read.append((files.index(self), start, len(memory)))
        read_into(self, memory, start)

    monkeypatch.setattr(MappedFile, "_read_into", noted)
    far = 1000 + mapped_file.GAP_BYTES + 1
    wanted = [(0, 0, 10), (0, 500, 500), (0, far, 7), (0, 3, 20), (1, 23, 100)]
    with Copies() as copies, copies.behind(kept=True):
        made = [files[i].read(start, (size,), torch.uint8) for i, start, size in wanted]
    assert sorted(read) == [(0, 0, 1000), (0, 3, 20), (0, far, 7), (1, 23, 100)]
    for (i, start, size), tensor in zip(wanted, made, strict=True):
        assert bytes(tensor.numpy()) == files[i].data[start : start + size]
    for file in files:
        file.close()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("start", [0, 1, 8])
def test_another_dtype_is_converted_on_the_way(path, monkeypatch, stored, start):
    monkeypatch.setattr(mapped_file, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(mapped_file, "SERIAL_VALUES", 100)
    values = torch.randn(70, 11).to(stored)
    path.write_bytes(bytes(start) + bytes(values.view(torch.uint8).numpy()))
    file = MappedFile(path)
    assert torch.equal(file.read(start, (70, 11), stored, dtype=torch.float16), values.half())
    with Copies() as copies, copies.behind(kept=True):
        read = file.read(start, (70, 11), stored, dtype=torch.float16)
        assert torch.equal(read, values.half())
    file.close()


@pytest.mark.parametrize("system", ["preadv", "none"])
def test_at_once_it_is_there_at_once(path, monkeypatch, system):
    if system == "none":  # as on Windows
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.setattr(mapped_file, "PIECE_BYTES", 1 << 20)
    made, file = read_all(path)
    check(made, path)
    file.close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_a_file_that_becomes_shorter_is_an_error_and_nothing_is_left(path):
    file = MappedFile(path)
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="nothing is left at byte 1000"):
        file.fill(900, torch.empty(300, dtype=torch.uint8))
    file.close()
    assert not open_files(path)
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_becomes_shorter_while_others_copy_behind(path):
    file, copies = MappedFile(path), Copies()
    os.truncate(path, 1000)
    with copies.behind():
        file.fill(sum(SIZES) - (1 << 20), room((1 << 20,), torch.uint8))
    with pytest.raises(CheckpointError, match="truncated"):
        copies.__exit__(None, None, None)
    file.close()


def slow_down(monkeypatch):
    """Every copy takes its time."""
    read_into = MappedFile._read_into

    def slowly(self, memory, start):
        time.sleep(0.02)
        read_into(self, memory, start)

    monkeypatch.setattr(MappedFile, "_read_into", slowly)


@pytest.mark.skipif(int8.problem() is not None, reason="no int8 products here")
def test_what_is_quantised_on_loading_is_there_by_then(tmp_path, monkeypatch):
    """Float32 for a run in float32: read as it is stored, and looked at."""
    weight, path = torch.randn(640, 512), tmp_path / "w.safetensors"
    save_file({"blocks.0.weight": weight}, path)
    slow_down(monkeypatch)
    with torch.device("meta"):
        module = nn.Module()
        module.blocks = nn.ModuleList([nn.Linear(512, 640, bias=False)])
    with open_weights(path) as weights:
        load_into(module, weights, dtype=torch.float32, keep=Keeper("int8", ["blocks"]))
    rows = weight.double()
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    lost, whole = module.blocks[0].error
    assert whole == pytest.approx(float(rows.square().sum()), rel=1e-5)
    assert lost == pytest.approx(float((rows - (rows / step).round() * step).square().sum()), 0.01)


@pytest.mark.parametrize("kind", ["fp8_scaled, legacy", "int8 by row", "Q8_0", "mxfp8"])
def test_nobody_looks_at_what_is_not_there_yet(tmp_path, monkeypatch, kind):
    """A matrix that is kept, and beside it what is decoded: where every copy takes its time."""
    write = write_gguf if kind.startswith("Q") else write_safetensors
    torch.manual_seed(0)
    names = ("blocks.0.weight", "head.weight", "blocks.1.weight")
    path = tmp_path / ("w.gguf" if kind.startswith("Q") else "w.safetensors")
    write(path, kind, {n: torch.randn(640, 512) for n in names}, chosen=lambda name, _: True)
    with open_weights(path) as weights:
        values = {name: weights.read(name) for name in names}
    slow_down(monkeypatch)
    with torch.device("meta"):
        module = nn.Module()
        module.blocks = nn.ModuleList(nn.Linear(512, 640, bias=False) for _ in range(2))
        module.head = nn.Linear(512, 640, bias=False)
    with open_weights(path) as weights:
        load_into(module, weights, dtype=torch.float32, keep=Keeper("as-stored", ["blocks"]))
    assert torch.equal(module.head.weight, values["head.weight"])
    for i in range(2):
        layer, expected = module.blocks[i], values[f"blocks.{i}.weight"]
        assert isinstance(layer, QuantLinear) == (kind != "mxfp8")
        own = layer.weight
        if kind != "mxfp8":
            own = dequantise(layer.weight, layer.scale, layer.format)
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-7)


def test_two_loads_at_once_do_not_meet(path):
    def load(_):
        with Copies() as copies, copies.behind(kept=True):
            made, file = read_all(path)
        file.close()
        check(made, path)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(load, range(6)))
