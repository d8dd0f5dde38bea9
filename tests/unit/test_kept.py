"""Weights that stay quantised in memory: the latents of the same values held dense, in the memory
that their files have."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sora_engine as sora
from sora_engine.errors import BackendError, CheckpointError, LayoutError
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.quantised import Int8Linear, QuantLinear, held_bytes, quantised_layers
from sora_engine.models.quantising import quantise_model
from sora_kernels.quant.formats import dequantise
from tests.parity.oracles import tiny_pipeline, tiny_transformer
from tests.unit.test_adapters_engine import REQUEST as ADAPTED
from tests.unit.test_adapters_engine import make_adapter
from tests.unit.test_checkpoint import original_name
from tests.unit.test_weights_models import REQUEST, SHAPE, WEIGHTS
from tests.unit.weight_recipes import GGUF, SAFETENSORS, write_gguf, write_safetensors

SPRITES = Path(sora.__file__).parent / "checkpoints/sprites"
DECODED_ONLY = ("mxfp8", "nvfp4", "float32", "bfloat16", "float16")
KEPT = [*(k for k in SAFETENSORS if k not in DECODED_ONLY), *(k for k in GGUF if k[0] == "Q")]
MODELS = [
    "fp8 e4m3 cast", "fp8_scaled e5m2, Kijai", "fp8 by row, LightX2V",
    "fp8 in blocks of 64, musubi",
    "int8 by tensor", "int8 by row", "int8 convrot 256", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K",
]  # fmt: skip
"""One of each arithmetic."""


def write(path, kind, tensors):
    if kind in GGUF:
        path = path.with_suffix(".gguf")
        return path, write_gguf(path, kind, tensors)
    path = path.with_suffix(".safetensors")
    return path, write_safetensors(path, kind, tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    made = tiny_pipeline("t2v", 0)
    made.transformer = tiny_transformer(0, **SHAPE)
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def originals(folder):
    return {original_name(name): value for name, value in load_file(folder / WEIGHTS).items()}


def apart(ours, theirs):
    """Relative to the largest latent."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def engine(path, folder, **options):
    return sora.Engine.from_pretrained(path, components=folder, device="cpu", **options)


@pytest.mark.parametrize("kind", KEPT)
def test_a_kept_weight_stands_for_its_values(tmp_path, kind):
    torch.manual_seed(3)
    path, values = write(tmp_path / "w", kind, {"blocks.0.q.weight": torch.randn(40, 512)})
    with open_weights(path) as weights:
        form = weights.kept_format("blocks.0.q.weight")
        kept = weights.read_kept("blocks.0.q.weight")
        assert kept.format == form
        assert kept.weight.untyped_storage().nbytes() == kept.weight.nbytes
        dense = dequantise(kept.weight, kept.scale, kept.format)
        if kept.rotation:
            from sora_engine.io.weights.codings import hadamard

            groups = dense.view(40, -1, kept.rotation)
            dense = (groups @ hadamard(kept.rotation)).view(40, 512)
        torch.testing.assert_close(dense, values["blocks.0.q.weight"], rtol=2e-6, atol=1e-6)
        shapes = weights.read_kept("blocks.0.q.weight", device="meta")
        assert (shapes.weight.shape, shapes.weight.is_meta) == (kept.weight.shape, True)


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4", "bfloat16", "F16"])
def test_what_is_only_decoded_is_not_kept(tmp_path, kind):
    path, _ = write(tmp_path / "w", kind, {"blocks.0.q.weight": torch.randn(40, 512)})
    with open_weights(path) as weights:
        assert weights.kept_format("blocks.0.q.weight") is None
        with pytest.raises(CheckpointError, match=r"blocks\.0\.q\.weight.*kept as stored"):
            weights.read_kept("blocks.0.q.weight")


@pytest.mark.parametrize("kind", MODELS)
def test_kept_weights_give_the_latents_of_dense_ones(folder, originals, tmp_path, kind):
    path, _ = write(tmp_path / "wan", kind, originals)
    with engine(path, folder, dtype="float32") as dense:
        expected = dense.generate(REQUEST).latents
    with engine(path, folder, dtype="as-stored:float32") as kept:
        layers = [layer for _, layer in quantised_layers(kept.model.transformer(0))]
        video = kept.generate(REQUEST)
    assert apart(video.latents, expected) < 1e-5
    assert len(layers) == 20  # of two blocks: eight projections, and the feed-forward's two
    assert {type(layer) for layer in layers} == {QuantLinear}
    (said,) = video.receipt.quantised.values()
    assert said == "20 layers, weights alone"
    assert video.receipt.lossy == {}
    assert video.provenance.settings["dtype"] == "as-stored:float32"


def test_a_dense_file_is_kept_dense(folder):
    with sora.Engine.from_pretrained(folder, device="cpu", dtype="as-stored:float32") as kept:
        assert not list(quantised_layers(kept.model.transformer(0)))
        assert kept.generate(REQUEST).receipt.quantised == {}


@pytest.mark.parametrize(("kind", "most"), [("int8 by row", 0.56), ("Q8_0", 0.56), ("Q4_K", 0.33)])
def test_kept_weights_take_the_memory_of_their_format(folder, tmp_path, kind, most):
    """As shares of the same model in bf16. Wan's proportions: a feed-forward six times as wide, and
    layers enough that embeddings are 2% of it all."""
    made = tiny_transformer(0, num_attention_heads=2, attention_head_dim=128, ffn_dim=1536,
                            num_layers=20)  # fmt: skip
    tensors = {original_name(name): value for name, value in made.state_dict().items()}
    path, _ = write(tmp_path / "wan", kind, tensors)
    bf16 = 2 * sum(value.numel() for value in tensors.values())
    with engine(path, folder, dtype="as-stored:bfloat16") as kept:
        model = kept.model
        held = held_bytes(model.transformer(0))
        assert model.experts[0].size_bytes == held
    print(f"{kind}: {held / bf16:.3f} of {bf16 / 2**20:.0f} MiB in bf16")
    assert held < most * bf16


def test_a_plan_knows_no_weights_and_holds(folder, originals, tmp_path):
    """What a request is promised to take is what it takes above the weights; the rehearsal has the
    layers that the model has."""
    path, _ = write(tmp_path / "wan", "Q8_0", originals)
    with engine(path, folder, dtype="float32") as dense:
        ours = dense.plan(REQUEST).peak
    with engine(path, folder, dtype="as-stored:float32") as kept:
        theirs = kept.plan(REQUEST).peak
        hollow = kept.model.transformer(0).without_weights()
        assert len(list(quantised_layers(hollow))) == 20
        assert all(tensor.is_meta for tensor in (*hollow.parameters(), *hollow.buffers()))
    assert ours <= theirs < ours + 2 * 2**20


@pytest.mark.parametrize("options", [{"exact": True}, {"offload": "blocks"}])
def test_kept_weights_elsewhere(folder, originals, tmp_path, options):
    path, _ = write(tmp_path / "wan", "Q4_K", originals)
    with engine(path, folder, dtype="float32", **options) as dense:
        expected = dense.generate(REQUEST).latents
    with engine(path, folder, dtype="as-stored:float32", **options) as kept:
        assert len(list(quantised_layers(kept.model.transformer(0)))) == 20
        assert apart(kept.generate(REQUEST).latents, expected) < 1e-5


def test_company_changes_nothing(folder, originals, tmp_path):
    path, _ = write(tmp_path / "wan", "Q5_1", originals)
    for dtype in ("as-stored:float32", "int8:float32"):
        with engine(path, folder, dtype=dtype) as kept:
            alone = kept.generate(REQUEST).latents
            many = kept.generate([REQUEST, sora.VideoRequest("blue", height=64, width=32,
                num_frames=9, num_inference_steps=4, seed=3)])  # fmt: skip
        assert apart(many[0].latents, alone) < 1e-5


def test_int8_products_say_what_they_lose(folder, originals, tmp_path):
    path, values = write(tmp_path / "wan", "bfloat16", originals)
    with engine(path, folder, dtype="float32") as dense:
        expected = dense.generate(REQUEST).latents
    with engine(path, folder, dtype="int8:float32") as lossy:
        layers = dict(quantised_layers(lossy.model.transformer(0)))
        video = lossy.generate(REQUEST)
    assert {type(layer) for layer in layers.values()} == {Int8Linear}
    assert video.receipt.quantised == {"int8": "20 layers, activations quantised too"}
    # The error that its weights have, measured here from the values.
    lost = whole = 0.0
    for name, value in values.items():
        if value.ndim == 2 and name.startswith("blocks."):
            value = value.double()
            scale = value.abs().amax(dim=1, keepdim=True) / 127
            lost += float(((value / scale).round() * scale - value).square().sum())
            whole += float(value.square().sum())
    assert video.receipt.lossy["int8 weights"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert 0.001 < video.receipt.lossy["int8 activations"] < 0.02
    error = float((video.latents - expected).norm() / expected.norm())
    assert 1e-5 < error < 0.05


def test_stored_int8_is_multiplied_as_it_is(folder, originals, tmp_path):
    """Nothing is quantised anew, so nothing is told of it."""
    path, _ = write(tmp_path / "wan", "int8 by row", originals)
    with engine(path, folder, dtype="int8:float32") as kept:
        video = kept.generate(REQUEST)
    assert "int8 weights" not in video.receipt.lossy


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        ("fp8", "compute capability 8.9"),
        ("as-stored:int4", "'int4'"),
        ("int9", "as-stored or int8"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(folder, dtype, named):
    with pytest.raises(BackendError, match=named):
        sora.Engine.from_pretrained(folder, device="cpu", dtype=dtype)


def test_shared_out_weights_are_refused(folder):
    layout = sora.ParallelConfig(ulysses=2, shard_weights=True)
    with pytest.raises(LayoutError, match=r"as-stored.*shard_weights"):
        sora.Engine.from_pretrained(folder, device="cpu", dtype="as-stored", parallel=layout)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    """The bundled checkpoint's transformer in Q8_0, and an adapter for it."""
    folder = tmp_path_factory.mktemp("sprites")
    quantise_model("sprites", folder / "sprites.gguf", "q8_0")
    shutil.copy(SPRITES / "transformer/config.json", folder)  # shapes do not tell the heads' width
    make_adapter(folder / "style.safetensors", seed=1, layers=range(2, 4), scale=0.3)
    return folder


def test_adapters_of_requests_lie_on_kept_weights(sprites):
    lora = sora.Lora(sprites / "style.safetensors")
    requests = [replace(ADAPTED, loras=[lora]), ADAPTED]
    found = {}
    for dtype in ("float32", "as-stored:float32"):
        with engine(sprites / "sprites.gguf", SPRITES, dtype=dtype) as made:
            found[dtype] = [video.latents for video in made.generate(requests)]
            kinds = {type(x) for _, x in quantised_layers(made.model.transformer(0))}
            assert kinds == ({QuantLinear} if dtype != "float32" else set())
    for ours, theirs in zip(found["as-stored:float32"], found["float32"], strict=True):
        assert apart(ours, theirs) < 1e-5
    assert apart(found["float32"][0], found["float32"][1]) > 1e-2


def test_layers_with_merged_adapters_are_dense(sprites):
    loras = [sora.Lora(sprites / "style.safetensors")]
    with engine(sprites / "sprites.gguf", SPRITES, dtype="float32", loras=loras) as dense:
        expected = dense.generate(ADAPTED).latents
    with engine(sprites / "sprites.gguf", SPRITES, dtype="as-stored:float32", loras=loras) as kept:
        names = {name for name, _ in quantised_layers(kept.model.transformer(0))}
        assert apart(kept.generate(ADAPTED).latents, expected) < 1e-5
        assert kept.model.experts[0].size_bytes == held_bytes(kept.model.transformer(0))
    assert {name.split(".")[1] for name in names} == {"0", "1", "2", "3", "4", "5"}
    assert 0 < len([name for name in names if name.startswith("blocks.2.")]) < 10


@pytest.mark.slow
def test_the_command_keeps_what_is_stored(sprites, tmp_path):
    out = tmp_path / "video.mp4"
    done = subprocess.run(
        [sys.executable, "-m", "sora_engine", "generate", "a red circle", "--steps", "2",
         "--model", str(sprites / "sprites.gguf"), "--components", str(SPRITES),
         "--device", "cpu", "--dtype", "as-stored", "-o", str(out)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 0
