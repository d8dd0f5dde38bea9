"""LVSA: each frame attends to its window, the first frame and key frames that move each step.

Held against diffusers' pipeline with the same mask given to its own attention.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import sora_engine as sora
from sora_engine.denoise.windows import frames_seen
from tests.parity.oracles import relative_error, tiny_pipeline

REQUEST = {
    "prompt": "a red circle moves right",
    "height": 32,
    "width": 48,
    "num_frames": 33,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
}
PLAN = sora.SparsePlan(reach=1, num_keys=2)
TOKENS = 2 * 3  # of a latent frame


class Masked(WanAttnProcessor):
    """diffusers' attention under a mask over frames."""

    allowed: torch.Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *more):
        allowed = self.allowed.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, allowed[None, None], *more
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pipe = tiny_pipeline("t2v", 0)
    folder = tmp_path_factory.mktemp("t2v")
    pipe.save_pretrained(folder)
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        yield pipe, engine


def independent_mask(total: int, step: int) -> torch.Tensor:
    """LVSA's rule for PLAN, frame by frame."""
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            near = abs(query - key) <= 1
            keys = {step % total, (total // 2 + step) % total}
            allowed[query, key] = near or key == 0 or key in keys
    return allowed


def test_final_latents_equal_diffusers_under_the_same_mask(pair):
    pipe, engine = pair
    actual = engine.generate(sora.VideoRequest(**REQUEST, seed=1, window=PLAN)).latents
    processor = Masked()
    processor.allowed = independent_mask(9, 0)
    before = [block.attn1.processor for block in pipe.transformer.blocks]

    def next_step(_pipe, step, _timestep, values):
        processor.allowed = independent_mask(9, step + 1)
        return values

    for block in pipe.transformer.blocks:
        block.attn1.set_processor(processor)
    try:
        expected = pipe(
            **REQUEST,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
            callback_on_step_end=next_step,
        ).frames[0]
    finally:
        for block, old in zip(pipe.transformer.blocks, before, strict=True):
            block.attn1.set_processor(old)
    config = pipe.vae.config
    mean, std = (
        torch.tensor(v)[:, None, None, None] for v in (config.latents_mean, config.latents_std)
    )
    assert relative_error(actual, expected * std + mean) < 1e-4
    plain = engine.generate(sora.VideoRequest(**REQUEST, seed=1, window=sora.WindowPlan(9, 0)))
    assert relative_error(actual, plain.latents) > 1e-2  # a mask that is felt


def test_a_reach_over_everything_is_the_plain_path_bit_for_bit(pair):
    _, engine = pair
    wide = sora.VideoRequest(**REQUEST, seed=1, window=sora.SparsePlan(8))
    plain = sora.VideoRequest(**REQUEST, seed=1, window=sora.WindowPlan(9, 0))
    assert torch.equal(engine.generate(wide).latents, engine.generate(plain).latents)


def test_company_changes_nothing(pair):
    _, engine = pair
    request = sora.VideoRequest(**REQUEST, seed=1, window=PLAN)
    other = sora.VideoRequest(**{**REQUEST, "height": 48, "num_frames": 9}, seed=2)
    alone = engine.generate(request).latents, engine.generate(other).latents
    together = engine.generate([request, other])
    for video, latents in zip(together, alone, strict=True):
        assert relative_error(video.latents, latents) < 1e-5


def test_loops_see_across_the_seam(pair):
    _, engine = pair
    values = {**REQUEST, "num_frames": 36}
    request = sora.VideoRequest(**values, seed=1, loop=True, window=PLAN)
    assert torch.isfinite(engine.generate(request).latents).all()


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("total", [7, 40, 121])
def test_what_a_frame_sees_does_not_grow_with_the_length(total, wraps):
    plan = sora.SparsePlan(reach=2, num_keys=4)
    for step in range(total):
        seen = frames_seen(plan, total, wraps=wraps, step=step)
        assert seen.diagonal().all()
        assert seen[:, 0].all()
        assert int(seen.sum(1).max()) <= 2 * 2 + 1 + 1 + 4
        if wraps:
            assert seen[0, total - 1]
    ever = [frames_seen(plan, total, wraps=wraps, step=step) for step in range(-(-total // 4))]
    assert torch.stack(ever).any(0).all()  # the key frames come by everywhere


@pytest.mark.parametrize(("values", "words"), [((0,), "reach must be"), ((2, -1), "num_keys must")])
def test_bad_plans(values, words):
    with pytest.raises(sora.RequestError, match=words):
        sora.SparsePlan(*values)
