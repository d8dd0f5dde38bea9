"""LoHa and LoKr beside the weights, by request: their products are the changes themselves."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine import CheckpointError, Lora, VideoRequest
from sora_engine.io.weights.changes import Change
from sora_engine.models.low_rank import as_product, is_product, pays
from tests.parity.oracles import tiny_pipeline

REQUEST = VideoRequest(
    "red circle", height=32, width=32, num_frames=5, num_inference_steps=8, seed=1
)
PACKED = sora.Limits(pack_tokens=1 << 15)


def parts_of(kind, rows, width, rank=2):
    torch.manual_seed(rows)
    make = torch.randn
    if kind == "loha":
        shapes = {"w1_a": (rows, rank), "w1_b": (rank, width), "w2_a": (rows, rank + 1),
                  "w2_b": (rank + 1, width)}  # fmt: skip
        return {f"hada_{part}": make(shape) * 0.4 for part, shape in shapes.items()}
    (o1, i1), (o2, i2) = (2, 4), (rows // 2, width // 4)
    low = {"lokr_w2_a": make(o2, rank), "lokr_w2_b": make(rank, i2)}
    if kind == "lokr, first whole":
        return {"lokr_w1": make(o1, i1), **low}
    if kind == "lokr, second whole":
        return {"lokr_w1_a": make(o1, 1), "lokr_w1_b": make(1, i1), "lokr_w2": make(o2, i2)}
    return {"lokr_w1_a": make(o1, 1), "lokr_w1_b": make(1, i1), **low}


KINDS = ("loha", "lokr, first whole", "lokr, second whole", "lokr")


def by_hand(parts):
    """The change in float64."""
    parts = {name: value.double() for name, value in parts.items()}
    if "hada_w1_a" in parts:
        first = parts["hada_w1_a"] @ parts["hada_w1_b"]
        return first * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    each = [
        parts[f"lokr_w{n}"] if f"lokr_w{n}" in parts
        else parts[f"lokr_w{n}_a"] @ parts[f"lokr_w{n}_b"] for n in (1, 2)
    ]  # fmt: skip
    return torch.kron(*each)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(24, 40), (40, 24)])
def test_a_product_is_the_change(kind, rows, width):
    parts = parts_of(kind, rows, width)
    change = Change(kind.partition(",")[0], dict.fromkeys(parts, "x"), (rows, width))
    assert is_product(change)
    down, up = as_product(change, parts)
    want = by_hand(parts)
    assert up.shape == (rows, len(down))
    assert ((up.double() @ down.double()) - want).abs().max() < 1e-5 * want.abs().max()
    second = min(rows // 2, width // 4)  # the shorter side of the whole factor
    ranks = {"loha": 6, "lokr": 2, "lokr, first whole": 4, "lokr, second whole": second}
    assert len(down) == ranks[kind]
    assert pays(change, down, up)


def test_what_is_no_product():
    for kind, part in (("loha", "magnitude"), ("loha", "hada_t1"), ("lokr", "lokr_t2"),
                       ("lora", "mid"), ("diff", "diff")):  # fmt: skip
        assert not is_product(Change(kind, {part: "x"}, (4, 4)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    tiny_pipeline("t2v", 0).save_pretrained(path)
    return path


LAYERS = ("blocks_0_self_attn_q", "blocks_1_cross_attn_k", "blocks_1_ffn_0")
SIZES = {"blocks_1_ffn_0": (32, 24)}


def adapter(path, kind):
    tensors = {}
    for layer in LAYERS:
        for part, value in parts_of(kind, *SIZES.get(layer, (24, 24))).items():
            tensors[f"lora_unet_{layer}.{part}"] = value
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)
    return path


def test_by_request_they_are_as_merged_and_as_alone(model, tmp_path):
    files = {kind: adapter(tmp_path / f"{i}.safetensors", kind) for i, kind in enumerate(KINDS)}
    requests = [replace(REQUEST, loras=[Lora(file, 0.7)]) for file in files.values()]
    with sora.Engine.from_pretrained(model, device="cpu", limits=PACKED) as engine:
        plain = engine.generate(REQUEST).latents
        gate = threading.Event()  # the first one waits until all are there
        jobs = [engine.submit(REQUEST, on_progress=lambda _: gate.wait(60))]
        jobs += [engine.submit(request) for request in requests]
        gate.set()
        unadapted, *together = [job.result() for job in jobs]
        assert (unadapted.latents - plain).norm() < 1e-5 * plain.norm()
        for request, video in zip(requests, together, strict=True):
            assert video.receipt.most_in_company > 2
            alone = engine.generate(request).latents
            assert (video.latents - alone).norm() < 1e-5 * alone.norm()
    for file, video in zip(files.values(), together, strict=True):
        loras = [Lora(file, 0.7)]
        with sora.Engine.from_pretrained(model, device="cpu", loras=loras) as merged:
            want = merged.generate(REQUEST).latents
        assert (want - plain).norm() > 1e-3 * plain.norm()
        assert (video.latents - want).norm() < 1e-5 * want.norm()


def test_memory_is_that_of_the_products_and_what_does_not_pay_is_merged(model, tmp_path):
    path = adapter(tmp_path / "loha.safetensors", "loha")
    large = tmp_path / "large.safetensors"
    parts = parts_of("loha", 24, 24, rank=5)
    save_file({f"lora_unet_{LAYERS[0]}.{part}": value for part, value in parts.items()}, large)
    with sora.Engine.from_pretrained(model, device="cpu") as engine:
        limit = engine._planner.limit
        engine.load_lora(path, "a")
        taken = 6 * (2 * (24 + 24) + 32 + 24) * 4
        assert engine.loaded_model.adapters.nbytes == limit - engine._planner.limit == taken
        with pytest.raises(CheckpointError, match=r"by loha of rank 30 as a product, .* merges it"):
            engine.load_lora(large, "b")
        assert engine.loras == ("a",)
    sora.Engine.from_pretrained(model, device="cpu", loras=[Lora(large)]).close()
