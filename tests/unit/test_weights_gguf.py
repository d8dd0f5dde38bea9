"""GGUF files against the format's own Python package, and what is wrong with bad ones."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from sora_engine.errors import CheckpointError
from sora_engine.io.weights import gguf as reader
from sora_engine.io.weights import source as seam
from sora_engine.io.weights.gguf import GGUFWeights
from sora_engine.io.weights.gguf_blocks import FORMATS, OTHERS
from sora_engine.io.weights.opening import open_weights
from tests.unit.weight_recipes import GGUF, write_gguf


def tensors():
    torch.manual_seed(4)
    return {
        "blocks.0.q.weight": torch.randn(40, 512),
        "blocks.0.q.bias": torch.randn(40),
        "patch_embedding.weight": torch.randn(8, 4, 1, 2, 2),
        "blocks.0.modulation": torch.randn(1, 6, 8),
        "head.weight": torch.randn(6, 12),
    }


@pytest.mark.parametrize("kind", GGUF)
def test_a_type_gives_the_values_of_the_package(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(seam, "PIECE_VALUES", 512 * 7)
    path = tmp_path / "w.gguf"
    values = write_gguf(path, kind, tensors())
    with open_weights(path) as weights:
        assert isinstance(weights, GGUFWeights)
        assert weights.metadata["general.architecture"] == "wan"
        assert set(weights) == set(values)
        for name, value in values.items():
            assert weights.info(name).shape == tuple(value.shape)
            assert torch.equal(weights.read(name, dtype=torch.float32), value)
            assert torch.equal(weights.read(name, dtype=torch.bfloat16), value.bfloat16())
            rows = weights.read(name, dtype=torch.float32, rows=range(1, len(value)))
            assert torch.equal(rows, value[1:])
        stored = weights.info("blocks.0.q.weight").dtype
        assert weights.read("blocks.0.q.weight").dtype == stored
        assert stored == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)


def test_every_type_of_the_package_is_read_or_has_a_name():
    for form in gguf.GGMLQuantizationType:
        if form.value in FORMATS:
            mine = FORMATS[form.value]
            assert (mine.values, mine.size_bytes) == gguf.GGML_QUANT_SIZES[form]
            assert mine.name == form.name
        else:
            assert OTHERS[form.value] == form.name


def test_a_shape_that_ggml_could_not_hold(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", arch="wan")
    values = np.arange(64, dtype=np.float32)
    writer.add_array("comfy.gguf.orig_shape.patch", [4, 2, 2, 2, 2])
    writer.add_tensor("patch", values.reshape(8, 8))
    writer.add_tensor("flat", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_weights(tmp_path / "w.gguf") as weights:
        assert weights.read("patch").shape == (4, 2, 2, 2, 2)
        assert weights.read("patch", rows=range(1, 3)).flatten().tolist() == list(range(16, 48))
        flat = weights.read("flat")
        assert (flat - torch.from_numpy(values)).abs().max() < 0.3
        assert torch.equal(weights.read("flat", rows=range(5, 50)), flat[5:50])


def text(value):
    return struct.pack("<Q", len(value)) + value


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def entry(name=b"w", dims=(64, 2), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(*, version=3, values=(), entries=(), data=b"", counts=None, magic=b"GGUF", align=32):
    head = magic + struct.pack("<IQQ", version, *(counts or (len(entries), len(values))))
    head += b"".join(values) + b"".join(entries)
    return head + bytes(-len(head) % align) + data


KILO = bytes(1024)
SHAPE = b"comfy.gguf.orig_shape.w"
BAD = {
    "empty": (b"", "cannot be read", None),
    "four bytes": (b"GGUF", "truncated: the header goes on for 4 bytes at byte 4", None),
    "another magic": (raw(magic=b"GGML"), "not a GGUF file", None),
    "version 1": (raw(version=1), "GGUF version 1;", None),
    "big-endian": (raw(version=3 << 24), "of a big-endian machine", None),
    "more tensors than bytes": (raw(counts=(1 << 40, 0)), "a header of 1099511627776", None),
    "text past the end": (raw(values=[struct.pack("<Q", 1 << 50)]), "truncated", None),
    "name of no text": (raw(values=[pair(b"\xff", 4, bytes(4))]), "is no text", None),
    "metadata of no type": (raw(values=[pair(b"a", 77, b"")]), "unknown type 77", None),
    "arrays of arrays": (
        raw(values=[pair(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(64))]), "unknown type 9", None,
    ),
    "array past the end": (
        raw(values=[pair(b"a", 9, struct.pack("<IQ", 4, 1 << 40))]), "truncated", None,
    ),
    "texts past the end": (
        raw(values=[pair(b"a", 9, struct.pack("<IQ", 8, 1 << 40))]), "truncated: an array", None,
    ),
    "key twice": (
        raw(values=[pair(b"a", 4, bytes(4))] * 2), "the key 'a' twice", None,
    ),
    "alignment of no power of two": (
        raw(values=[pair(b"general.alignment", 4, struct.pack("<I", 24))], entries=[entry()],
            data=KILO), "general.alignment is 24", None,
    ),
    "tensor twice": (raw(entries=[entry()] * 2, data=KILO), "in the header twice", "w"),
    "nine dimensions": (raw(entries=[entry(dims=[1] * 9)], data=KILO), "9 dimensions", "w"),
    "IQ type": (
        raw(entries=[entry(kind=23)], data=KILO), "has the type IQ4_XS; F32, F16, BF16, Q8_0", "w",
    ),
    "type of no name": (raw(entries=[entry(kind=99)], data=KILO), "the type number 99", "w"),
    "offset off the grid": (raw(entries=[entry(offset=8)], data=KILO), "not aligned to 32", "w"),
    "width of no whole block": (
        raw(entries=[entry(dims=(48, 2), kind=8)], data=KILO), "48 wide, no multiple", "w",
    ),
    "overlap": (
        raw(entries=[entry(), entry(b"v", offset=32)], data=KILO), "'v' overlap those of 'w'", "v",
    ),
    "cut short": (raw(entries=[entry()], data=bytes(511)), "truncated: 'w' ends at byte", "w"),
    "huge shape": (raw(entries=[entry(dims=(1 << 60, 1 << 60))], data=KILO), "truncated", "w"),
    "original shape of another size": (
        raw(values=[pair(SHAPE, 9, struct.pack("<IQ2i", 5, 2, 3, 5))], entries=[entry()],
            data=KILO), r"is \[2, 64\] and was \[3, 5\]", "w",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_a_typed_error_that_names_it(tmp_path, kind):
    content, says, tensor = BAD[kind]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_weights(path)
    assert caught.value.path == path
    assert caught.value.tensor == tensor


def test_the_raw_files_of_these_tests_are_good_before_they_are_spoiled(tmp_path):
    path = tmp_path / "w.gguf"
    path.write_bytes(raw(entries=[entry(), entry(b"v", offset=512)], data=KILO))
    with GGUFWeights(path) as weights:
        assert weights.read("v").shape == (2, 64)
        with pytest.raises(CheckpointError, match="no tensor 'x'") as caught:
            weights.read("x")
        assert caught.value.tensor == "x"


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "w.gguf"
    write_gguf(path, "Q4_K", tensors())
    content = path.read_bytes()
    end = max(t.start + t.size_bytes for t in GGUFWeights(path).tensors.values())
    for length in [*range(0, 1000, 13), *range(1000, end, 997), end - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            reader.GGUFWeights(path)


def test_a_file_under_another_suffix_is_known_by_its_magic(tmp_path):
    write_gguf(tmp_path / "w.gguf", "Q8_0", tensors())
    (tmp_path / "w.gguf").rename(tmp_path / "w.safetensors")
    with open_weights(tmp_path / "w.safetensors") as weights:
        assert isinstance(weights, GGUFWeights)
