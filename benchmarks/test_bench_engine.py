"""The engine under pytest-benchmark: encode, step, decode, whole runs, a burst of small requests.

    pytest benchmarks/test_bench_engine.py --benchmark-enable

Without `--benchmark-enable` each runs once, at a tiny size and unmeasured: so they cannot rot.
For comparisons with diffusers and for result files, see `sora bench`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sora_engine as sora
from sora_engine.bench.models import WAN_1_3B, WanShape
from sora_engine.bench.ops import packed
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest) -> bool:
    """Whether nothing is measured."""
    return bool(request.config.getoption("benchmark_disable"))


@pytest.fixture(scope="module")
def engine() -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        yield engine


def a_request(tiny: bool, seed: int = 0) -> sora.VideoRequest:
    return sora.VideoRequest(
        "a red circle moves right on a white background",
        height=32 if tiny else 64,
        width=32 if tiny else 64,
        num_frames=1 if tiny else 9,
        num_inference_steps=1 if tiny else 10,
        seed=seed,
    )


def test_encode_prompts(benchmark, engine):
    prompts = ["a red circle moves right on a white background", ""]
    encoded = benchmark(engine.model.prompt_encoder.encode, prompts)
    assert [len(text["text"]) for text in encoded] == [10, 1]


@torch.inference_mode()
@pytest.mark.parametrize("branches", [1, 2])
def test_step(benchmark, tiny, branches):
    """A forward pass of four Wan-shaped blocks."""
    shape = WanShape(heads=2, head_dim=12, ffn_dim=32, text_dim=16) if tiny else WAN_1_3B
    grid = (1, 2, 2) if tiny else (3, 12, 16)
    config = WanConfig(**{**shape.transformer_config(), "num_layers": 1 if tiny else 4})
    torch.manual_seed(0)
    model = WanTransformer(config).eval().requires_grad_(False).prepare()
    latents = torch.randn(shape.channels, grid[0], 2 * grid[1], 2 * grid[2])
    texts = [torch.randn(512, shape.text_dim) for _ in range(branches)]
    batch = packed(model, [(latents, text) for text in texts])
    out = benchmark(model, batch)
    assert out.shape == (branches * grid[0] * grid[1] * grid[2], shape.channels * 4)


@torch.inference_mode()
def test_decode(benchmark, engine, tiny):
    size = 2 if tiny else 8
    latents = torch.randn(1, 24, 1 if tiny else 3, size, size)
    frames = benchmark(engine.model.vae.decode, latents)
    assert frames.shape[-2:] == (8 * size, 8 * size)


def test_whole_run(benchmark, engine, tiny):
    video = benchmark(engine.generate, a_request(tiny))
    assert len(video.frames) == (1 if tiny else 9)


def test_a_burst_of_small_requests(benchmark, engine, tiny):
    requests = [a_request(tiny, seed) for seed in range(2 if tiny else 16)]
    videos = benchmark(engine.generate, requests)
    assert [video.seed for video in videos] == list(range(len(requests)))
