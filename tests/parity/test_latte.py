"""Latte against diffusers: the transformer, texts, whole pipelines, packed batches, folders."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine.denoise.conditioning import NEGATIVE
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.distributed.auto_layout import auto_layout
from sora_engine.errors import CheckpointError, LayoutError, RequestError
from sora_engine.models.inspection import inspect_file
from sora_engine.models.latte.config import LatteConfig
from sora_engine.models.latte.model import LatteTransformer
from sora_engine.models.registry import open_checkpoint
from tests.parity.latent_models import latents_of, tiny_latte, tiny_latte_pipeline
from tests.parity.vae_models import relative

TOLERANCE = 1e-4
STEPS, SCALE = 3, 3.0
PROMPT, NEGATIVE_PROMPT = "A red panda eats bamboo", "ugly"
CONFIG, INDEX = "transformer/config.json", "model_index.json"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_latte_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("latte")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    limits = sora.Limits(pack_tokens=10_000)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=limits) as made:
        yield made


def ours_of(oracle) -> LatteTransformer:
    config = {name: value for name, value in oracle.config.items() if name[0] != "_"}
    ours = LatteTransformer(LatteConfig.from_dict(config))
    state = oracle.state_dict()
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"].unsqueeze(2)
    ours.load_state_dict(state)
    return ours.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "overrides", [{}, {"patch_size": 4, "activation_fn": "gelu", "attention_bias": False}]
)
def test_the_transformer_equals_diffusers(overrides):
    oracle = tiny_latte(**overrides)
    ours = ours_of(oracle)
    patch = oracle.config.patch_size
    videos = [((4, 8, 12), 500, 5), ((1, 8, 8), 37, 3), ((4, 16, 4), 999, 7)]
    samples = [torch.randn(4, *size) for size, _, _ in videos]
    texts = [torch.randn(120, 32) for _ in videos]
    contexts = ours.encode_contexts(
        [
            {"text": text, "count": torch.tensor(count)}
            for text, (_, _, count) in zip(texts, videos, strict=True)
        ]
    )
    packer = Packer((1, patch, patch), torch.device("cpu"))
    batch = packer.pack(
        [
            Segment(sample, torch.full(size[:1], float(level)), ((context, size[0]),))
            for sample, context, (size, level, _) in zip(samples, contexts, videos, strict=True)
        ]
    )
    packed = packer.unpack(ours(batch), batch, 8)
    for got, sample, text, (_, level, count) in zip(packed, samples, texts, videos, strict=True):
        want = oracle(
            sample[None], timestep=torch.tensor([level]), encoder_hidden_states=text[None, :count]
        ).sample[0]
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("prompt", [PROMPT, "", "a " * 130])
def test_texts_equal_diffusers(pipeline, engine, prompt):
    want, unconditional = pipeline.encode_prompt(
        prompt, negative_prompt=NEGATIVE_PROMPT, clean_caption=False
    )
    encoder = engine.loaded_model.prompt_encoder
    text, negative = encoder.encode([prompt, NEGATIVE_PROMPT])
    count = int(text["count"])
    assert want.shape[1] == count == min(count, 120)
    assert relative(text["text"][:count], want[0]) < 1e-5
    # As far as the prompt goes, padding that the encoder has seen among it.
    assert relative(negative["text"][:count], unconditional[0]) < 1e-5
    contexts = ours_of(pipeline.transformer).encode_contexts(
        [text, {**negative, NEGATIVE: torch.ones(())}]
    )
    lengths = [context.sources["text"].keys.shape[1] for context in contexts]
    assert lengths == [count, count]


def request(prompt=PROMPT, **settings) -> sora.VideoRequest:
    values = {
        "num_inference_steps": STEPS, "guidance_scale": SCALE, "seed": 3,
        "negative_prompt": NEGATIVE_PROMPT, **settings,
    }  # fmt: skip
    return sora.VideoRequest(prompt, **values)


def test_the_whole_pipeline_equals_diffusers(pipeline, engine):
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    arguments = {
        "negative_prompt": NEGATIVE_PROMPT, "num_inference_steps": STEPS, "height": 16,
        "width": 16, "video_length": 4, "clean_caption": False,
    }  # fmt: skip
    for scale in (SCALE, 1.0):
        given = request(latents=noise[0], guidance_scale=scale)
        got = engine.generate(given)
        want = latents_of(pipeline, noise, prompt=PROMPT, guidance_scale=scale, **arguments)
        assert relative(got.latents, want) < TOLERANCE
        assert got.frames.shape == (4, 16, 16, 3)
    # Leaving out the text, or guidance, would be noticed.
    want = latents_of(pipeline, noise, prompt=PROMPT, guidance_scale=SCALE, **arguments)
    for other in (request("", latents=noise[0]), request(latents=noise[0], guidance_scale=1.0)):
        assert relative(engine.generate(other).latents, want) > 100 * TOLERANCE


def test_company_changes_nothing(engine):
    requests = [
        request(),
        request("a blue cube", height=24, width=16, seed=4),
        request("waves", num_frames=1, num_inference_steps=5, seed=5),
        request("a dog", num_frames=7, guidance_scale=1.0, seed=6),  # in windows of four
    ]
    alone = [engine.generate(one) for one in requests]
    together = engine.generate(requests)
    assert together[0].receipt.most_in_company == 4
    for one, other in zip(alone, together, strict=True):
        assert relative(other.latents, one.latents) < 1e-5
    assert together[3].frames.shape == (7, 16, 16, 3)
    shots = request(shots=[sora.Shot("a red cube", 2), sora.Shot("the sea at night", 2)])
    assert relative(engine.generate(shots).latents, alone[0].latents) > 100 * TOLERANCE
    started = engine.generate(request(init=alone[0], strength=0.7))
    assert started.frames.shape == alone[0].frames.shape


def test_what_attention_along_time_cannot_do_is_refused(engine):
    with pytest.raises(RequestError, match="a SparsePlan is not carried out"):
        engine.generate(request(window=sora.SparsePlan(2, 1)))


def test_a_transformer_file_is_told_and_loads(folder, engine, tmp_path):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert inspect_file(file).kinds == (
        "latte transformer, t2v: 2 layers within frames and as many along time, 24 wide, 4 frames; "
        "goes with an AutoencoderKL and a T5 encoder",
    )
    with sora.Engine.from_pretrained(file, device="cpu") as by_file:
        one = by_file.generate(request())
    assert torch.equal(one.latents, engine.generate(request()).latents)
    tensors = load_file(file)
    del tensors["temporal_transformer_blocks.1.ff.net.2.weight"]
    lone = tmp_path / "lone.safetensors"
    save_file(tensors, lone)
    with pytest.raises(CheckpointError, match=r"config\.json beside it would"):
        open_checkpoint(lone, folder)
    (tmp_path / "config.json").symlink_to(folder / CONFIG)
    with pytest.raises(CheckpointError, match=r"missing tensors: temporal_transformer_blocks\.1"):
        sora.Engine.from_pretrained(lone, components=folder, device="cpu").close()


@pytest.mark.slow
def test_ranks_share_branches_and_windows(folder, engine):
    requests = [request(), request("a blue cube", height=24, width=16, seed=4, num_frames=7)]
    alone = engine.generate(requests)
    for axis in ("guidance", "window"):
        parallel = sora.ParallelConfig(**{axis: 2})
        with sora.Engine.from_pretrained(folder, device="cpu", parallel=parallel) as ranks:
            for one, other in zip(alone, ranks.generate(requests), strict=True):
                assert relative(other.latents, one.latents) < 1e-5
                assert np.abs(one.frames.astype(int) - other.frames).max() <= 1


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_ranks_that_would_cut_attention_apart_are_refused(folder, axis):
    parallel = sora.ParallelConfig(**{axis: 3})
    with pytest.raises(LayoutError, match=r"attention of latte .*; guidance, window or data would"):
        sora.Engine.from_pretrained(folder, device="cpu", parallel=parallel)
    assert auto_layout(folder, None, 2) in (
        sora.ParallelConfig(guidance=2), sora.ParallelConfig(window=2), sora.ParallelConfig(data=2),
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_makes_a_video(folder, tmp_path):
    command = [sys.executable, "-m", "sora_engine", "generate", PROMPT, "--model", str(folder)]
    done = subprocess.run(
        [*command, "--steps", "2", "--device", "cpu", "-o", "panda.gif"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "panda.gif").exists()
