"""Broken adapters: each error names the file, the tensor, and what would work."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from sora_engine import Lora
from sora_engine.errors import CheckpointError
from sora_engine.io.weights.adapters import read_adapter
from sora_engine.models.adapters import merges_of
from sora_engine.models.registry import family_named
from tests.unit.adapter_recipes import RECIPES
from tests.unit.test_adapters import Tiny

WAN = family_named("wan")
Q = "diffusion_model.blocks.0.self_attn.q"
O = "diffusion_model.blocks.1.self_attn.o"  # noqa: E741


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny") / "wan.safetensors")


def lora(tiny):
    return RECIPES["2 Wan's own names, down and up"](tiny.weights).tensors


def without(*names):
    def broken(tensors):
        for name in names:
            del tensors[name]

    return broken


def put(name, value):
    def broken(tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return broken


def spoiled(value):
    def broken(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return broken


BROKEN = {
    "half: no up": (without(f"{Q}.lora_up.weight"), f"{Q}.lora_down.weight", "half an adapter"),
    "half: no down": (without(f"{Q}.lora_down.weight"), f"{Q}.lora_up.weight", "half an adapter"),
    "alpha alone": (
        without(f"{Q}.lora_up.weight", f"{Q}.lora_down.weight"),
        f"{Q}.alpha",
        "an alpha without the matrices",
    ),
    "magnitude alone": (
        put("diffusion_model.head.head.dora_scale", torch.ones(64, 1)),
        "diffusion_model.head.head.dora_scale",
        "DoRA's magnitude without the matrices",
    ),
    "NaN": (put(f"{O}.lora_up.weight", spoiled(torch.nan)), f"{O}.lora_up.weight", "NaN or inf"),
    "infinity": (put(f"{O}.lora_down.weight", spoiled(torch.inf)), f"{O}.lora_down.weight", "NaN"),
    "alpha is NaN": (put(f"{Q}.alpha", torch.tensor(torch.nan)), f"{Q}.alpha", "is nan"),
    "alpha of several": (put(f"{Q}.alpha", torch.ones(2)), f"{Q}.alpha", "it is a number"),
    "ranks differ": (
        put(f"{Q}.lora_up.weight", torch.ones(24, 4)),
        f"{Q}.lora_up.weight",
        "the rank of .* is 4, and of .* 3",
    ),
    "integers": (
        put(f"{Q}.lora_up.weight", torch.ones(24, 3, dtype=torch.int32)),
        f"{Q}.lora_up.weight",
        "adapters are floating-point",
    ),
    "a vector": (put(f"{Q}.lora_up.weight", torch.ones(24)), f"{Q}.lora_up.weight", "no pair of"),
    "empty": (put(f"{Q}.lora_up.weight", torch.ones(24, 0)), f"{Q}.lora_up.weight", "no pair of"),
    "other sizes": (
        put(f"{Q}.lora_up.weight", torch.ones(25, 3)),
        None,
        r"of shape \[25, 24\], the model's has \[24, 24\]",
    ),
    "unknown keys": (
        put("diffusion_model.blocks.0.self_attn.q.wisdom", torch.ones(3)),
        f"{Q}.wisdom",
        "of no known kind of adapter: .*wisdom",
    ),
    "an unknown module": (
        lambda t: t.update({n.replace("self_attn.q", "self_attn.p"): t[n] for n in list(t)}),
        None,
        "are of nothing in this model: .*self_attn.p",
    ),
    "a layer too many": (
        lambda t: t.update({n.replace("blocks.1.", "blocks.7."): t[n] for n in list(t)}),
        None,
        "24 wide of 8 layers or more, and this model is .*24 wide of 2 layers",
    ),
    "two of one part": (
        put(f"{Q}.lora_B.weight", torch.ones(24, 3)),
        None,
        "are both one part",
    ),
    "two of one module": (
        lambda t: t.update({n.replace("diffusion_model.", "lora_unet_").replace(
            "blocks.0.self_attn.q", "blocks_0_self_attn_q"): t[n] for n in list(t) if Q in n}),
        None,
        "both change blocks.0.attn1.to_q.weight",
    ),
    "LoRA and LoHa": (
        put(f"{Q}.hada_w1_a", torch.ones(24, 3)),
        None,
        "has parts of lora and loha",
    ),
    "half of LoKr": (
        lambda t: t.update({f"{Q[:-1]}v.lokr_w2_a": torch.ones(3, 3)}) or [
            t.pop(f"{Q[:-1]}v.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha")
        ],
        f"{Q[:-1]}v.lokr_w2_a",
        "beside .* there must be lokr_w1, or",
    ),
    "a new shape": (
        put(f"{Q}.reshape_weight", torch.tensor([24.0, 48.0])),
        f"{Q}.reshape_weight",
        "changes the shape of the model's own",
    ),
    "OFT": (put(f"{Q}.oft_blocks", torch.ones(2, 2, 2)), f"{Q}.oft_blocks", "marks OFT"),
    "a text encoder": (
        put("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", torch.ones(())),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "is of a text encoder",
    ),
    "a bias where there is none": (
        put("diffusion_model.blocks.0.self_attn.norm_q.diff_b", torch.ones(24)),
        "diffusion_model.blocks.0.self_attn.norm_q.diff_b",
        "of nothing in this model",
    ),
    "a difference of another size": (
        put("diffusion_model.blocks.0.diff_m", torch.ones(1, 5, 24)),
        "diffusion_model.blocks.0.diff_m",
        r"of shape \[1, 5, 24\], the model's has \[1, 6, 24\]",
    ),
    "a magnitude of another size": (
        put(f"{Q}.dora_scale", torch.ones(7, 1)),
        f"{Q}.dora_scale",
        r"magnitudes of .* are \[24, 1\] or \[1, 24\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_told_of(tiny, tmp_path, kind):
    spoil, tensor, says = BROKEN[kind]
    tensors = lora(tiny)
    spoil(tensors)
    path = tmp_path / "adapter.safetensors"
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=says) as told:
        merges_of([Lora(path)], WAN, tiny.shapes, 1)
    assert told.value.path == path
    assert told.value.tensor in tensors
    if tensor is not None:
        assert told.value.tensor == tensor
        assert tensor in str(told.value)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("{", "lora_adapter_metadata is not JSON"),
        ("[1]", "it must be an object"),
        ({"r": "four", "lora_alpha": 8}, 'says r "four"; a number would work'),
        ({"r": 0, "lora_alpha": 8}, "says the rank 0"),
        ({"r": 3, "lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"r": 8, "lora_alpha": 8}, "is 3 in its tensors and 8 in the configuration"),
        ({"r": 3, "lora_alpha": 8, "rank_pattern": {"(a+)+$": 8}}, "end of a module's name would"),
    ],
)
def test_a_broken_header_is_told_of(tiny, tmp_path, metadata, says):
    made = RECIPES["1 diffusers, no alpha"](tiny.weights)
    path = tmp_path / "adapter.safetensors"
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(made.tensors, path, {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=says.replace("(", r"\(")) as told:
        read_adapter(path)
    assert told.value.path == path


def test_an_adapter_of_another_model_says_which_it_fits(tiny, tmp_path):
    big = {}
    for i in range(30):
        key = f"lora_unet_blocks_{i}_self_attn_q"
        big[f"{key}.lora_down.weight"] = torch.ones(2, 1536)
        big[f"{key}.lora_up.weight"] = torch.ones(1536, 2)
    path = tmp_path / "adapter.safetensors"
    save_file(big, path)
    with pytest.raises(CheckpointError, match=r"fits a wan transformer 1536 wide \(1.3B\) of 30"):
        merges_of([Lora(path)], WAN, tiny.shapes, 1)
    key = "transformer.double_blocks.0.img_attn.qkv"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(24, 2)}, path
    )
    with pytest.raises(CheckpointError, match="it fits no model known here"):
        merges_of([Lora(path)], WAN, tiny.shapes, 1)


def test_what_is_no_adapter_at_all(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter: "):
        read_adapter(tiny.path)
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_adapter(empty)
    with pytest.raises(CheckpointError, match="no such file"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"without adapter_model\.safetensors"):
        read_adapter(tmp_path)
    for suffix in (".pt", ".ckpt", ".bin"):
        (tmp_path / f"a{suffix}").write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError, match="pickles"):
            read_adapter(tmp_path / f"a{suffix}")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(struct.pack("<Q", 1000) + b"{}")
    with pytest.raises(CheckpointError, match=str(torn)):
        read_adapter(torn)
