"""PixArt-Sigma against diffusers: transformer, texts, whole pipelines, packed batches, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine import tasks
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.models.inspection import inspect_file
from sora_engine.models.pixart.config import PixArtConfig
from sora_engine.models.pixart.model import PixArt
from sora_engine.models.registry import open_checkpoint
from tests.parity.latent_models import latents_of, tiny_pixart, tiny_pixart_pipeline
from tests.parity.vae_models import relative

TOLERANCE = 1e-4
STEPS, SCALE = 3, 3.0
PROMPT, NEGATIVE = "A red panda eats bamboo", "ugly"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pixart_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pixart")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    limits = sora.Limits(pack_tokens=10_000)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=limits) as made:
        yield made


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"sample_size": 128, "use_additional_conditions": False},  # places lie twice as close
        {"patch_size": 4, "out_channels": 4, "interpolation_scale": 3, "attention_bias": False},
    ],
)
def test_the_transformer_equals_diffusers(overrides):
    oracle = tiny_pixart(**overrides)
    config = {name: value for name, value in oracle.config.items() if name[0] != "_"}
    ours = PixArt(PixArtConfig.from_dict(config)).eval().requires_grad_(False)
    state = oracle.state_dict()
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"].unsqueeze(2)
    ours.load_state_dict(state)
    patch, channels = oracle.config.patch_size, oracle.config.out_channels
    pictures = [((8, 12), 500, 5), ((8, 8), 37, 3), ((16, 4), 999, 300)]
    samples = [torch.randn(4, 1, *size) for size, _, _ in pictures]
    texts = [torch.randn(300, 32) for _ in pictures]
    contexts = ours.encode_contexts(
        [
            {"text": text, "count": torch.tensor(count)}
            for text, (_, _, count) in zip(texts, pictures, strict=True)
        ]
    )
    packer = Packer((1, patch, patch), torch.device("cpu"))
    batch = packer.pack(
        [
            Segment(sample, torch.tensor([float(level)]), ((context, 1),))
            for sample, context, (_, level, _) in zip(samples, contexts, pictures, strict=True)
        ]
    )
    packed = packer.unpack(ours(batch), batch, channels)
    for got, sample, text, (_, level, count) in zip(packed, samples, texts, pictures, strict=True):
        want = oracle(
            sample[None, :, 0],
            encoder_hidden_states=text[None],
            encoder_attention_mask=(torch.arange(300) < count).long()[None],
            timestep=torch.tensor([level]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[0]
        assert relative(got[:, 0], want) < 1e-5


@pytest.mark.parametrize("prompt", [PROMPT, "", "a " * 310])
def test_texts_equal_diffusers(pipeline, engine, prompt):
    want, mask, _, _ = pipeline.encode_prompt(prompt, False, clean_caption=False)
    (text,) = engine.loaded_model.prompt_encoder.encode([prompt])
    count = int(text["count"])
    assert count == int(mask.sum()) <= 300
    assert relative(text["text"][:count], want[0, :count]) < 1e-5


def request(prompt=PROMPT, **settings) -> sora.VideoRequest:
    values = {
        "num_inference_steps": STEPS, "guidance_scale": SCALE, "seed": 3,
        "negative_prompt": NEGATIVE, **settings,
    }  # fmt: skip
    return tasks.image(prompt, **values)


def test_the_whole_pipeline_equals_diffusers(pipeline, engine):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    arguments = {
        "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "height": 16, "width": 16,
        "clean_caption": False, "use_resolution_binning": False,
    }  # fmt: skip
    given = noise[0][:, None]
    for scale in (1.0, SCALE):
        got = engine.generate(request(latents=given, guidance_scale=scale))
        want = latents_of(pipeline, noise, prompt=PROMPT, guidance_scale=scale, **arguments)
        assert relative(got.latents, want) < TOLERANCE
    # Leaving out the text, the negative one, or guidance, would be noticed.
    for other in (
        request("", latents=given),
        request(latents=given, negative_prompt=""),
        request(latents=given, guidance_scale=1.0),
    ):
        assert relative(engine.generate(other).latents, want) > 100 * TOLERANCE
    pixels = pipeline.vae.decode(want.transpose(0, 1) / pipeline.vae.config.scaling_factor * 1.0)
    assert pixels.sample.shape[2:] == got.frames.shape[1:3]


def test_company_changes_nothing(engine):
    requests = [
        request(),
        request("a blue cube", height=24, width=16, seed=4),
        request("waves at night", num_inference_steps=5, seed=5),
        request("a dog", guidance_scale=1.0, height=32, width=32, seed=6),
    ]
    alone = [engine.generate(one) for one in requests]
    together = engine.generate(requests)
    assert together[0].receipt.most_in_company == 4
    for one, other in zip(alone, together, strict=True):
        assert relative(other.latents, one.latents) < 1e-5


def in_the_authors_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As PixArt's own repository names and joins them."""
    made: dict[str, torch.Tensor] = {}

    def put(theirs: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            made[f"{theirs}.{kind}"] = torch.cat([state[f"{name}.{kind}"] for name in ours])

    put("x_embedder.proj", "pos_embed.proj")
    for i in (0, 2):
        put(f"t_embedder.mlp.{i}", f"adaln_single.emb.timestep_embedder.linear_{i // 2 + 1}")
        if i == 0:
            put("t_block.1", "adaln_single.linear")
    for i in (1, 2):
        put(f"y_embedder.y_proj.fc{i}", f"caption_projection.linear_{i}")
    made["y_embedder.y_embedding"] = torch.zeros(300, 32)
    for i in range(2):
        block = f"transformer_blocks.{i}"
        put(f"blocks.{i}.attn.qkv", *(f"{block}.attn1.to_{x}" for x in "qkv"))
        put(f"blocks.{i}.attn.proj", f"{block}.attn1.to_out.0")
        put(f"blocks.{i}.cross_attn.q_linear", f"{block}.attn2.to_q")
        put(f"blocks.{i}.cross_attn.kv_linear", f"{block}.attn2.to_k", f"{block}.attn2.to_v")
        put(f"blocks.{i}.cross_attn.proj", f"{block}.attn2.to_out.0")
        put(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        put(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
        made[f"blocks.{i}.scale_shift_table"] = state[f"{block}.scale_shift_table"]
    put("final_layer.linear", "proj_out")
    made["final_layer.scale_shift_table"] = state["scale_shift_table"]
    return {name: tensor.contiguous() for name, tensor in made.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_files_in_diffusers_and_in_the_authors_names_load(
    pipeline, folder, engine, tmp_path, prefix
):
    want = engine.generate(request()).latents
    state = pipeline.transformer.state_dict()
    named = in_the_authors_names(state) if prefix else {k: v.contiguous() for k, v in state.items()}
    file = tmp_path / "pixart.safetensors"
    save_file({prefix + name: tensor for name, tensor in named.items()}, file)
    (tmp_path / "config.json").symlink_to(folder / "transformer" / "config.json")
    assert inspect_file(file).kinds == (
        "pixart transformer, t2i: 2 layers, 24 wide, patches of 2; goes with an AutoencoderKL and "
        "a T5 encoder",
    )
    with sora.Engine.from_pretrained(file, components=folder, device="cpu") as by_file:
        assert torch.equal(by_file.generate(request()).latents, want)


def test_the_authors_files_tell_their_sizes(folder, tmp_path):
    """Of PixArt-Sigma-XL/2 at 1024 pixels, by its shapes alone."""
    oracle = tiny_pixart(attention_head_dim=72, num_attention_heads=2, cross_attention_dim=144)
    named = in_the_authors_names(oracle.state_dict())
    named["pos_embed"] = torch.zeros(1, 64**2, 144)
    file = tmp_path / "PixArt-Sigma-XL-2-1024-MS.safetensors"
    save_file(named, file)
    found, _ = open_checkpoint(file, folder)
    shape = found.experts[0].shape
    assert (shape.num_layers, shape.num_heads, shape.head_dim) == (2, 2, 72)
    assert found.defaults.height == 256  # the tiny decoder doubles 128


@pytest.mark.slow
def test_two_ranks_equal_one(folder, engine):
    requests = [request(), request("a blue cube", height=24, width=16, seed=4)]
    alone = engine.generate(requests)
    for axis in ("ulysses", "ring", "guidance"):
        parallel = sora.ParallelConfig(**{axis: 2})
        if axis == "ulysses":  # three heads are not shared out over two
            continue
        with sora.Engine.from_pretrained(folder, device="cpu", parallel=parallel) as ranks:
            for one, other in zip(alone, ranks.generate(requests), strict=True):
                assert relative(other.latents, one.latents) < 1e-5
                assert np.abs(one.frames.astype(int) - other.frames).max() <= 1
