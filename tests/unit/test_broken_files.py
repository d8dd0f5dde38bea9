"""Broken files of every part of a model: a typed error that names file and tensor, and nothing is
left loaded, mapped, open or running."""

from __future__ import annotations

import gc
import json
import os
import shutil
import struct
import sys
import threading
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

import sora_engine as sora
from sora_engine import Lora
from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import SafetensorsFile
from tests.parity.oracles import tiny_pipeline, tiny_transformer, tiny_vace
from tests.unit.part_recipes import (
    make_spiece,
    transformer_tensors,
    umt5_tensors,
    vae_tensors,
    with_tokenizer,
    write_umt5_gguf,
)
from tests.unit.test_vae_tiny import weights as tiny_vae_tensors
from tests.unit.weight_recipes import write_gguf, write_safetensors

SHAPE = {"num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 256}
HIGH, LOW, TEXT, VAE = "high.safetensors", "low.gguf", "umt5.safetensors", "vae.safetensors"
TINY, LORA, VACE, INDEX = "taew2_1.safetensors", "lora.safetensors", "vace.safetensors", "x.json"
SNAPSHOT = "models--a--b/snapshots/fedc/high.safetensors"
Q = "blocks.0.self_attn.q.weight"
SCALE = Q.replace("weight", "scale_weight")
UMT5_Q = "encoder.block.1.layer.0.SelfAttention.q.weight"
DOWN, UP = (f"diffusion_model.blocks.0.self_attn.q.lora_{way}.weight" for way in ("down", "up"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The files of a model with two experts, each in a format of its own."""
    root, plain = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("plain")
    pipe = tiny_pipeline("t2v", 0)
    pipe.transformer = tiny_transformer(0, **SHAPE)
    pipe.save_pretrained(plain)
    tensors = transformer_tensors(plain)
    write_safetensors(root / HIGH, "fp8_scaled, legacy", tensors)
    write_gguf(root / LOW, "Q8_0", tensors)
    text, spiece = umt5_tensors(plain), make_spiece()
    write_safetensors(
        root / TEXT, "fp8_scaled, legacy", text, chosen=lambda n, v: "SelfAttention.q" in n
    )
    save_file(with_tokenizer(load_file(root / TEXT), spiece), root / TEXT)
    save_file(vae_tensors(plain), root / VAE)
    save_file(tiny_vae_tensors("taew2_1"), root / TINY)
    save_file({DOWN: torch.ones(2, 128), UP: torch.ones(128, 2)}, root / LORA)
    vace = tiny_vace(0, **SHAPE, num_layers=2, vace_layers=[0, 1]).state_dict()
    save_file({n: v for n, v in vace.items() if n.startswith("vace_")}, root / VACE)
    return root


@pytest.fixture(scope="module")
def spiece():
    return make_spiece()


def load(root: Path) -> None:
    """The whole model, with whichever files there are."""
    index = root / INDEX
    vace = root / VACE
    parts = {"vae": root / VAE, "text_encoder": root / TEXT, "tiny_vae": root / TINY}
    text = root / TEXT.replace("safetensors", "gguf")
    if text.exists():
        parts["text_encoder"] = text
    if vace.exists():
        parts |= {"vace": vace, "vace_2": vace}
    high = next((p for p in (index, root / SNAPSHOT) if p.exists()), root / HIGH)
    sora.Engine.from_pretrained(
        [high, root / LOW], device="cpu", components=parts, loras=[Lora(root / LORA)],
        vae_backend="tiny",
    ).close()  # fmt: skip


def changed(file, **changes):
    """Tensors of a file in place of its own, by names with / for dots; None takes one out."""

    def spoil(root):
        with SafetensorsFile(root / file) as opened:
            metadata = dict(opened.metadata)
        tensors = load_file(root / file)
        for name, value in changes.items():
            name = name.replace("/", ".")
            old = tensors.pop(name, None)
            if value is not None:
                tensors[name] = value(old) if callable(value) else value
        save_file(tensors, root / file, metadata=metadata)

    return spoil


def slashed(name):
    return name.replace(".", "/")


def raw(file, content):
    return lambda root: (root / file).write_bytes(content)


def cut(file, share=0.9):
    def spoil(root):
        content = (root / file).read_bytes()
        (root / file).write_bytes(content[: int(len(content) * share)])

    return spoil


def header(file, change):
    """Change the entry of the first tensor in a header."""

    def spoil(root):
        content = (root / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        told = json.loads(content[8 : 8 + length])
        change(next(value for name, value in told.items() if name != "__metadata__"))
        text = json.dumps(told).encode()
        (root / file).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def of_gguf(change):
    """The second expert anew, from tensors and their types that were changed."""

    def spoil(root):
        reader = gguf.GGUFReader(root / LOW)
        tensors = {t.name: (t.data.copy(), t.tensor_type) for t in reader.tensors}
        del reader
        change(tensors)
        writer = gguf.GGUFWriter(root / LOW, arch="wan")
        for name, (data, form) in tensors.items():
            writer.add_tensor(name, data, raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return spoil


def patched_gguf(name, offset, value):
    """Bytes of a tensor's entry in the header, counted from the end of its name."""

    def spoil(root):
        content = bytearray((root / LOW).read_bytes())
        at = content.index(name.encode()) + len(name) + offset
        content[at : at + len(value)] = value
        (root / LOW).write_bytes(content)

    return spoil


def stray_link(root):
    (root / HIGH).rename(root / "stranger")
    (root / SNAPSHOT).parent.mkdir(parents=True)
    (root / SNAPSHOT).symlink_to(root / "stranger")


def index(weight_map):
    def spoil(root):
        (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def t5(root):
    torch.manual_seed(0)
    config = T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu")  # fmt: skip
    tensors = T5EncoderModel(config).state_dict()
    del tensors["encoder.embed_tokens.weight"]
    save_file(with_tokenizer(tensors, b""), root / TEXT)


def other_expert(root):
    write_gguf(root / LOW, "Q8_0", {
        name.replace("attn1.to_", "self_attn."): value
        for name, value in tiny_transformer(0, **{**SHAPE, "ffn_dim": 128}).state_dict().items()
    })  # fmt: skip


def of_14b(root):
    key = "lora_unet_blocks_39_self_attn_q.lora"
    pair = {f"{key}_down.weight": torch.ones(1, 5120), f"{key}_up.weight": torch.ones(5120, 1)}
    save_file(pair, root / LORA)


def broken_pieces(root):
    tensors = {k: v for k, v in load_file(root / TEXT).items() if k != "spiece_model"}
    plain = {k: v.float() for k, v in tensors.items() if "scale" not in k and v.numel()}
    path = root / TEXT.replace("safetensors", "gguf")
    write_umt5_gguf(path, plain, make_spiece(), scores=[0.0])


U8 = torch.uint8
UNKNOWN = torch.tensor(list(b'{"format": "w4a4"}'), dtype=U8)
E4M3 = torch.float8_e4m3fn
BROKEN = {
    # Whole files.
    "empty": (HIGH, raw(HIGH, b""), "truncated: 0 bytes", None),
    "cut": (HIGH, cut(HIGH), "truncated: .* ends at byte", ...),
    "cut in the header": (HIGH, cut(HIGH, 0.003), "truncated: a header of", None),
    "overlong header": (
        HIGH, raw(HIGH, struct.pack("<Q", 1 << 40) + b"{}"), "100000000 is the most", None,
    ),
    "a page of the web": (VAE, raw(VAE, b"<!DOCTYPE html><html>"), "a web page", None),
    "an LFS pointer": (
        VAE, raw(VAE, b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer", None,
    ),
    "a pickle under another name": (
        TINY, raw(TINY, b"PK\x03\x04\x00\x00\x08\x08" + bytes(8)), "a pickle", None,
    ),
    "no tensors": (VAE, lambda root: save_file({}, root / VAE), "no vae of Wan", None),
    "a link out of the snapshot": (
        SNAPSHOT, stray_link, "outside the repository of its snapshot", None,
    ),
    "an unknown dtype": (
        VAE, header(VAE, lambda e: e.update(dtype="F4")), "unsupported dtype 'F4'", ...,
    ),
    "a shape against its bytes": (
        TEXT, header(TEXT, lambda e: e.update(shape=[3])), "the header gives", ...,
    ),
    "an index out of its folder": (
        INDEX, index({Q: "../high.safetensors"}), "leaves the folder", Q,
    ),
    "an index of a missing shard": ("none.safetensors", index({Q: "none.safetensors"}),
                                    "missing shard", None),
    "an index of a missing tensor": (HIGH, index({"no.such": HIGH}), "here, and it is not",
                                     "no.such"),
    # Quantised transformers.
    "a scale missing": (HIGH, changed(HIGH, **{slashed(SCALE): None}), "no scale_weight", Q),
    "a scale of another shape": (
        HIGH, changed(HIGH, **{slashed(SCALE): torch.ones(7, 1)}), r"shape \[7, 1\]", SCALE,
    ),
    "a scale of NaN": (
        HIGH, changed(HIGH, **{slashed(SCALE): torch.tensor(float("nan"))}),
        "scale that is NaN or infinite", SCALE,
    ),
    "a scale of integers": (
        HIGH, changed(HIGH, **{slashed(SCALE): torch.ones(1, dtype=torch.int32)}),
        "scales are floating-point", SCALE,
    ),
    "an unknown marker": (
        HIGH, changed(HIGH, **{"blocks/0/self_attn/q/comfy_quant": UNKNOWN}), "format 'w4a4'", Q,
    ),
    "a marker of another shape": (
        HIGH, changed(HIGH, scaled_fp8=torch.zeros(3).to(E4M3)), r"\[3\]", "scaled_fp8",
    ),
    "svdquant": (
        HIGH, changed(HIGH, **{"blocks/0/self_attn/q/wscales": torch.ones(1)}), "svdquant",
        "blocks.0.self_attn.q.wscales",
    ),
    # Transformers.
    "a tensor missing": (
        HIGH, changed(HIGH, **{"blocks/1/self_attn/norm_q/weight": None}),
        "missing tensors: blocks.1.attn1.norm_q.weight", "blocks.1.attn1.norm_q.weight",
    ),
    "a tensor too many": (
        HIGH, changed(HIGH, **{"blocks/1/extra": torch.ones(1)}), "unexpected tensors",
        "blocks.1.extra",
    ),
    "a tensor of another shape": (
        HIGH, changed(HIGH, **{"blocks/1/modulation": torch.ones(1, 5, 128)}),
        r"has shape \[1, 5, 128\], the model has \[1, 6, 128\]", "blocks.1.modulation",
    ),
    "one tensor by two names": (
        HIGH, changed(HIGH, **{"proj_out/bias": torch.ones(64)}), "are both 'proj_out.bias'", ...,
    ),
    "integers for floats": (
        HIGH, changed(HIGH, **{"head/head/bias": torch.ones(64, dtype=torch.int32)}),
        "has dtype torch.int32", "head.head.bias",
    ),
    "two experts that differ": (LOW, other_expert, "the two experts differ: ffn_dim", None),
    # GGUF.
    "a GGUF cut": (LOW, cut(LOW), "truncated: .* ends at byte", ...),
    "a GGUF cut in its header": (LOW, cut(LOW, 0.002), "truncated", None),
    "a GGUF of another version": (
        LOW, raw(LOW, b"GGUF" + struct.pack("<I", 1) + bytes(64)), "GGUF version 1", None,
    ),
    "a wrong block size": (
        LOW, patched_gguf(Q, 4, struct.pack("<Q", 100)), "100 wide, no multiple", Q,
    ),
    "an IQ type": (LOW, patched_gguf(Q, 20, struct.pack("<I", 23)), "the type IQ4_XS", Q),
    "a GGUF without a tensor": (
        LOW, of_gguf(lambda t: t.pop("blocks.1.ffn.2.bias")), "missing tensors: blocks.1.ffn.net.2",
        "blocks.1.ffn.net.2.bias",
    ),
    # Text encoders.
    "a T5": (TEXT, t5, "a T5 encoder, whose first block alone", ...),
    "half a text encoder": (
        TEXT, changed(TEXT, **{slashed(UMT5_Q.replace("weight", "scale_weight")): None}),
        "has no scale_weight", UMT5_Q,
    ),
    "a torn tokenizer": (
        TEXT, changed(TEXT, spiece_model=lambda old: old[:-7]), "no SentencePiece model",
        "spiece_model",
    ),
    "a torn tokenizer of a GGUF": ("umt5.gguf", broken_pieces, "scores has 1 values for", None),
    # Autoencoders.
    "a VAE without a tensor": (
        VAE, changed(VAE, **{"decoder/conv1/bias": None}), "missing tensors", ...,
    ),
    "a VAE of other latents": (
        VAE, changed(VAE, **{"conv2/weight": torch.ones(8, 8, 1, 1, 1)}), "has 8 latent channels",
        "conv2.weight",
    ),
    "a tiny VAE of other latents": (
        TINY, lambda root: save_file(tiny_vae_tensors("taew2_2"), root / TINY),
        "for latents of 48 channels", None,
    ),
    "a tiny VAE without a tensor": (
        TINY, changed(TINY, **{"decoder/9/conv/0/weight": None}), "missing tensors",
        "decoder.9.conv.0.weight",
    ),
    # What is laid over.
    "half a VACE module": (
        VACE, changed(VACE, **{"vace_blocks/1/proj_out/bias": None}), "half a VACE module",
        "vace_blocks.1.proj_out.bias",
    ),
    "half an adapter": (LORA, changed(LORA, **{slashed(UP): None}), "half an adapter", DOWN),
    "an adapter of NaN": (
        LORA, changed(LORA, **{slashed(UP): torch.full((128, 2), torch.nan)}), "NaN", UP,
    ),
    "an adapter of another model": (LORA, of_14b, r"5120 wide \(14B\) of 40 layers", ...),
    "an adapter of nothing": (
        LORA, lambda root: save_file({"a.wisdom": torch.ones(1)}, root / LORA), "no adapter", ...,
    ),
    "an adapter cut": (LORA, cut(LORA, 0.5), "truncated", ...),
}  # fmt: skip


def live():
    """Bytes of tensors that something holds, of those made since the first load."""
    gc.collect()
    storages = {
        o.untyped_storage().data_ptr(): o.untyped_storage().nbytes()
        for o in gc.get_objects()
        if issubclass(type(o), torch.Tensor) and o.layout is torch.strided and not o.is_meta
    }
    return sum(storages.values())


@pytest.fixture(scope="module")
def loaded_once(good):
    """The files are good before they are spoiled; what a first load leaves for later ones."""
    load(good)
    (good / VACE).rename(good / "apart")
    load(good)
    (good / "apart").rename(good / VACE)
    gc.collect()
    gc.freeze()  # what is there by now is not looked through for each kind
    yield
    gc.unfreeze()


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_and_nothing_is_left(good, loaded_once, tmp_path, kind):
    file, spoil, says, tensor = BROKEN[kind]
    for name in (HIGH, LOW, TEXT, VAE, TINY, LORA, VACE):
        if name != VACE or file == VACE:
            shutil.copy(good / name, tmp_path / name)
    spoil(tmp_path)
    before, threads = live(), threading.active_count()
    with pytest.raises(CheckpointError, match=says) as caught:
        load(tmp_path)
    error, text = caught.value, str(caught.value)
    assert error.path == tmp_path / file
    assert text.startswith(f"{tmp_path / file}: ")
    assert "\n" not in text
    assert error.tensor is not None if tensor is ... else error.tensor == tensor
    assert error.tensor is None or error.tensor.rpartition(".")[0] in text
    del error, caught
    assert live() == before
    assert threading.active_count() == threads
    if sys.platform == "linux":
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        open_files = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                      if os.path.lexists(f"/proc/self/fd/{fd}")}  # fmt: skip
        assert not [path for path in open_files if path.startswith(str(tmp_path))]


def test_there_are_thirty_kinds_and_more():
    assert len(BROKEN) >= 30
