"""No two families claim one file: told by the tensors that their own tests hold files of."""

from __future__ import annotations

import pytest
import torch

from sora_engine.models.registry import families
from tests.parity.latent_models import tiny_dit, tiny_latte, tiny_pixart
from tests.parity.ltx_models import tiny_ltx
from tests.parity.oracles import tiny_transformer
from tests.parity.stdit_reference import STDiT3
from tests.parity.test_pixart import in_the_authors_names
from tests.parity.test_uvit import Oracle

FILES = {
    "wan": lambda: tiny_transformer().state_dict(),
    "dit": lambda: tiny_dit().state_dict(),
    "latte": lambda: tiny_latte().state_dict(),
    "pixart": lambda: tiny_pixart().state_dict(),
    "pixart, its authors' names": lambda: in_the_authors_names(tiny_pixart().state_dict()),
    "ltx": lambda: tiny_ltx().state_dict(),
    "uvit of classes": lambda: Oracle("classes").in_the_authors_names(),
    "uvit of texts": lambda: Oracle("texts").in_the_authors_names(),
    "stdit": lambda: STDiT3().state_dict(),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_one_family_claims_a_file(kind, prefix):
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in FILES[kind]().items()}
    claiming = [family.name for family in families() if family.claims_file(shapes)]
    assert claiming == [kind.partition(",")[0].partition(" ")[0]]
    # What is missing a tensor is still its own, if a damaged one.
    shapes.pop(next(name for name in shapes if "blocks.1" in name))
    assert [family.name for family in families() if family.claims_file(shapes)] == claiming


def test_none_claims_another_file():
    shapes = {"conv.weight": torch.Size((4, 4, 3, 3)), "pos_embed.proj.weight": (8, 4, 2, 2)}
    assert not [family.name for family in families() if family.claims_file(shapes)]


def test_names_with_underscores_are_told():
    """Of every layer that a family says adapters name: back to its own, and nothing else."""
    seen = 0
    for family in families():
        for layer in getattr(family, "layers", ()):
            own = layer.replace("#", "12")
            assert family.own_name(own.replace(".", "_")) == own
            assert family.own_name(own) == own
            seen += 1
        if hasattr(family, "layers"):
            assert family.own_name("no_layer_of_any") is None
    assert seen > 30
