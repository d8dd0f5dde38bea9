"""A block of the Wan model and diffusers' block, on the same weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from shapes import DEVICE, DTYPE

GRID = (5, 16, 16)
TEXT = 512


class Blocks(NamedTuple):
    """Calls of diffusers' block, of the engine's as it runs (a text's keys and values are kept for
    a whole run), and of the engine's with keys and values computed as well."""

    diffusers: Callable[[], Any]
    ours: Callable[[], Any]
    with_keys_and_values: Callable[[], Any]


def captured(module: torch.nn.Module, run: Callable[[], object]) -> Callable[[], Any]:
    """A call of `module` with what it is given while `run` runs."""
    calls: list[Any] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run()
    hook.remove()
    args, kwargs = calls[0]
    return lambda: module(*args, **kwargs)


def wan_blocks(tiny: bool = False) -> Blocks:
    """Width 1536 and 1,280 tokens; their results are compared first. Raises ImportError without
    diffusers."""
    import diffusers

    from sora_engine.bench.models import WanShape
    from sora_engine.bench.ops import packed
    from sora_engine.models.wan.config import WanConfig
    from sora_engine.models.wan.model import WanTransformer

    shape = WanShape(heads=2, head_dim=12, ffn_dim=32, text_dim=16) if tiny else WanShape()
    t, h, w = (1, 2, 2) if tiny else GRID
    config = {**shape.transformer_config(), "num_layers": 1}
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(**config).to(DEVICE, DTYPE).eval()
    ours = WanTransformer(WanConfig(**config)).to(DEVICE, DTYPE).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    ours.prepare()
    latents = torch.randn(shape.channels, t, 2 * h, 2 * w, device=DEVICE, dtype=DTYPE)
    text = torch.randn(TEXT, shape.text_dim, device=DEVICE, dtype=DTYPE)
    level = torch.full((1,), 500.0, device=DEVICE)
    batch = packed(ours, [(latents, text)])
    their_block = captured(
        theirs.blocks[0], lambda: theirs(latents[None], level, text[None], return_dict=False)
    )
    our_block = captured(ours.blocks[0], lambda: ours(batch))
    # diffusers' block returns the residual stream, which is the first of the engine's two.
    torch.testing.assert_close(our_block()[0], their_block()[0], rtol=2e-2, atol=2e-2)
    embedded = torch.randn(TEXT, shape.width, device=DEVICE, dtype=DTYPE)
    attention = ours.blocks[0].attn2

    def with_keys_and_values() -> None:
        attention.keys_values(embedded, "text", ours.backends)
        our_block()

    return Blocks(their_block, our_block, with_keys_and_values)
