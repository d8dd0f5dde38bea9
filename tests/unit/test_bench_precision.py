"""The groups of `sora bench` that compare float32 and bfloat16 on a CPU."""

from __future__ import annotations

import pytest
import torch

from sora_engine.bench import precision
from sora_engine.bench.accuracy import deep_errors
from sora_engine.bench.models import WanShape
from sora_engine.bench.precision import ALONE, StepTask, _work, step_work
from sora_engine.bench.profiles import BY_NAME, run
from sora_engine.models.machine import has_bfloat16
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_kernels.quant import int8

pytest.importorskip("diffusers")
SMALL = WanShape(heads=2, head_dim=16, ffn_dim=48, layers=3, text_dim=32)


def test_the_work_of_a_step_is_what_torch_counts():
    """By its FLOP counter on diffusers' blocks; the texts' keys, which are at hand here, aside."""
    from diffusers import WanTransformer3DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = WanTransformer3DModel(**SMALL.transformer_config()).eval()
    tokens, text = 2 * 4 * 6, 512
    # Attention as plain products, which are counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 16, 2, 8, 12), torch.tensor([5.0]), torch.randn(1, text, 32))
    counted = counter.get_flop_counts()
    blocks = [counted[f"WanTransformer3DModel.blocks.{i}"] for i in range(3)]
    one = sum(sum(counts.values()) for counts in blocks)
    keys = 3 * 2 * 2 * text * 32 * 32
    assert 2 * (one - keys) == pytest.approx(step_work(SMALL, tokens))
    assert sum(_work(SMALL, tokens)) == step_work(SMALL, tokens)


@pytest.mark.skipif(not has_bfloat16(), reason="oneDNN has no bfloat16 here")
def test_a_step_and_a_decode_in_both_dtypes_beside_diffusers():
    said = []
    found = run("cpu", only=["cpu"], tiny=True, say=said.append).measurements
    assert [m.name.partition(",")[0] for m in found] == [
        "precision: step with guidance",
        "precision: decode",
    ]
    both = {"sora", "sora fp32", "diffusers fp32", "diffusers bf16"}
    assert set(found[0].samples) - {"sora int8"} == both | {ALONE}
    assert set(found[1].samples) == both
    figures = found[0].figures
    assert figures[f"times of {ALONE}, bf16"] > 0
    for side in found[0].samples:
        assert 0 < figures[f"cores busy, {side}"] < 1.2 * torch.get_num_threads()
    assert not {"cpu", "errors"} - set(BY_NAME)


def test_products_and_attention_alone_are_the_work_that_is_counted(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    def by_products(q, k, v, cu_q, cu_k, **_):  # the op itself is not looked into
        for i in range(len(cu_q) - 1):
            rows, keys = slice(*cu_q[i : i + 2]), slice(*cu_k[i : i + 2])
            scores = q[rows].transpose(0, 1) @ k[keys].permute(1, 2, 0)
            scores @ v[keys].transpose(0, 1)

    monkeypatch.setattr(precision, "packed_attention", by_products)
    task = StepTask(SMALL, (2, 4, 6))
    model = WanTransformer(WanConfig(**SMALL.transformer_config())).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        task.alone(model, "fp32")()
    assert counter.get_total_flops() == step_work(SMALL, task.tokens)


@pytest.mark.skipif(not has_bfloat16(), reason="oneDNN has no bfloat16 here")
def test_errors_of_blocks_are_those_of_bfloat16_and_int8():
    bf16, *rest = (measured.samples["sora"] for measured in deep_errors(SMALL))
    # A rounding is 2^-9 at the most; three blocks add a few of them.
    assert all(2**-11 < error < 2**-6 for error in bf16)
    for small, large in zip(bf16 if rest else (), *rest, strict=True):
        assert small < large < 2**-4


@pytest.mark.slow
@pytest.mark.skipif(not has_bfloat16(), reason="oneDNN has no bfloat16 here")
def test_errors_are_told_in_latents_levels_and_decibels():
    found = run("cpu", only=["errors"], tiny=True, say=lambda _: None).measurements
    forms = 4 if int8.problem() is None else 3
    units = [measured.unit for measured in found]
    assert units == [*[""] * (forms - 2), *["", "levels", "levels", "dB"] * forms]
    by = {m.name.removeprefix("errors: "): max(m.samples["sora"]) for m in found}
    vae_alone = "sprites, transformer float32, autoencoder bfloat16"
    assert by[f"relative error of latents, {vae_alone}"] == 0
    assert 0 < by[f"mean difference of frames, {vae_alone}"] < 1
