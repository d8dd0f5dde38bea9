"""Adapters merged on loading: the weights are those merged by hand in float64, by PEFT, and by
diffusers."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_engine import Lora
from sora_engine.errors import CheckpointError, RequestError
from sora_engine.io.weights.adapters import read_adapter
from sora_engine.io.weights.changes import PIECE_VALUES, Change
from sora_engine.io.weights.merging import Applied, Merge
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.adapters import merges_of
from sora_engine.models.registry import family_named
from sora_engine.models.wan.checkpoint import TransformerSource
from sora_engine.models.wan.model import WanTransformer
from sora_engine.models.wan.names import to_diffusers_name
from sora_engine.models.wan.shapes import infer_config
from sora_engine.vae.meter import StorageMeter
from tests.unit.adapter_recipes import RECIPES, Made, own, relative_error, with_strength
from tests.unit.test_checkpoint import original_name
from tests.unit.wan_folders import IMAGE, TINY, transformer

BOUND = 1e-6  # one product and one sum in float32, of values of about 1
WAN = family_named("wan")


class Tiny:
    """A transformer in a file under Wan's own names, and its weights by diffusers'."""

    def __init__(self, path, **changes):
        self.path = path
        self.model = transformer(**changes)
        self.weights = self.model.state_dict()
        save_file({original_name(n): v.clone() for n, v in self.weights.items()}, path)
        with open_weights(path) as stored:
            shapes = {to_diffusers_name(n): stored.info(n).shape for n in stored}
        config = infer_config(shapes, head_dim=12, path=path)
        self.source = TransformerSource(path, config)
        with torch.device("meta"):
            module = WanTransformer(config)
        self.shapes = {n: tuple(v.shape) for n, v in module.state_dict().items()}

    def merged(self, *loras, experts=1, dtype=torch.float32, shard=None):
        """The weights of each expert with adapters merged in."""
        merges, _ = merges_of(loras, WAN, self.shapes, experts)
        states = []
        for merge in merges:
            with torch.device("meta"):
                module = WanTransformer(self.source.config)
            self.source.load(module, dtype=dtype, merge=merge)
            states.append(module.state_dict())
        return states


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny") / "wan.safetensors")


def saved(made: Made, path):
    save_file(made.tensors, path, made.metadata)
    return path


def check(state, weights, after, bound=BOUND):
    """What an adapter is to change is changed, and nothing else."""
    for name, value in state.items():
        if name in after:
            assert relative_error(value, after[name]) < bound, name
            assert relative_error(weights[name], after[name]) > 1e-3, f"{name} hardly changes"
        else:
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_each_layout_is_merged_as_by_hand(tiny, tmp_path, kind, strength):
    made = RECIPES[kind](tiny.weights)
    path = saved(made, tmp_path / "adapter.safetensors")
    (state,) = tiny.merged(Lora(path, strength))
    check(state, tiny.weights, with_strength(tiny.weights, made.after, strength))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32_and_then_cast(tiny, tmp_path, dtype):
    made = RECIPES["2 Wan's own names, down and up"](tiny.weights)
    made.tensors = {name: value.to(dtype) for name, value in made.tensors.items()}
    path = saved(made, tmp_path / "adapter.safetensors")
    (exact,) = tiny.merged(Lora(path, 0.5))
    (state,) = tiny.merged(Lora(path, 0.5), dtype=dtype)
    for name in made.after:
        assert torch.equal(state[name], exact[name].to(dtype))


def test_adapters_add_up_in_any_order(tiny, tmp_path):
    kinds = ["8 DoRA by rows", "7 LoKr", "5 extracts with differences"]
    made = [RECIPES[kind](tiny.weights) for kind in kinds]
    loras = [
        Lora(saved(m, tmp_path / f"{i}.safetensors"), 0.3 * (i + 1)) for i, m in enumerate(made)
    ]
    total = {}
    for lora, m in zip(loras, made, strict=True):
        for name, value in m.after.items():
            before = tiny.weights[name].double()
            total[name] = total.get(name, before) + lora.strength * (value - before)
    check(tiny.merged(*loras)[0], tiny.weights, total)
    check(tiny.merged(*reversed(loras))[0], tiny.weights, total)


def test_a_strength_of_0_leaves_the_weights_as_they_are(tiny, tmp_path):
    path = saved(RECIPES["8 DoRA by rows"](tiny.weights), tmp_path / "a.safetensors")
    check(tiny.merged(Lora(path, 0.0))[0], tiny.weights, {})


def test_experts_have_adapters_of_their_own(tiny, tmp_path):
    high, low = RECIPES["7 LoHa"](tiny.weights), RECIPES["9 DiffSynth"](tiny.weights)
    first, second = (saved(m, tmp_path / f"{i}.safetensors") for i, m in enumerate((high, low)))
    states = tiny.merged(Lora(first, expert="high"), Lora(second, expert="low"), experts=2)
    check(states[0], tiny.weights, high.after)
    check(states[1], tiny.weights, low.after)
    for state in tiny.merged(Lora(first), experts=2):
        check(state, tiny.weights, high.after)


def test_a_file_with_both_experts(tiny, tmp_path):
    """As `WanPipeline.save_lora_weights` writes it."""
    high = RECIPES["1 diffusers, no alpha"](tiny.weights)
    low = RECIPES["6 alphas outside of blocks"](tiny.weights)
    low.tensors = {n.replace("diffusion_model", "transformer_2"): v for n, v in low.tensors.items()}
    path = tmp_path / "both.safetensors"
    save_file({**high.tensors, **low.tensors}, path)
    states = tiny.merged(Lora(path), experts=2)
    check(states[0], tiny.weights, high.after)
    check(states[1], tiny.weights, low.after)
    with pytest.raises(CheckpointError, match="a second expert"):
        tiny.merged(Lora(path))


PEFT = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False),
    "rsLoRA, ranks and alphas of modules": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"blocks.0.attn1.to_q": 2, "ffn.net.2": 3},
        alpha_pattern={"blocks.1.attn2.to_v": 9},
        init_lora_weights=False,
    ),
    "a bias of B": peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, init_lora_weights=False),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False),
    "LoHa": peft.LoHaConfig(r=4, alpha=3, init_weights=False),
    "LoKr": peft.LoKrConfig(r=2, alpha=3, init_weights=False),
    "LoKr, both factors products": peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, init_weights=False
    ),
    "LoKr, whole factors": peft.LoKrConfig(r=100, alpha=150, init_weights=False),
}


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_peft_is_merged_as_peft_does(tiny, tmp_path, kind):
    torch.manual_seed(0)
    config = dataclasses.replace(
        PEFT[kind], target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    )
    model = transformer().double()
    adapted = peft.get_peft_model(model, config)
    if kind == "DoRA":  # as it begins, magnitudes are the weights' own
        for name, value in adapted.named_parameters():
            if "magnitude" in name:
                value.data.mul_(torch.rand_like(value) + 0.5)
    adapted.save_pretrained(tmp_path / "peft")
    stored = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert all(value.dtype == torch.float64 for value in stored.values())
    theirs = adapted.merge_and_unload().state_dict()
    (state,) = tiny.merged(Lora(tmp_path / "peft"))
    changed = {n: v for n, v in theirs.items() if not torch.equal(v.float(), tiny.weights[n])}
    assert len(changed) == (40 if kind == "a bias of B" else 20)
    check(state, tiny.weights, changed)


DIFFUSERS = ["1 diffusers, alphas in the header", "2 Wan's own names, down and up",
             "3 kohya, musubi-tuner"]  # fmt: skip


@pytest.mark.parametrize("kind", DIFFUSERS)
@pytest.mark.filterwarnings("ignore")
def test_diffusers_makes_the_same_of_what_it_reads_rightly(tiny, tmp_path, kind):
    from diffusers import WanPipeline

    made = RECIPES[kind](tiny.weights)
    saved(made, tmp_path / "adapter.safetensors")
    model = transformer().double()
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=model
    )
    pipe.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    model.double().fuse_lora(lora_scale=1.0)
    pipe.unload_lora_weights()
    theirs = {n.replace(".base_layer", ""): v for n, v in model.state_dict().items()}
    (state,) = tiny.merged(Lora(tmp_path / "adapter.safetensors"))
    check(state, tiny.weights, {n: theirs[n] for n in made.after})


def test_an_adapter_for_images_serves_a_model_without_them(tiny, tmp_path, caplog):
    image = Tiny(tmp_path / "i2v.safetensors", **IMAGE)
    made = RECIPES["2 Wan's own names, down and up"](image.weights)
    for part in ("k_img", "v_img"):
        key = f"diffusion_model.blocks.0.cross_attn.{part}"
        made.tensors[f"{key}.lora_down.weight"] = torch.ones(2, 24)
        made.tensors[f"{key}.lora_up.weight"] = torch.ones(24, 2)
    path = saved(made, tmp_path / "adapter.safetensors")
    (state,) = image.merged(Lora(path))
    name = "blocks.0.attn2.add_k_proj.weight"
    assert torch.equal(state[name], image.weights[name] + 2)
    caplog.clear()
    (state,) = tiny.merged(Lora(path))
    assert "2 changes are of an input that this model has not" in caplog.text
    check(state, tiny.weights, RECIPES["2 Wan's own names, down and up"](tiny.weights).after)


@pytest.mark.parametrize("rows", [range(0, 5), range(7, 24), range(23, 24)])
def test_rows_of_a_merged_weight_are_those_of_the_whole(tiny, tmp_path, rows):
    """What a rank reads that holds a share of the weights."""
    for kind in ("7 LoKr", "7 LoHa", "8 DoRA by rows", "8 DoRA by columns", "9 DiffSynth"):
        path = saved(RECIPES[kind](tiny.weights), tmp_path / "adapter.safetensors")
        (merge,), _ = merges_of([Lora(path)], WAN, tiny.shapes, 1)
        name = "blocks.1.attn1.to_k.weight"
        with open_weights(tiny.path) as weights:
            whole = merge.read(name, weights, original_name(name))
            part = merge.read(name, weights, original_name(name), rows=rows)
        assert (part - whole[rows.start : rows.stop]).abs().max() < 1e-6, kind


def test_what_is_read_at_a_time_makes_no_difference(tiny, tmp_path, monkeypatch):
    made = RECIPES["8 DoRA by columns"](tiny.weights)
    path = saved(made, tmp_path / "adapter.safetensors")
    monkeypatch.setattr("sora_engine.io.weights.changes.PIECE_VALUES", 100)
    check(tiny.merged(Lora(path))[0], tiny.weights, made.after)


def test_merging_takes_little_beside_the_weight(tmp_path):
    """Pieces of the weight and of the change, and the factors."""
    weight, rank, side = tmp_path / "weight.safetensors", 8, 3000
    save_file({"weight": torch.zeros(side, side, dtype=torch.bfloat16)}, weight)
    path = tmp_path / "adapter.safetensors"
    factors = {"up": torch.ones(side, rank), "down": torch.ones(rank, side)}
    save_file(factors, path)
    change = Change("lora", {name: name for name in factors}, (side, side), 0.5, rank)
    merge = Merge({"weight": [Applied(change, path, 2.0)]})
    with open_weights(weight) as weights, StorageMeter() as meter:
        merged = merge.read("weight", weights, "weight", dtype=torch.bfloat16)
    assert torch.equal(merged, torch.full_like(merged, rank))
    kept = merged.nbytes + sum(factor.nbytes for factor in factors.values())
    assert meter.peak < kept + 4 * 4 * PIECE_VALUES


def test_a_raw_file_of_peft_says_that_its_alpha_is_elsewhere(tiny, tmp_path, caplog):
    made = RECIPES["9 raw PEFT"](tiny.weights)
    path = saved(made, tmp_path / "adapter_model.safetensors")
    tiny.merged(Lora(path))
    assert "its alpha is in PEFT's adapter_config.json, which is not beside it" in caplog.text
    caplog.clear()
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    (state,) = tiny.merged(Lora(tmp_path))
    assert not caplog.text
    check(state, tiny.weights, with_strength(tiny.weights, made.after, 2.0))


def test_files_named_for_one_expert_are_told_of(tiny, tmp_path, caplog):
    made = RECIPES["9 DiffSynth"](tiny.weights)
    path = saved(made, tmp_path / "light_HIGH_noise.safetensors")
    tiny.merged(Lora(path), experts=2)
    assert "named for high noise and is applied to both experts" in caplog.text
    caplog.clear()
    tiny.merged(Lora(path, expert="high"), experts=2)
    assert not caplog.text


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ("a.safetensors", "loras must be a list of Lora"),
        ([3], "must be sora_engine.Lora, got 3"),
        ([Lora("a", "strong")], "a Lora's strength must be a number, got 'strong'"),
        ([Lora("a", float("nan"))], "must be finite"),
        ([Lora("a", 1e6)], "from -100 to 100, got 1e"),
        ([Lora("a", True)], "must be a number, got True"),
        ([Lora("a", 1.0, "middle")], "must be 'high', 'low' or None, got 'middle'"),
        ([Lora("a", 1.0, "low")], "this checkpoint has one transformer"),
        ([Lora(b"a")], "must be a text or a Path"),
        ([Lora("")], "must be a text or a Path"),
    ],
)
def test_a_bad_value_is_named(tiny, lora, says):
    with pytest.raises(RequestError, match=says):
        merges_of(lora, WAN, tiny.shapes, 1)


def test_results_name_adapters_without_folders(tiny, tmp_path):
    path = saved(RECIPES["9 DiffSynth"](tiny.weights), tmp_path / "style.safetensors")
    _, (record,) = merges_of([Lora(path, 0.5)], WAN, tiny.shapes, 1)
    assert record.name == "style.safetensors"
    assert str(tmp_path) not in json.dumps(record.to_json())
    assert record.sha256 == read_adapter(path).sha256
    assert len(record.sha256) == 64


def test_own_names_of_every_module(tiny):
    """By dots and by underscores, in both namings."""
    for name in tiny.shapes:
        module = name.removesuffix(".weight").removesuffix(".bias")
        for said in (module, own(module)):
            assert WAN.own_name(said) == module, said
            assert WAN.own_name(said.replace(".", "_")) == module, said
    assert WAN.own_name("double_blocks_0_img_attn_qkv") is None
    assert TINY["num_layers"] == 2
