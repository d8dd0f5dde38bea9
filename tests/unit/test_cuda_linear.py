"""Linear layers on CUDA: one product for several, and GELU in a product's epilogue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sora_engine.models import cuda_linear
from sora_engine.models.cuda_linear import CublasLinear, JoinedLinears, can_join
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import REQUESTS, Sizes, build, load, walk
from sora_engine.testing.tensors import ShadowTensor, host
from tests.parity.oracles import TINY_TRANSFORMER


def frozen(out_features: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(24, out_features, bias=bias, dtype=dtype).requires_grad_(False)


def three(**options):
    torch.manual_seed(0)
    return [frozen(n, **options) for n in (16, 16, 8)]


# One product.


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_gives_what_each_layer_does(bias):
    layers = three(bias=bias)
    x = torch.randn(37, 24)
    expected = [
        F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        for layer in layers
    ]
    joined = JoinedLinears(layers)
    for layer, part, wanted in zip(layers, joined(x), expected, strict=True):
        assert part.shape == wanted.shape
        assert (part - wanted).abs().max() < 1e-6
        assert (layer(x) - wanted).abs().max() < 1e-6  # each goes on to serve by itself


def test_layers_keep_their_names_and_values_and_lie_in_one_tensor():
    model = nn.ModuleDict(dict(zip("qkv", three(), strict=True)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    joined = JoinedLinears([model[name] for name in "qkv"])
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    places = {layer.weight.untyped_storage().data_ptr() for layer in model.values()}
    assert places == {joined.weight.untyped_storage().data_ptr()}
    model["k"].weight.add_(1)  # what is written to a layer is written to the product
    x = torch.randn(3, 24)
    assert (joined(x)[1] - model["k"](x)).abs().max() < 1e-5


def test_what_was_replaced_is_not_served():
    x = torch.randn(5, 24)
    layers = tuple(three())
    joined = JoinedLinears(layers)
    assert joined.serves(layers, x)
    assert not joined.serves((layers[0], layers[2], layers[1]), x)
    assert not joined.serves((layers[0], layers[1], frozen(8)), x)
    layers[1].weight = nn.Parameter(layers[1].weight + 1, requires_grad=False)
    assert not joined.serves(layers, x)
    for change in (lambda layer: layer.double(), lambda layer: setattr(layer.weight, "data", x)):
        layers = tuple(three())
        joined = JoinedLinears(layers)
        change(layers[2])
        assert not joined.serves(layers, x)


def test_many_rows_are_products_of_their_own(monkeypatch):
    """Beside more rows than that the joint result's memory counts for more than two launches."""
    monkeypatch.setattr(cuda_linear, "MOST_JOINED_ROWS", 4)
    layers = tuple(three())
    joined = JoinedLinears(layers)
    assert joined.serves(layers, torch.randn(4, 24))
    assert not joined.serves(layers, torch.randn(5, 24))


def test_only_plain_frozen_layers_of_one_kind_are_joined():
    assert can_join(three())
    assert not can_join([*three(), nn.Linear(24, 8)])  # it may be trained
    assert not can_join([*three(), frozen(8, bias=False)])
    assert not can_join([*three(), frozen(8, dtype=torch.float64)])
    assert not can_join([*three(), nn.Linear(12, 8).requires_grad_(False)])
    assert not can_join([*three(), nn.Identity()])

    class Special(nn.Linear):
        """A layer that computes something else."""

    assert not can_join([*three(), Special(24, 8).requires_grad_(False)])


# GELU.


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_gelu_is_of_the_form_that_was_asked_for(approximate, bias):
    """torch says of `_addmm_activation` that it is the tanh form on CUDA and the exact one on a
    CPU: the shadow device has CUDA's."""
    layer = frozen(16, bias=bias)
    x = torch.randn(9, 24)
    weights = layer.weight.double(), layer.bias.double() if bias else None
    expected = F.gelu(F.linear(x.double(), *weights), approximate=approximate)
    other = F.gelu(F.linear(x.double(), *weights), approximate="none" if bias else "tanh")
    assert approximate == "none" or not bias or (expected - other).abs().max() > 1e-4
    with shadow_device(), torch.inference_mode():
        made = CublasLinear(24, 16, bias=bias, device="cuda").requires_grad_(False)
        made.load_state_dict(layer.state_dict())
        found = made.with_gelu(x.to("cuda"), approximate)
    assert (host(found) - expected).abs().max() < 1e-6


def test_torch_has_the_tanh_form_on_cuda():
    """Its own decomposition says so, for a tensor that says it is on CUDA."""
    from torch._decomp import decomposition_table

    decompose = decomposition_table[torch.ops.aten._addmm_activation.default]
    bias, x, weight = torch.randn(8), torch.randn(5, 4), torch.randn(4, 8)
    with shadow_device(), torch.inference_mode():
        there = [value.to("cuda") for value in (bias, x, weight)]
        found = host(decompose(*there, use_gelu=True))
    expected = F.gelu(torch.addmm(bias.double(), x.double(), weight.double()), approximate="tanh")
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gelu_in_the_epilogue_equals_gelu_behind_it():
    layer = frozen(256).cuda().bfloat16()
    x = torch.randn(300, 24, device="cuda").bfloat16()
    expected = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), "tanh")
    layer.__class__ = CublasLinear
    found = layer.with_gelu(x, "tanh")
    # One rounding to bfloat16, of 8 bits.
    assert (found - expected).abs().max() < 2**-8 * expected.abs().max()


# A transformer.


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return build("t2v", tmp_path_factory.mktemp("t2v"))


def test_a_prepared_transformer_has_its_weights_once_under_their_names():
    torch.manual_seed(1)
    config = WanConfig.from_dict(dict(TINY_TRANSFORMER))
    values = {n: v.clone() for n, v in WanTransformer(config).state_dict().items()}
    with shadow_device(), torch.inference_mode():
        model = WanTransformer(config).eval().requires_grad_(False).to("cuda")
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            there = nn.Parameter(value.to("cuda"), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, there)
        model.prepare()
        after = model.state_dict()
        assert list(after) == list(values)
        for name, value in after.items():
            assert isinstance(value, ShadowTensor), name
            assert torch.equal(host(value), values[name]), name
        storages = {host(v).untyped_storage().data_ptr(): host(v) for v in model.parameters()}
        held = sum(value.untyped_storage().nbytes() for value in storages.values())
        assert held == sum(value.nbytes for value in values.values())
        assert all(block.attn1.joined is not None for block in model.blocks)
        assert all(block.attn2.joined is None for block in model.blocks)  # of two inputs
        hollow = model.without_weights()
        assert all(block.attn1.joined is not None for block in hollow.blocks)
        assert {type(block.ffn.net[0]["proj"]) for block in hollow.blocks} == {CublasLinear}


def test_a_step_has_six_products_a_block_and_the_results_of_eight(pipeline, monkeypatch):
    def walked(rows):
        monkeypatch.setattr(cuda_linear, "MOST_JOINED_ROWS", rows)
        with shadow_device() as shadow:
            model = load(pipeline, shadow)
            done = walk(model, REQUESTS["plain"](Sizes(model)), shadow, decode=False)
            return done.latents, done.phases["step 3"].launches, len(model.transformer(0).blocks)

    joined, launches, blocks = walked(1 << 20)
    apart, more, _ = walked(0)
    # A block's, those of the levels' and texts' embeddings, and the last one.
    kinds = "aten::linear", "aten::_addmm_activation"
    products = [sum(count[kind] for kind in kinds) for count in (launches, more)]
    assert products[1] - products[0] == 2 * blocks
    assert launches["aten::_addmm_activation"] == blocks
    assert launches["aten::gelu"] == 0
    # In bf16, where products of another shape round otherwise.
    assert (joined - apart).abs().max() < 0.05 * apart.abs().max()
