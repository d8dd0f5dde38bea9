"""`torch.compile` takes the forward pass of a transformer in one graph."""

from __future__ import annotations

import pytest
import torch

from sora_engine.denoise.packing import Packer, Segment
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from tests.parity.oracles import TINY_TRANSFORMER, tiny_transformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("levels", ["one", "two"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("laid_out", [False, True], ids=["plain", "as on CUDA"])
def test_the_forward_pass_has_no_break(levels, mode, laid_out):
    model = WanTransformer(WanConfig(**TINY_TRANSFORMER)).eval().requires_grad_(False)
    model.load_state_dict(tiny_transformer(0).state_dict())
    if laid_out:
        model.lay_out_for_cuda()
    torch.manual_seed(0)
    with mode():
        context, other = model.encode_contexts([{"text": torch.randn(n, 32)} for n in (3, 7)])
        timesteps = torch.tensor([500.0, 500.0, 0.0 if levels == "two" else 500.0])
        segments = [
            Segment(torch.randn(16, 3, 4, 6), timesteps, ((context, 3),)),
            Segment(torch.randn(16, 2, 8, 4), timesteps[:2], ((other, 2),)),
        ]
        batch = Packer((1, 2, 2), CPU).pack(segments)
        expected = model(batch)  # and what attention plans is planned
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(batch), expected)
