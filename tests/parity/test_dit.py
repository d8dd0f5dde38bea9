"""DiT against diffusers: the transformer, whole pipelines, packed batches, folders."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine import tasks
from sora_engine.denoise.canvas_state import CanvasState
from sora_engine.denoise.denoise import prepare
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.distributed.auto_layout import auto_layout
from sora_engine.distributed.wire import request_from_message, request_to_message
from sora_engine.errors import CheckpointError, RequestError
from sora_engine.io.provenance import Provenance
from sora_engine.models.dit.config import DiTConfig
from sora_engine.models.dit.family import DiTFamily
from sora_engine.models.dit.model import DiT
from sora_engine.models.inspection import inspect_file
from sora_engine.models.registry import open_checkpoint
from sora_engine.request.recipe import provenance_of, request_of
from sora_engine.runtime.savepoint import load_state, save_state
from tests.parity.latent_models import NAMES, latents_of, tiny_dit, tiny_dit_pipeline
from tests.parity.vae_models import relative

TOLERANCE = 1e-4
STEPS, SCALE = 4, 3.0
CONFIG, INDEX = "transformer/config.json", "model_index.json"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_dit_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("dit")
    pipeline.save_pretrained(path)
    # diffusers reads the names of classes from here, and does not write them.
    index = json.loads((path / INDEX).read_text())
    names = {str(number): name for number, name in NAMES.items()}
    (path / INDEX).write_text(json.dumps({**index, "id2label": names}))
    return path


@pytest.fixture(scope="module")
def engine(folder):
    limits = sora.Limits(pack_tokens=10_000)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=limits) as made:
        yield made


def ours_of(oracle) -> DiT:
    config = {name: value for name, value in oracle.config.items() if name[0] != "_"}
    ours = DiT(DiTConfig.from_dict(config))
    state = oracle.state_dict()
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"].unsqueeze(2)
    ours.load_state_dict(state)
    return ours.eval().requires_grad_(False)


def by_diffusers(oracle, latents: torch.Tensor, timestep: int, label: int) -> torch.Tensor:
    """The prediction for a picture `[C, H, W]` of any shape: `forward` unfolds squares alone."""
    x = oracle.pos_embed(latents[None])
    level, label = torch.tensor([timestep]), torch.tensor([label])
    for block in oracle.transformer_blocks:
        x = block(x, timestep=level, class_labels=label)
    embedded = oracle.transformer_blocks[0].norm1.emb(level, label, hidden_dtype=x.dtype)
    shift, scale = oracle.proj_out_1(torch.nn.functional.silu(embedded)).chunk(2, dim=1)
    x = oracle.proj_out_2(oracle.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
    patch, channels = oracle.config.patch_size, oracle.config.out_channels
    height, width = (side // patch for side in latents.shape[1:])
    x = torch.einsum("hwpqc->chpwq", x.reshape(height, width, patch, patch, channels))
    return x.reshape(channels, height * patch, width * patch)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"patch_size": 4, "out_channels": 4, "activation_fn": "gelu", "attention_bias": False},
    ],
)
def test_the_transformer_equals_diffusers(overrides):
    oracle = tiny_dit(num_embeds_ada_norm=10, **overrides)
    ours = ours_of(oracle)
    patch, channels = oracle.config.patch_size, oracle.config.out_channels
    pictures = [(3, 500, (8, 8)), (-1, 37, (16, 8)), (9, 999, (8, 24)), (3, 500, (8, 8))]
    samples = [torch.randn(4, 1, *size) for _, _, size in pictures]
    contexts = ours.encode_contexts([{"label": torch.tensor(label)} for label, _, _ in pictures])
    packer = Packer((1, patch, patch), torch.device("cpu"))
    batch = packer.pack(
        [
            Segment(sample, torch.tensor([float(level)]), ((context, 1),))
            for sample, context, (_, level, _) in zip(samples, contexts, pictures, strict=True)
        ]
    )
    packed = packer.unpack(ours(batch), batch, channels)
    for got, sample, (label, level, size) in zip(packed, samples, pictures, strict=True):
        label = 10 if label < 0 else label
        want = by_diffusers(oracle, sample[:, 0], level, label)
        assert relative(got[:, 0], want) < 1e-5
        if size == (8, 8):
            levels, labels = torch.tensor([level]), torch.tensor([label])
            whole = oracle(sample[None, :, 0], timestep=levels, class_labels=labels).sample[0]
            assert relative(got[:, 0], whole) < 1e-5


def request(label, **settings) -> sora.VideoRequest:
    values = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "seed": 3, **settings}
    return tasks.image(label=label, **values)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_the_whole_pipeline_equals_diffusers(folder, pipeline, engine, scheduler):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    given = request(207, latents=noise[0][:, None], solver=scheduler[:4].lower())
    got = engine.generate(given)
    if scheduler == "DDPMScheduler":
        # Noise of its steps is the engine's own: that DDPM's step is diffusers' the samplers' tests
        # show. Here it must be another picture, and no other for another device or batch.
        assert relative(got.latents[:, 0], engine.generate(given).latents[:, 0]) == 0
        return
    want = latents_of(
        pipeline, noise, class_labels=[207], guidance_scale=SCALE, num_inference_steps=STEPS
    )
    assert relative(got.latents, want) < TOLERANCE
    # Leaving out the class, or guidance, would be noticed.
    for other in (request(208), request(207, guidance_scale=1.0)):
        moved = engine.generate(sora.VideoRequest(**{**fields_of(other), "latents": given.latents}))
        assert relative(moved.latents, want) > 100 * TOLERANCE
    pixels = pipeline.vae.decode(want.transpose(0, 1)).sample[0].permute(1, 2, 0).detach() / 2 + 0.5
    frames = (pixels.clamp(0, 1) * 255).round().numpy()
    assert np.abs(got.frames[0].astype(int) - frames).max() <= 1


def fields_of(given: sora.VideoRequest, but: str = "") -> dict:
    names = set(sora.VideoRequest.__dataclass_fields__) - {but}
    return {name: getattr(given, name) for name in names}


def test_company_changes_nothing(engine):
    requests = [
        request(207),
        request("golden retriever", height=24, width=16, seed=4),
        request(3, num_inference_steps=7, seed=5),
        request(0, guidance_scale=1.0, height=32, width=32, seed=6),
    ]
    alone = [engine.generate(one) for one in requests]
    together = engine.generate(requests)
    assert together[0].receipt.most_in_company == 4
    for one, other in zip(alone, together, strict=True):
        assert relative(other.latents, one.latents) < 1e-5
    assert together[1].frames.shape == (1, 24, 16, 3)
    # Of another class each; and what is known of a picture stays.
    edited = engine.generate(request(7, init=alone[0], strength=0.5))
    assert edited.frames.shape == alone[0].frames.shape


def test_names_and_numbers_are_one_class(engine):
    named = sora.VideoRequest("golden retriever", **fields_of(request(None), but="prompt"))
    asked = [request(7), request("7"), request(" golden   retriever"), named]
    latents = [engine.generate(one).latents for one in asked]
    assert all(torch.equal(latents[0], other) for other in latents)
    # A name may be one of several, and steer away from a class, too.
    assert torch.equal(
        engine.generate(request("Tinca tinca")).latents, engine.generate(request(0)).latents
    )
    steered = engine.generate(request(7, negative_prompt="tench")).latents
    assert relative(steered, latents[0]) > 100 * TOLERANCE


BAD_REQUESTS = [
    ({"label": 1000}, "label must be a class from 0 to 999, got 1000"),
    ({"label": -1}, "label must be a class from 0 to 999, got -1"),
    ({"label": "golden retreiver"}, "the nearest are 'golden retriever'"),
    ({"label": 1.5}, "label must be a class's number or name, got float 1.5"),
    ({"label": True}, "label must be a class's number or name, got bool"),
    ({}, "there is no label; .*0 to 999 would work, or a name"),
    ({"prompt": "a red panda"}, "prompt 'a red panda' is no class"),
    ({"label": 7, "prompt": "tench"}, "label = 7 and prompt 'tench' are two classes"),
    ({"label": 7, "negative_prompt": "ugly"}, "negative_prompt 'ugly' is no class"),
    ({"label": 7, "num_frames": 5}, "num_frames is 5; this checkpoint makes single pictures"),
    ({"label": 7, "shots": [sora.Shot("7", 1)]}, "shots read texts"),
]


@pytest.mark.parametrize(("values", "message"), BAD_REQUESTS)
def test_what_is_no_class_is_refused(engine, values, message):
    with pytest.raises(RequestError, match=message):
        engine.submit(sora.VideoRequest(**values))


def test_a_model_of_texts_takes_no_label():
    refusal = pytest.raises(RequestError, match="label = 7 is not read: this checkpoint reads")
    with sora.Engine.from_pretrained("sprites", device="cpu") as texts, refusal:
        texts.submit(sora.VideoRequest("a red circle", label=7))


def test_a_label_goes_wherever_a_request_goes(engine, tmp_path):
    job = engine.submit(request("golden retriever"))
    video = job.result(60)
    resolved = job.request
    assert resolved.label == 7
    assert request_from_message(request_to_message("prepare", resolved)).label == 7
    text = provenance_of(resolved, engine.loaded_model).to_json()
    again = request_of(Provenance.from_json(text), engine.generate)
    assert again.label == 7
    assert torch.equal(engine.generate(again).latents, video.latents)
    canvas = prepare(resolved, engine.loaded_model)
    made_by = provenance_of(resolved, engine.loaded_model)
    saved = tmp_path / "job.safetensors"
    save_state(saved, resolved, CanvasState.of(canvas), engine.loaded_model, made_by)
    assert load_state(saved, engine.loaded_model, engine.limits).request.label == 7


def test_damaged_weights_are_refused(folder, tmp_path):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    bad = tmp_path / "transformer"
    bad.mkdir()
    (bad / "config.json").symlink_to(folder / "transformer" / "config.json")
    del tensors["transformer_blocks.1.ff.net.2.weight"]
    save_file(tensors, bad / file.name)
    with pytest.raises(
        CheckpointError, match=r"missing tensors: transformer_blocks\.1\.ff\.net\.2"
    ):
        sora.Engine.from_pretrained(bad / file.name, components=folder, device="cpu").close()
    lone = tmp_path / "lone.safetensors"
    save_file(tensors, lone)
    with pytest.raises(CheckpointError, match=r"config.json beside it would"):
        open_checkpoint(lone, folder)


def test_a_transformer_file_is_told_and_loads(folder, engine):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert inspect_file(file).kinds == (
        "dit transformer, class-conditional: 2 layers, 16 wide, 1000 classes, patches of 2; goes "
        "with an AutoencoderKL",
    )
    with sora.Engine.from_pretrained(file, device="cpu") as by_file:
        one = by_file.generate(request(7))
    assert torch.equal(one.latents, engine.generate(request(7)).latents)
    # Published folders name diffusers' older class, which served several models.
    values = {"_class_name": "Transformer2DModel", "norm_num_groups": 32, "dropout": 0.0}
    config = json.loads((folder / CONFIG).read_text())
    assert DiTConfig.from_dict({**config, **values}) == DiTConfig.from_dict(config)


def test_the_command_takes_a_label(folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "sora_engine", "image", *arguments]
        return subprocess.run(
            [*command, "--model", str(folder), "--steps", "2", "--device", "cpu"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip

    done = run("--label", "golden retriever", "--seed", "1", "-o", "dog.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dog.png").exists()
    refused = run("--label", "dog", "-o", "no.png")
    assert refused.returncode != 0
    assert refused.stderr.startswith("sora: error: --label: label 'dog' is no class")
    both = run("a dog", "--label", "7")
    assert "--label: it takes the place of PROMPT 'a dog'" in both.stderr


def test_a_layout_is_planned(folder):
    assert auto_layout(folder, None, 2).num_ranks <= 2


@pytest.mark.slow
def test_two_ranks_equal_one(folder, engine):
    requests = [request(207), request("tench", height=24, width=16, seed=4)]
    alone = engine.generate(requests)
    for axis in ("ulysses", "ring", "guidance"):
        parallel = sora.ParallelConfig(**{axis: 2})
        with sora.Engine.from_pretrained(folder, device="cpu", parallel=parallel) as ranks:
            for one, other in zip(alone, ranks.generate(requests), strict=True):
                assert relative(other.latents, one.latents) < 1e-5
                assert np.abs(one.frames.astype(int) - other.frames).max() <= 1


def test_files_in_the_authors_names_load(folder, engine, pipeline, tmp_path):
    """One embedding of classes and levels for all blocks, and attention as one matrix."""
    oracle = tiny_dit()
    for block in oracle.transformer_blocks[1:]:  # as in the published models
        block.norm1.emb.load_state_dict(oracle.transformer_blocks[0].norm1.emb.state_dict())
    state, named = oracle.state_dict(), {"pos_embed": torch.zeros(1, 16, 16)}

    def put(theirs: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            named[f"{theirs}.{kind}"] = torch.cat([state[f"{name}.{kind}"] for name in ours])

    embedder = "transformer_blocks.0.norm1.emb"
    put("x_embedder.proj", "pos_embed.proj")
    put("t_embedder.mlp.0", f"{embedder}.timestep_embedder.linear_1")
    put("t_embedder.mlp.2", f"{embedder}.timestep_embedder.linear_2")
    classes = state[f"{embedder}.class_embedder.embedding_table.weight"]
    named["y_embedder.embedding_table.weight"] = classes.clone()
    for i in range(2):
        block = f"transformer_blocks.{i}"
        put(f"blocks.{i}.attn.qkv", *(f"{block}.attn1.to_{x}" for x in "qkv"))
        put(f"blocks.{i}.attn.proj", f"{block}.attn1.to_out.0")
        put(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        put(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
        put(f"blocks.{i}.adaLN_modulation.1", f"{block}.norm1.linear")
    put("final_layer.adaLN_modulation.1", "proj_out_1")
    put("final_layer.linear", "proj_out_2")
    config = (folder / CONFIG).read_text()
    files = []
    for name, tensors in (("theirs", named), ("diffusers", state)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        files.append(tmp_path / name / "dit.safetensors")
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, files[-1])
    made = []
    for file in files:
        with sora.Engine.from_pretrained(file, components=folder, device="cpu") as by_file:
            made.append(by_file.generate(request(7)).latents)
    assert torch.equal(*made)
    assert inspect_file(files[0]).kinds == inspect_file(files[1]).kinds
    # Without a configuration widths of the published models tell the heads, and no other does.
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json beside it would"):
        open_checkpoint(files[0], folder)
    wide = {"x_embedder.proj.weight": (1152, 4, 2, 2), "y_embedder.embedding_table.weight": (6, 1)}
    wide["blocks.27.attn.proj.weight"] = (1152, 1152)
    told = DiTFamily().told_by(wide)
    assert (told.num_attention_heads, told.num_layers, told.sample_size) == (16, 28, 32)
