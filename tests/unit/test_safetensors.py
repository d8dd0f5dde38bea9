"""The reader against the format's own library, its typed errors, and its memory."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io import mapped_file
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import DTYPES, SafetensorsFile, Weights, find_weights


def write_raw(path, header, data=b"", length=None):
    """A file of exactly these bytes; `header` is an object, or the header's bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    values = {
        f"of.{name}": torch.randn(3, 5, generator=generator).mul(9).to(dtype)
        for name, dtype in DTYPES.items()
    }
    return {**values, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7)}


@pytest.mark.parametrize("piece", [64, 16 * 2**20])
def test_reads_what_the_library_writes(tmp_path, tensors, monkeypatch, piece):
    monkeypatch.setattr(mapped_file, "PIECE_BYTES", piece)
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with SafetensorsFile(path) as file, safe_open(path, "pt") as theirs:
        assert set(file.tensors) == set(theirs.keys()) == set(tensors)
        assert file.metadata == {"format": "pt"}
        for name in theirs.keys():  # noqa: SIM118 (not a mapping)
            expected = theirs.get_tensor(name)
            for got in (file.read(name), file.view(name)):
                assert got.dtype == expected.dtype
                assert got.shape == expected.shape
                assert got.view(-1).view(torch.uint8).equal(expected.view(-1).view(torch.uint8))
            if expected.is_floating_point():
                half = file.read(name, dtype=torch.bfloat16)
                torch.testing.assert_close(
                    half, expected.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True
                )


def test_a_read_tensor_outlives_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.arange(6.0)}, path)
    with SafetensorsFile(path) as file:
        w = file.read("w")
    path.write_bytes(b"")
    w.add_(1)
    assert w.tolist() == [1, 2, 3, 4, 5, 6]


def test_misaligned_data_is_read(tmp_path):
    header = json.dumps({"w": entry()}).encode()
    data = struct.pack("<2f", 1.5, -2.0)
    for pad in range(4):
        path = write_raw(tmp_path / f"{pad}.safetensors", header + b" " * pad, data)
        with SafetensorsFile(path) as file:
            assert file.read("w").tolist() == file.view("w").tolist() == [1.5, -2.0]


EIGHT = bytes(8)
BAD_FILES = {
    "empty file": (b"", "truncated: 0 bytes"),
    "seven bytes": (b"1234567", "truncated: 7 bytes"),
    "oversized header": (struct.pack("<Q", 2**40) + b"{}", "a header of 1099511627776 bytes"),
    "header beyond the end": (struct.pack("<Q", 99) + b"{}", "truncated: a header of 99 bytes"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "renamed zip pickle": (b"PK\x03\x04\x00\x00\x08\x08" + EIGHT, "a pickle under another name"),
    "renamed old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF" + EIGHT, "a pickle under another name"),
    "header not JSON": ((b"{'a': 1}", EIGHT), "the header is not JSON: Expecting property name"),
    "header not UTF-8": ((b'{"\xff": 1}', EIGHT), "not UTF-8"),
    "header a list": ((b"[]", b""), "the header holds a JSON list"),
    "header nested deep": ((b"[" * 200_000, b""), "not JSON"),
    "name twice": ((b'{"w": 1, "w": 2}', b""), "the key 'w' twice"),
    "metadata not strings": (({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "entry not an object": (({"w": 3}, b""), "must give dtype, shape and data_offsets"),
    "entry incomplete": (({"w": {"dtype": "F32", "shape": [2]}}, b""), "must give dtype"),
    "unknown dtype": (({"w": entry("F4")}, EIGHT), "unsupported dtype 'F4'"),
    "dtype not text": (({"w": entry(["F32"])}, EIGHT), "unsupported dtype"),
    "negative size": (({"w": entry(shape=(-2,))}, EIGHT), "shape \\[-2\\]"),
    "boolean size": (({"w": entry(shape=(True, 2))}, EIGHT), "shape \\[True, 2\\]"),
    "offsets reversed": (({"w": entry(offsets=(8, 0))}, EIGHT), "not a range of bytes"),
    "three offsets": (({"w": entry(offsets=(0, 4, 8))}, EIGHT), "not a range of bytes"),
    "shape against offsets": (({"w": entry(shape=(3,))}, EIGHT), "is 12 bytes, the header gives 8"),
    "huge shape": (({"w": entry(shape=(2**62, 2**62))}, EIGHT), "the header gives 8"),
    "overlap": (
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "the bytes of 'b' overlap those of 'a'",
    ),
    "hole": (({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "4 bytes before 'b'"),
    "truncated data": (
        ({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(15)),
        "'b' ends at byte",
    ),
    "bytes left over": (({"w": entry()}, bytes(9)), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_a_typed_error_that_names_it(tmp_path, kind):
    content, says = BAD_FILES[kind]
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_raw(path, *content)
    with pytest.raises(CheckpointError, match=says) as caught:
        SafetensorsFile(path)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")


def test_headers_whose_length_looks_like_something_else_are_read(tmp_path):
    header = json.dumps({"w": entry()}).encode()
    for length in (0x280, 0x480):  # the first bytes of pickles of protocols 2 and 4
        path = write_raw(tmp_path / f"{length}.safetensors", header.ljust(length), EIGHT)
        with SafetensorsFile(path) as file:
            assert file.read("w").tolist() == [0, 0]


def test_every_cut_of_a_file_is_refused(tmp_path, tensors):
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".BIN"])
def test_pickles_are_refused_before_they_are_opened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(CheckpointError, match=r"convert the weights to \.safetensors"):
        Weights.open(path)
    path.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"convert the weights to \.safetensors"):
        find_weights(tmp_path, "model")


def test_missing_file_folder_and_tensor(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Weights.open(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Weights.open(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_weights(tmp_path / "none", "model")
    with pytest.raises(CheckpointError, match=r"no weights; looked for model\.safetensors"):
        find_weights(tmp_path, "model")
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with (
        Weights.open(tmp_path / "w.safetensors") as weights,
        pytest.raises(CheckpointError, match="no tensor 'v'") as caught,
    ):
        weights.read("v")
    assert caught.value.tensor == "v"


def shards(folder, weight_map, **files):
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_one_set_of_weights(tmp_path):
    index = shards(
        tmp_path,
        {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"},
        one={"a": torch.full((2,), 1.0), "c": torch.full((2,), 3.0)},
        two={"b": torch.full((2,), 2.0)},
    )
    assert find_weights(tmp_path, "model") == index
    with Weights.open(index) as weights:
        assert sorted(weights) == ["a", "b", "c"]
        assert [weights.read(name)[0].item() for name in "abc"] == [1, 2, 3]
        assert weights.path_of("b").name == "two.safetensors"


A, B = {"a": torch.zeros(1)}, {"b": torch.zeros(1)}


@pytest.mark.parametrize(
    ("weight_map", "files", "says"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors"}, {"one": A}, "two.safetensors: missing"),
        ({"a": "../one.safetensors"}, {"one": A}, "leaves the folder"),
        ({"a": "/tmp/one.safetensors"}, {"one": A}, "leaves the folder"),
        ({"a": "sub\\one.safetensors"}, {"one": A}, "leaves the folder"),
        ({"a": ".."}, {"one": A}, "leaves the folder"),
        ({"a": "one.bin"}, {"one": A}, "convert the weights"),
        ({"a": "one.json"}, {"one": A}, "not a .safetensors file"),
        ({"a": 1}, {"one": A}, "has 1 for 'a'"),
        ({}, {"one": A}, "no 'weight_map'"),
        ({"z": "one.safetensors"}, {"one": A}, "lists tensor 'z' here, and it is not"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, {"one": A}, "lists tensor 'b' here"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, {"one": A, "two": {**A, **B}}, "also"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, weight_map, files, says):
    with pytest.raises(CheckpointError, match=says):
        Weights.open(shards(tmp_path, weight_map, **files))


def test_variants_serve_where_there_is_no_plain_file(tmp_path):
    for name in ("model.fp16", "model.bf16", "model"):
        save_file(A, tmp_path / f"{name}.safetensors")
        assert find_weights(tmp_path, "model") == tmp_path / f"{name}.safetensors"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.proj = nn.Linear(4, 3)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(2), persistent=False)


def small(**changes):
    """A meta module, and the tensors of a real one with some changed (None: left out)."""
    torch.manual_seed(1)
    tensors = {**Small().state_dict(), **changes}
    with torch.device("meta"):
        module = Small()
    return module, {name: value for name, value in tensors.items() if value is not None}


def test_load_into_gives_a_meta_module_its_weights(tmp_path):
    module, tensors = small(steps=torch.tensor([3, 4]), norm_added_q=torch.zeros(1))
    module.proj.bias.requires_grad_(False)
    stored = {f"old.{name}": value for name, value in tensors.items()}
    save_file(stored, tmp_path / "w.safetensors")
    with Weights.open(tmp_path / "w.safetensors") as weights:
        load_into(
            module,
            weights,
            dtype=torch.bfloat16,
            rename=lambda name: name.removeprefix("old."),
            keep_fp32=["norm1"],
            ignore=["norm_added_q"],
            buffers={"table": torch.tensor([5.0, 6.0])},
        )
    assert module.norm1.weight.dtype == torch.float32
    assert module.proj.weight.dtype == torch.bfloat16
    assert module.proj.weight.equal(tensors["proj.weight"].bfloat16())
    assert module.steps.tolist() == [3, 4]
    assert module.table.tolist() == [5, 6]
    assert module.proj.weight.requires_grad
    assert not module.proj.bias.requires_grad


@pytest.mark.parametrize(
    ("changes", "says", "tensor"),
    [
        ({"proj.bias": None}, "missing tensors: proj.bias", "proj.bias"),
        ({"extra": torch.zeros(1)}, "unexpected tensors: extra", "extra"),
        (
            {"proj.bias": None, "proj.b": torch.zeros(3)},
            "missing tensors: proj.bias; unexpected tensors: proj.b$",
            "proj.b",
        ),
        (
            {"proj.weight": torch.zeros(4, 3)},
            r"proj.weight has shape \[4, 3\], the model has \[3, 4\]",
            "proj.weight",
        ),
        (
            {"proj.weight": torch.zeros(3, 4, dtype=torch.int8)},
            "proj.weight has dtype torch.int8, the model has torch.float32",
            "proj.weight",
        ),
        ({f"x{i}": torch.zeros(1) for i in range(9)}, "and 3 more", "x0"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, changes, says, tensor):
    module, tensors = small(**changes)
    save_file(tensors, tmp_path / "w.safetensors")
    with (
        Weights.open(tmp_path / "w.safetensors") as weights,
        pytest.raises(CheckpointError, match=says) as caught,
    ):
        load_into(module, weights)
    assert caught.value.tensor == tensor
    assert caught.value.path == tmp_path / "w.safetensors"
    assert all(p.is_meta for p in module.parameters())


def test_two_names_for_one_tensor_and_a_forgotten_buffer(tmp_path):
    module, tensors = small()
    save_file(tensors, tmp_path / "w.safetensors")
    with Weights.open(tmp_path / "w.safetensors") as weights:
        with pytest.raises(CheckpointError, match=r"'norm1\.weight' are both 'norm1\.weight'"):
            load_into(module, weights, rename=lambda name: name.replace("1.bias", "1.weight"))
        with pytest.raises(ValueError, match="table"):
            load_into(module, weights)


@pytest.mark.parametrize("stored", [["a.weight"], ["b.weight"], ["a.weight", "b.weight"]])
def test_tied_names_share_one_parameter(tmp_path, stored):
    with torch.device("meta"):
        module = nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.Embedding(3, 2)})
    save_file({name: torch.arange(6.0).view(3, 2) for name in stored}, tmp_path / "w.safetensors")
    with Weights.open(tmp_path / "w.safetensors") as weights:
        load_into(module, weights, tied={"b.weight": "a.weight"})
    assert module["a"].weight is module["b"].weight
    assert module["a"].weight.flatten().tolist() == [0, 1, 2, 3, 4, 5]


MEASURE = """
import sys, torch
from torch import nn
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import Weights

def high_water_mark(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

path, dtype, sizes = sys.argv[1], getattr(torch, sys.argv[2]), eval(sys.argv[3])
torch.ones(8).to(dtype).float()
with torch.device("meta"):
    module = nn.ParameterDict({f"p{i}": nn.Parameter(torch.empty(n)) for i, n in enumerate(sizes)})
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
before = high_water_mark("VmRSS")
with Weights.open(path) as weights:
    load_into(module, weights, dtype=dtype)
print(high_water_mark("VmHWM") - before, sum(p.nbytes for p in module.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
def test_loading_peaks_below_1_2_times_the_weights(tmp_path, stored, loaded):
    # One tensor is a third of the model, as UMT5's table of tokens is nearly a fifth of it.
    sizes = [20_000_000, 7_000_000, 7_000_000, 9_000_000, 9_000_000, 1_000]
    sizes += [1_000_000] * 8
    path = tmp_path / "big.safetensors"
    save_file({f"p{i}": torch.ones(n, dtype=stored) for i, n in enumerate(sizes)}, path)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), loaded, repr(sizes)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    path.unlink()
    peak, weights = map(int, result.stdout.split())
    assert weights == math.fsum(sizes) * getattr(torch, loaded).itemsize
    print(f"{stored} -> {loaded}: peak {peak / weights:.3f} x {weights / 2**20:.0f} MiB")
    assert 0.95 * weights < peak < 1.2 * weights
