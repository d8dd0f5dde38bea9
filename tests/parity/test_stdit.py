"""Open-Sora's STDiT3 against a reference from its paper: the transformer with frames at other noise
levels, whole videos by rectified flow, packed batches, files in its authors' names."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine import tasks
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.errors import CheckpointError, LayoutError, RequestError
from sora_engine.models.inspection import inspect_file
from sora_engine.models.linear import BlockedLinear
from sora_engine.models.stdit.config import STDiTConfig
from sora_engine.models.stdit.family import STDiTFamily
from sora_engine.models.stdit.model import FPS
from tests.parity.latent_models import tiny_kl, tiny_t5
from tests.parity.metering import measured, saved_midway
from tests.parity.stdit_reference import STDiT3
from tests.parity.vae_models import relative

TOLERANCE = 1e-4
STEPS, SCALE = 4, 3.0
PROMPT = "a red panda"
CONFIG = {
    "model_type": "STDiT3", "hidden_size": 24, "num_heads": 2, "depth": 2, "in_channels": 4,
    "caption_channels": 32, "model_max_length": 300, "input_sq_size": 64, "qk_norm": True,
    "patch_size": [1, 2, 2], "pred_sigma": True, "input_size": [None, None, None],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = STDiT3().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
        elif "norm" in name:
            parameter.copy_(1.5 + 0.3 * torch.randn_like(parameter))
        elif any(part in name for part in ("proj.weight", "kv_linear", "linear", "embedder.mlp")):
            parameter.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The transformer's file as its authors have it, and parts of other folders around it."""
    path = tmp_path_factory.mktemp("stdit")
    (path / "transformer").mkdir()
    state = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    state["rope.freqs"] = torch.zeros(6)
    save_file(state, path / "transformer" / "model.safetensors")
    (path / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    tiny_kl().save_pretrained(path / "vae")
    encoder, tokenizer = tiny_t5()
    encoder.save_pretrained(path / "text_encoder")
    tokenizer.save_pretrained(path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def file(folder):
    return folder / "transformer" / "model.safetensors"


@pytest.fixture(scope="module")
def engine(file):
    limits = sora.Limits(pack_tokens=10_000)
    with sora.Engine.from_pretrained(file, device="cpu", limits=limits) as made:
        yield made


def test_the_transformer_equals_the_reference(reference, file):
    """Of any size, with frames that are known, which are at level 0 (its masks on frames)."""
    source = STDiTFamily().source_in_file(file)
    ours = STDiTFamily.transformer(source.config, attention_backend="auto")
    source.load(ours)
    ours.eval().requires_grad_(False)
    videos = [
        ((4, 8, 12), [500.0] * 4, 5),
        ((1, 8, 8), [37.0], 3),
        ((5, 12, 4), [0.0, 0.0, 700.0, 700.0, 700.0], 300),
    ]
    samples = [torch.randn(4, *size) for size, _, _ in videos]
    texts = [torch.randn(300, 32) for _ in videos]
    contexts = ours.encode_contexts(
        [
            {"text": text, "count": torch.tensor(count)}
            for text, (_, _, count) in zip(texts, videos, strict=True)
        ]
    )
    packer = Packer((1, 2, 2), torch.device("cpu"))
    batch = packer.pack(
        [
            Segment(sample, torch.tensor(levels), ((context, size[0]),))
            for sample, context, (size, levels, _) in zip(samples, contexts, videos, strict=True)
        ]
    )
    packed = packer.unpack(ours(batch), batch, 8)
    for got, sample, text, (_, levels, count) in zip(packed, samples, texts, videos, strict=True):
        want = reference(sample, torch.tensor(levels), text[:count], FPS)
        assert relative(-got[:4], want) < 1e-5
    # What a frame is told of its level, and its place in time, would be noticed.
    blind = reference(samples[2], torch.full((5,), 700.0), texts[2], FPS)
    assert relative(-packed[2][:4], blind) > 1e-2
    backwards = reference(samples[0].flip(1), torch.full((4,), 500.0), texts[0][:5], FPS).flip(1)
    assert relative(-packed[0][:4], backwards) > 1e-2


def test_layers_as_they_are_laid_out_equal_the_reference(tmp_path):
    """At a width from which on they are; those of tiny models stay as they were read."""
    torch.manual_seed(1)
    reference = STDiT3(dim=64).requires_grad_(False)
    state = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    save_file(state, tmp_path / "wide.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 64}))
    source = STDiTFamily().source_in_file(tmp_path / "wide.safetensors")
    ours = STDiTFamily.transformer(source.config, attention_backend="auto")
    source.load(ours)
    ours.eval().requires_grad_(False).prepare()
    assert any(isinstance(layer, BlockedLinear) for layer in ours.modules())
    sample, text = torch.randn(4, 3, 8, 8), torch.randn(300, 32)
    (context,) = ours.encode_contexts([{"text": text, "count": torch.tensor(9)}])
    packer = Packer((1, 2, 2), torch.device("cpu"))
    batch = packer.pack([Segment(sample, torch.full((3,), 300.0), ((context, 3),))])
    (got,) = packer.unpack(ours(batch), batch, 8)
    assert relative(-got[:4], reference(sample, torch.full((3,), 300.0), text[:9], FPS)) < 1e-5


def video(prompt=PROMPT, **settings) -> sora.VideoRequest:
    values = {
        "num_inference_steps": STEPS, "guidance_scale": SCALE, "seed": 3, "height": 16,
        "width": 16, "num_frames": 4, **settings,
    }  # fmt: skip
    return sora.VideoRequest(prompt, **values)


def sampled(reference, noise, text, scale) -> torch.Tensor:
    """Rectified flow as Open-Sora samples it: levels by the video's size, no text's own embedding
    in the place of none, read as far as the text goes."""
    _, time, height, width = noise.shape
    none = reference.y_embedder.y_embedding[: len(text)]
    ratio = (height * 8 * width * 8 / 512**2) ** 0.5 * time**0.5
    even = [1 - i / STEPS for i in range(STEPS)]
    levels = [ratio * t / (1 + (ratio - 1) * t) for t in even] + [0.0]
    x = noise
    for now, after in pairwise(levels):
        each = torch.full((time,), 1000.0 * now)
        with_it, without = (reference(x, each, words, FPS) for words in (text, none))
        x = x + (without + scale * (with_it - without)) * (now - after)
    return x / 0.18215


def test_whole_videos_equal_the_reference(reference, engine):
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ratio = (64 * 64 / 512**2) ** 0.5 * 4**0.5
    even = [1 - i / STEPS for i in range(STEPS)]
    (text,) = engine.loaded_model.prompt_encoder.encode([PROMPT])
    words = text["text"][: int(text["count"])]
    given = {"latents": noise, "shift": ratio, "sigmas": even}
    want = sampled(reference, noise, words, SCALE)
    got = engine.generate(video(**given))
    assert relative(got.latents, want) < TOLERANCE
    for other in (
        video("waves", **given),
        video(**{**given, "guidance_scale": 1.0}),
        video(**{**given, "negative_prompt": "ugly"}),
        video(**{**given, "shift": 1.0}),
    ):
        assert relative(engine.generate(other).latents, want) > 100 * TOLERANCE


def test_company_changes_nothing(engine):
    requests = [
        video(),
        video("a blue cube", height=24, seed=4),
        video("waves", num_frames=1, num_inference_steps=5, seed=5),
        video("a dog", num_frames=6, guidance_scale=1.0, seed=6),
    ]
    alone = [engine.generate(one) for one in requests]
    together = engine.generate(requests)
    assert together[0].receipt.most_in_company == 4
    for one, other in zip(alone, together, strict=True):
        assert relative(other.latents, one.latents) < 1e-5


def test_known_frames_stay(engine):
    """Its masks on frames: what is known is at level 0 from the first step to the last."""
    first = engine.generate(video())
    asked = tasks.animate(
        engine.loaded_model, first.frames[0], prompt=PROMPT, num_frames=4, num_inference_steps=2
    )
    begun = engine.generate(asked)
    # To the last digits that its autoencoder keeps: the frame is its latent's, decoded again.
    (known,) = engine.loaded_model.vae.encode(
        torch.from_numpy(first.frames[:1]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    )
    raw = engine.loaded_model.vae.denormalise(known[None])[0]
    assert relative(begun.latents[:, :1], raw) < 1e-4
    assert begun.frames.shape == first.frames.shape
    with pytest.raises(RequestError, match="a SparsePlan is not carried out"):
        engine.generate(video(window=sora.SparsePlan(2, 1)))


BAD = [
    ({"hidden_size": 25}, "hidden_size 25 does not divide into 2 heads"),
    ({"hidden_size": 26}, "tokens are 26 wide"),
    ({"hidden_size": 48}, "has shape"),
    ({"depth": 0}, "depth is 0; it must be a positive integer"),
    ({"depth": 10**7}, "depth is 10000000"),
    ({"depth": 3}, "missing tensors: spatial_blocks.2"),
    ({"patch_size": [2, 2, 2]}, r"patch_size is \[2, 2, 2\]"),
    ({"patch_size": 2}, "patch_size is 2; "),
    ({"qk_norm": False}, "qk_norm is False; an STDiT3 has True"),
    ({"qk_norm_legacy": True}, "qk_norm_legacy is True"),
    ({"model_type": "STDiT2"}, "model_type is 'STDiT2'"),
    ({"caption_channels": 16}, "reads texts of 16 channels and the encoder gives 32"),
    ({"pred_sigma": "yes"}, "pred_sigma is 'yes'"),
    ({"in_channels": 16}, "takes 16 channels and the autoencoder's latents have 4"),
    ({"surprise": 1}, "unknown configuration keys"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_configurations_are_refused(folder, file, tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **values}))
    (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=message):
        sora.Engine.from_pretrained(tmp_path / file.name, components=folder, device="cpu").close()


def test_files_are_told(file):
    assert inspect_file(file).kinds == (
        "stdit transformer, t2v: 2 layers within frames and as many along time, 24 wide, rectified "
        "flow; goes with an AutoencoderKL and a T5 encoder",
    )
    config = STDiTConfig.from_dict(CONFIG)
    assert STDiTConfig.from_dict(config.to_dict()) == config
    shapes = {
        "x_embedder.proj.weight": (1152, 4, 1, 2, 2), "y_embedder.y_embedding": (300, 4096),
        "temporal_blocks.0.attn.q_norm.weight": (72,), "spatial_blocks.27.mlp.fc1.bias": (4608,),
    }  # fmt: skip
    published = STDiTFamily().told_by(shapes)
    assert (published.num_attention_heads, published.num_layers) == (16, 28)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_measured_peak_is_under_the_promise(file, monkeypatch, dtype):
    made, peak = measured(monkeypatch, file, video("the blue sea"), video(), dtype)
    assert 0.5 * made.receipt.promised_bytes < peak <= made.receipt.promised_bytes


def test_it_offloads_and_is_exact(file, engine):
    want = engine.generate(video()).latents
    for option in ({"offload": "blocks"}, {"exact": True}):
        with sora.Engine.from_pretrained(file, device="cpu", **option) as other:
            assert relative(other.generate(video()).latents, want) < 1e-5


def test_ranks_that_would_cut_attention_apart_are_refused(file):
    parallel = sora.ParallelConfig(ring=2)
    with pytest.raises(LayoutError, match="attention of stdit"):
        sora.Engine.from_pretrained(file, device="cpu", parallel=parallel)


@pytest.mark.slow
def test_two_ranks_equal_one(file, engine):
    want = engine.generate(video())
    parallel = sora.ParallelConfig(guidance=2)
    with sora.Engine.from_pretrained(file, device="cpu", parallel=parallel) as ranks:
        got = ranks.generate(video())
    assert relative(got.latents, want.latents) < 1e-5
    assert np.abs(got.frames.astype(int) - want.frames).max() <= 1


def test_a_saved_job_goes_on_where_it_was(engine, tmp_path):
    whole, again = saved_midway(engine, video(), tmp_path / "job.safetensors")
    assert 0 < again.receipt.resumed_at < 4
    assert torch.equal(again.latents, whole.latents)


def test_an_adapter_is_merged_and_of_a_request(file, engine, tmp_path):
    tensors = {}
    for i, (name, rows, columns) in enumerate(
        [("spatial_blocks.1.attn1.to_k", 24, 24), ("temporal_blocks.0.attn2.to_v", 24, 24)]
    ):
        generator = torch.Generator().manual_seed(i)
        down, up = (torch.randn(n, generator=generator) for n in ((2, columns), (rows, 2)))
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = sora.Lora(tmp_path / "lora.safetensors", 0.5)
    with sora.Engine.from_pretrained(file, device="cpu", loras=[lora]) as changed:
        merged = changed.generate(video()).latents
    assert relative(engine.generate(video(loras=[lora])).latents, merged) < 1e-5
    assert relative(engine.generate(video()).latents, merged) > 1e-2
