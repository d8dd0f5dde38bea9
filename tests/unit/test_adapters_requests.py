"""Adapters of requests: each has its own in one batch, and none knows of another's."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine import (
    BackendError,
    CheckpointError,
    Clip,
    Lora,
    MemoryLimitError,
    RequestError,
    VideoRequest,
)
from sora_engine.denoise.adapting import AdapterRun, adapter_runs
from sora_engine.denoise.conditioning import Context
from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.io.weights.adapters import read_adapter
from sora_engine.models import adapter_store, offload
from sora_engine.models.adapter_store import LoadedAdapter
from sora_engine.models.cuda_graph import EAGER_PASSES, GraphedPasses
from sora_engine.models.linear import linear_gelu
from sora_engine.models.lora import AdaptedLinear, AdapterSet, LayerChange, Stretch, adapting
from sora_engine.testing import shadow
from sora_engine.testing.device import shadow_device
from tests.faults.test_memory_promise import metered  # noqa: F401
from tests.parity.oracles import tiny_pipeline
from tests.unit.adapter_recipes import RECIPES, Noise
from tests.unit.test_adapters_engine import REQUEST, close, make_adapter
from tests.unit.test_offload import Absent

MARGIN = 1e-5
OF_OTHERS: weakref.WeakSet[LoadedAdapter] = weakref.WeakSet()
PACKED = sora.Limits(pack_tokens=1 << 15)  # not measured: what shares a batch is settled


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters of different ranks and layers for sprites."""
    folder = tmp_path_factory.mktemp("adapters")
    made = []
    for seed in range(5):
        path = folder / f"style{seed}.safetensors"
        make_adapter(path, seed=seed, layers=range(seed, 6), scale=0.2 + 0.05 * seed)
        made.append(path)
    return made


@pytest.fixture
def engine():
    with sora.Engine.from_pretrained("sprites", device="cpu", limits=PACKED) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def of_others():
    """Adapters that other modules of tests left: a traceback may hold some."""
    OF_OTHERS.update(x for x in gc.get_objects() if isinstance(x, LoadedAdapter))


def state_of(engine):
    gc.collect()
    alive = sum(isinstance(x, LoadedAdapter) and x not in OF_OTHERS for x in gc.get_objects())
    return engine.loaded_model.adapters.nbytes, engine._planner.limit, alive


def test_eight_requests_with_five_adapters_are_each_as_alone(engine, files):
    for i, path in enumerate(files[:3]):
        engine.load_lora(path, f"style{i}")
    window = sora.WindowPlan(3, 1)
    requests = [
        replace(REQUEST, loras=[Lora("style0")]),
        REQUEST,
        replace(REQUEST, loras=[Lora("style1", -0.5)], seed=4, height=48),
        replace(REQUEST, loras=[Lora("style0", 0.3), Lora("style2")], prompt="a blue square"),
        replace(REQUEST, loras=[Lora(files[3])], guidance_scale=1.0),
        replace(REQUEST, loras=[Lora(files[4], 0.7)], num_frames=17, window=window),
        replace(REQUEST, prompt="a green square moves up", num_frames=9),
        replace(REQUEST, loras=[Lora("style2", 2.0), Lora(files[3], 0.5), Lora("style2", -1.0)]),
    ]
    alone = [engine.generate(request) for request in requests]
    together = engine.generate(requests)
    for one, other, request in zip(alone, together, requests, strict=True):
        assert other.receipt.most_in_company > 1
        assert close(other.latents, one.latents) < MARGIN
        plain = engine.generate(replace(request, loras=()))
        assert (close(plain.latents, one.latents) > 1e-3) == bool(request.loras)
        assert other.receipt.loras == one.receipt.loras
    assert together[3].receipt.loras == ["style0.safetensors:0.3", "style2.safetensors:1"]
    assert [r["name"] for r in together[5].provenance.settings["loras"]] == ["style4.safetensors"]
    assert engine.loras == ("style0", "style1", "style2")


def test_a_neighbour_with_adapters_changes_no_bit_of_one_without(engine, files):
    """Rows without adapters go the way that they go alone, GELU included."""
    alone = engine.generate(REQUEST)
    _, other = engine.generate([replace(REQUEST, loras=[Lora(files[0])]), REQUEST])
    assert other.receipt.most_in_company == 2
    assert torch.equal(other.latents, alone.latents)


def test_exact_engines_give_the_same_bits_in_any_company(files):
    loras = ([Lora(files[0])], [Lora(files[1], 0.5), Lora(files[2])], [])
    requests = [replace(REQUEST, loras=each, height=32 + 16 * i) for i, each in enumerate(loras)]
    options = {"device": "cpu", "exact": True, "limits": PACKED}
    with sora.Engine.from_pretrained("sprites", **options) as engine:
        alone = [engine.generate(request) for request in requests]
        together = engine.generate(requests)
    for one, other in zip(alone, together, strict=True):
        assert other.receipt.most_in_company > 1
        assert torch.equal(other.latents, one.latents)


def lora_for(path, kind, folder):
    """LoRA with biases of every layer that may have adapters by rows."""
    noise, tensors = Noise(7), {}
    shapes = {}
    for part in ("transformer", "transformer_2"):
        for file in sorted((folder / part).glob("*.safetensors")):
            shapes |= {name: value.shape for name, value in load_file(file).items()}
    with sora.Engine.from_pretrained(folder, device="cpu") as made:
        adaptable = made.loaded_model.loaded_transformer.adaptable
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer != name and re.fullmatch(adaptable, layer):
            key = f"transformer.{layer}"
            tensors[f"{key}.lora_A.weight"] = noise(3, shape[1], scale=0.15)
            tensors[f"{key}.lora_B.weight"] = noise(shape[0], 3, scale=0.15)
            tensors[f"{key}.diff_b"] = noise(shape[0], scale=0.1)
    save_file(tensors, path)
    return len(tensors) // 3


LAYERS = {"t2v": 23, "i2v": 29, "vace": 66, "a14b-t2v": 23, "ti2v-5b": 23}


@pytest.mark.parametrize("kind", LAYERS)
def test_beside_the_weights_it_is_as_merged(tmp_path, kind, monkeypatch):
    folder, path = tmp_path / "model", tmp_path / "all.safetensors"
    tiny_pipeline(kind, seed=3).save_pretrained(folder)
    assert lora_for(path, kind, folder) == LAYERS[kind]
    clips = [Clip(torch.rand(1, 32, 32, 3).mul(255).byte().numpy())] if kind == "i2v" else []
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6, "seed": 1}
    request = VideoRequest("a red circle moves left", guidance_scale=2.0, clips=clips, **size)
    # Of two experts, each has the adapters that are its own.
    loras = [Lora(path, 0.5)]
    if kind == "a14b-t2v":
        loras = [Lora(path, 0.5, "high"), Lora(path, -0.3, "low")]
    with sora.Engine.from_pretrained(folder, device="cpu", loras=loras) as made:
        merged = made.generate(request)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=PACKED) as made:
        plain = made.generate(request)
        beside, neighbour = made.generate([replace(request, loras=loras), request])
        alone = made.generate(replace(request, loras=loras))
    assert beside.receipt.most_in_company == 2
    assert close(neighbour.latents, plain.latents) < MARGIN
    assert close(plain.latents, merged.latents) > 1e-2
    assert close(beside.latents, merged.latents) < MARGIN
    assert close(beside.latents, alone.latents) < MARGIN
    assert beside.receipt.loras == merged.receipt.loras
    monkeypatch.setattr(offload, "OffloadedModules", Absent)
    with sora.Engine.from_pretrained(folder, offload="blocks") as made:
        visiting = made.generate(replace(request, loras=loras))
    assert torch.equal(visiting.latents, alone.latents)


def test_loading_and_unloading_leaves_nothing(engine, files):
    before = state_of(engine)
    for i in range(100):
        engine.load_lora(files[i % 5], "style")
        assert engine.loaded_model.adapters.nbytes > 0
        engine.unload_lora("style")
        if i % 20 == 0:
            engine.generate(replace(REQUEST, num_inference_steps=1, loras=[Lora(files[i % 5])]))
    assert state_of(engine) == before
    assert before[0] == before[2] == 0
    assert engine.loras == ()


def test_an_adapter_stays_as_long_as_a_job_has_it(engine, files):
    before = state_of(engine)
    expected = engine.generate(replace(REQUEST, loras=[Lora(files[0])]))
    engine.load_lora(files[0], "style")
    held = state_of(engine)
    assert held[0] == before[1] - held[1] > 0  # what requests may take is less by as much
    job = engine.submit(replace(REQUEST, loras=[Lora("style")], num_inference_steps=40))
    same = engine.submit(replace(REQUEST, loras=[Lora("style")]))
    engine.unload_lora("style")
    with pytest.raises(RequestError, match="no adapter 'style': no such file, and none is loaded"):
        engine.submit(replace(REQUEST, loras=[Lora("style")]))
    assert torch.equal(same.result().latents, expected.latents)
    job.result()
    assert state_of(engine) == before


def test_one_file_is_held_once_whatever_its_names(engine, files):
    engine.load_lora(files[0], "a")
    size = engine.loaded_model.adapters.nbytes
    engine.load_lora(files[0], "b")
    engine.generate(replace(REQUEST, loras=[Lora(files[0])]))
    assert engine.loaded_model.adapters.nbytes == size
    assert engine.load_lora(files[1]) == "style1"
    with pytest.raises(RequestError, match="an adapter 'a' is loaded; unload it"):
        engine.load_lora(files[1], "a")
    with pytest.raises(RequestError, match="no adapter 'c' is loaded; loaded are a, b, style1"):
        engine.unload_lora("c")
    for bad in ("", 3):
        with pytest.raises(RequestError, match="the name of an adapter"):
            engine.load_lora(files[1], bad)


NOT_BY_ROWS = [
    "5 extracts with differences",
    "6 alphas outside of blocks",
    "7 LoKr",  # of whole factors
    "8 DoRA by rows",
    "11 a convolution",
]


@pytest.mark.parametrize("kind", NOT_BY_ROWS)
def test_what_cannot_differ_by_request_says_to_merge_it(tmp_path, kind):
    folder = tmp_path / "model"
    made = tiny_pipeline("t2v", seed=3)
    made.save_pretrained(folder)
    path = tmp_path / "adapter.safetensors"
    recipe = RECIPES[kind](made.transformer.state_dict())
    save_file(recipe.tensors, path, recipe.metadata)
    request = VideoRequest("a", height=32, width=32, num_frames=5, num_inference_steps=1)
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        before = state_of(engine)
        for attempt in (
            lambda: engine.load_lora(path),
            lambda: engine.submit(replace(request, loras=[Lora(path)])),
        ):
            with pytest.raises(CheckpointError, match="merges it on loading") as told:
                attempt()
            assert told.value.path == path
            assert told.value.tensor in recipe.tensors
        assert state_of(engine) == before
        assert engine.loras == ()
    sora.Engine.from_pretrained(folder, device="cpu", loras=[Lora(path)]).close()


def test_a_file_that_changed_is_another_adapter(engine, tmp_path, monkeypatch):
    path = tmp_path / "style.safetensors"
    make_adapter(path)
    request = replace(REQUEST, loras=[Lora(path)], num_inference_steps=1)
    engine.load_lora(path, "before")
    reads = []
    monkeypatch.setattr(
        adapter_store, "read_adapter", lambda path: reads.append(path) or read_adapter(path)
    )
    first = engine.generate(request)
    assert reads == []  # it is there
    make_adapter(path, seed=9)
    second = engine.generate(request)
    assert len(reads) == 1
    assert close(second.latents, first.latents) > 1e-3
    again = engine.generate(replace(request, loras=[Lora("before")]))
    assert torch.equal(again.latents, first.latents)


def test_a_broken_adapter_leaves_nothing_loaded(engine, files, tmp_path):
    path = tmp_path / "broken.safetensors"
    tensors = load_file(files[0])
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    before = state_of(engine)
    for spoiled, says in (
        ({name: torch.full_like(tensors[name], torch.nan)}, "NaN or infinity"),
        ({name: torch.ones(7, 4)}, "the model's has"),
        ({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, "half an adapter"),
        ({"mystery": torch.ones(2)}, "of no known kind"),
    ):
        save_file({**tensors, **spoiled}, path)
        with pytest.raises(CheckpointError, match=says) as told:
            engine.load_lora(path)
        assert told.value.path == path
        assert state_of(engine) == before
        assert engine.loras == ()
    with pytest.raises(RequestError, match="no such file"):
        engine.submit(replace(REQUEST, loras=[Lora(tmp_path / "none.safetensors")]))
    for bad in ("style", [3], [Lora("x", "much")], [Lora("x", 1.0, "high")]):
        with pytest.raises(RequestError, match=r"loras|Lora"):
            engine.submit(replace(REQUEST, loras=bad))


def test_memory_that_adapters_take_is_asked_for_first(files):
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        engine.load_lora(files[0])
        size = engine.loaded_model.adapters.nbytes
    limits = sora.Limits(memory_bytes=size - 1)
    with sora.Engine.from_pretrained("sprites", device="cpu", limits=limits) as engine:
        with pytest.raises(MemoryLimitError, match="an adapter takes") as told:
            engine.load_lora(files[0])
        assert (told.value.needed, told.value.limit) == (size, size - 1)
        assert state_of(engine) == (0, size - 1, 0)


def test_the_promise_holds_with_adapters(metered, engine, files):  # noqa: F811
    window = sora.WindowPlan(48, 8)  # packed together, so that steps have the peak
    size = {"height": 32, "width": 32, "num_frames": 193, "num_inference_steps": 1}
    request = replace(REQUEST, window=window, **size)
    engine.generate(replace(request, loras=[Lora(files[0])]))
    engine.load_lora(files[0], "style")
    engine.load_lora(files[2], "other")
    plain = engine.plan(request)
    assert plain.denoise == plain.peak
    for loras in ((), [Lora("style")], [Lora("style"), Lora("other", 0.5)]):
        promised, taken = metered(engine, replace(request, loras=loras))
        assert 0.7 * promised <= taken <= promised
        assert (taken > plain.peak) == bool(loras)


def test_a_saved_job_goes_on_where_its_adapters_are_loaded(engine, files, tmp_path):
    saved = tmp_path / "job"
    whole = engine.submit(
        replace(REQUEST, loras=[Lora(files[0], 0.5)], num_inference_steps=3), save_to=saved
    ).result()
    gc.collect()
    with pytest.raises(CheckpointError, match=r"style0\.safetensors \(sha256 \w+\) is not loaded"):
        engine.resume(saved)
    engine.load_lora(files[0], "by another name")
    again = engine.resume(saved).result()
    assert torch.equal(again.latents, whole.latents)
    assert again.receipt.loras == whole.receipt.loras == ["style0.safetensors:0.5"]
    assert again.provenance == whole.provenance
    assert str(files[0].parent) not in saved.read_bytes().decode("latin-1")


def test_on_a_device_they_cost_no_wait(tmp_path, monkeypatch):
    """On the shadow of a GPU, where the host is counted: the values are a CPU's."""
    folder, path = tmp_path / "model", tmp_path / "all.safetensors"
    tiny_pipeline("t2v", seed=3).save_pretrained(folder)
    lora_for(path, "t2v", folder)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 1}
    plain = VideoRequest("a red circle", **size)
    request = replace(plain, loras=[Lora(path, 0.5)])
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        expected = engine.generate(request).latents
    in_float32 = partial(shadow.load_video_model, dtype="float32")
    monkeypatch.setattr(shadow, "load_video_model", in_float32)
    with shadow_device() as device:
        there = shadow.load(folder, device)
        made = shadow.walk(there, request, device, decode=False)
        without = shadow.walk(there, plain, device, decode=False)
    assert close(made.latents, expected) < 1e-4
    for name, tally in made.phases.items():
        assert tally.waits == without.phases[name].waits, name


def test_a_pass_with_adapters_is_no_cuda_graph():
    """What is recorded has the layers of the moment in it."""

    def record(*arguments, **options):
        raise RuntimeError("recorded")

    packer = Packer((1, 2, 2), torch.device("cpu"))
    context = Context()
    segment = Segment(torch.zeros(4, 1, 4, 4), torch.zeros(1), ((context, 1),))
    own = replace(segment, contexts=((replace(context, adapters=AdapterSet({})), 1),))
    shape = TransformerShape(
        num_layers=1, num_heads=1, head_dim=4, ffn_dim=4, in_channels=4, out_channels=4
    )
    passes = GraphedPasses(lambda batch: batch.video.tokens, shape, required=True, recorder=record)
    with torch.inference_mode():
        for _ in range(6):
            batch = packer.pack([segment, own])
            assert batch.adapters == (AdapterRun(own.contexts[0][0].adapters, 4, 8),)
            passes(batch)
        for _ in range(EAGER_PASSES):
            passes(packer.pack([segment, segment]))
        with pytest.raises(BackendError, match="recorded"):
            passes(packer.pack([segment, segment]))


def test_runs_of_tokens():
    one, two = AdapterSet({}), AdapterSet({})
    runs = adapter_runs([(one, 3), (one, 2), (None, 4), (two, 1), (one, 5)])
    assert runs == (AdapterRun(one, 0, 5), AdapterRun(two, 9, 10), AdapterRun(one, 10, 15))
    assert adapter_runs([(None, 3)]) == ()


class Fused(torch.nn.Linear):
    """A layer whose GELU in one pass can be told from one behind it."""

    def with_gelu(self, x, approximate):
        return torch.full((len(x), self.out_features), 7.0)


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 3), (2, 6), (0, None), (5, 6)])
def test_rows_without_adapters_keep_their_way_through_gelu(start, stop):
    layer, x = Fused(4, 5), torch.randn(6, 4)
    changes = [(LayerChange(bias=torch.ones(5)), 2.0)]
    with torch.no_grad():
        y = linear_gelu(AdaptedLinear(layer, [Stretch(changes, start, stop)]), x, "tanh")
        expected = torch.full((6, 5), 7.0)
        expected[start:stop] = torch.nn.functional.gelu(layer(x) + 2, approximate="tanh")[
            start:stop
        ]
    torch.testing.assert_close(y, expected)


def test_layers_are_put_back_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    layers = list(model)
    adapters = AdapterSet({"0": [(LayerChange(bias=torch.ones(4)), 1.0)]})
    x = torch.randn(3, 4)
    with torch.no_grad(), adapting(model, [AdapterRun(adapters, 1, 2)]):
        changed = model[0](x) - layers[0](x)
    assert torch.equal(changed[[0, 2]], torch.zeros(2, 4))
    torch.testing.assert_close(changed[1], torch.ones(4))
    with pytest.raises(AttributeError), adapting(model, [AdapterRun(AdapterSet({"9": []}))]):
        pass
    with pytest.raises(ZeroDivisionError), adapting(model, [AdapterRun(adapters)]):
        _ = 1 / 0
    assert list(model) == layers
