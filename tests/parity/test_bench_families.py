"""What `benchmarks/families.py` times: both sides give one result, at a width from which on layers
are laid out for the processor. Those of other tests' tiny models stay as they were read."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families import FAMILIES, Size, checked, decode

WIDE = Size(heads=2, head_dim=32, side=8, frames=2, text_dim=16, vae=(32, 32), decoded=8)
"""256 sinusoids to 64 channels are as many weights as it takes."""


@pytest.mark.parametrize("name", ["dit", "pixart", "uvit", "latte"])
def test_a_step_is_diffusers(name):
    torch.manual_seed(0)
    checked(name, FAMILIES[name](WIDE))


def test_a_decode_is_diffusers():
    torch.manual_seed(0)
    checked("decode", decode(WIDE))
