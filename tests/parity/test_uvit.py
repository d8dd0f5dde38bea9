"""U-ViT against the blocks of diffusers' deprecated UniDiffuser, and against the paper's sampler in
a few lines: the transformer, whole pictures, packed batches, files in its authors' names."""

from __future__ import annotations

import json
import string
import subprocess
import sys

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import sora_engine as sora
from sora_engine import tasks
from sora_engine.errors import CheckpointError, LayoutError, RequestError
from sora_engine.models.inspection import inspect_file
from sora_engine.models.registry import open_checkpoint
from sora_engine.models.uvit.family import UViTFamily
from tests.parity.latent_models import sharpen, tiny_kl
from tests.parity.metering import measured, saved_midway
from tests.parity.vae_models import relative

TOLERANCE = 1e-4
DIM, HEADS, SIZE, PATCH, WORDS, CLASSES = 16, 2, 8, 2, 7, 11
CONFIG = {
    "img_size": SIZE, "patch_size": PATCH, "in_chans": 4, "embed_dim": DIM, "depth": 4,
    "num_heads": HEADS, "num_clip_token": WORDS, "clip_dim": 8,
}  # fmt: skip
PROMPTS = ("a red panda", "")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Oracle(torch.nn.Module):
    """diffusers' blocks, with LayerNorms where the paper has them, and the paper's tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = UTransformer2DModel(
            num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, in_channels=4,
            out_channels=4, num_layers=4, sample_size=SIZE, patch_size=PATCH, activation_fn="gelu",
            attention_bias=False, block_type="paper", pre_layer_norm=True,
        )  # fmt: skip
        sharpen(self.blocks)
        for block in self.blocks.transformer_out_blocks:
            block["skip"].norm = torch.nn.Identity()  # UniDiffuser's own, not the paper's
        count = 1 + (1 if kind == "classes" else WORDS) + (SIZE // PATCH) ** 2
        self.pos_embed = torch.nn.Parameter(torch.randn(1, count, DIM))
        self.patches = torch.nn.Conv2d(4, DIM, PATCH, PATCH)
        self.context = (
            torch.nn.Embedding(CLASSES, DIM) if kind == "classes" else torch.nn.Linear(8, DIM)
        )
        self.out = torch.nn.Linear(DIM, 4 * PATCH**2)
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, level: float, condition: torch.Tensor) -> torch.Tensor:
        """A picture `[1, 4, H, W]`, and a class `[1]` or a text `[1, WORDS, 8]`."""
        half = DIM // 2
        angles = level * torch.exp(-torch.arange(half) * torch.log(torch.tensor(1e4)) / half)
        time = torch.cat([angles.cos(), angles.sin()])[None, None]
        words = self.context(condition).view(1, -1, DIM)
        tokens = torch.cat([time, words, self.patches(x).flatten(2).transpose(1, 2)], 1)
        done = self.blocks(
            tokens + self.pos_embed, hidden_states_is_embedding=True, unpatchify=False,
            return_dict=False,
        )[0]  # fmt: skip
        side = SIZE // PATCH
        pixels = self.out(done[:, -(side**2) :]).view(1, side, side, PATCH, PATCH, 4)
        return self.conv(pixels.permute(0, 5, 1, 3, 2, 4).reshape(1, 4, SIZE, SIZE))

    def in_the_authors_names(self) -> dict[str, torch.Tensor]:
        """As the authors' repository names and joins them."""
        state, made = self.state_dict(), {"pos_embed": self.pos_embed}

        def put(theirs: str, *ours: str) -> None:
            for kind in ("weight", "bias"):
                parts = [state[f"{name}.{kind}"] for name in ours if f"{name}.{kind}" in state]
                if parts:
                    made[f"{theirs}.{kind}"] = torch.cat(parts)

        lists = [("in_blocks.0", "in_blocks.0"), ("in_blocks.1", "in_blocks.1")]
        lists += [("mid_block", "mid_block")]
        lists += [(f"out_blocks.{i}", f"out_blocks.{i}.block") for i in range(2)]
        for theirs, ours in lists:
            ours = f"blocks.transformer_{ours}"
            put(f"{theirs}.attn.qkv", *(f"{ours}.attn1.to_{name}" for name in "qkv"))
            put(f"{theirs}.attn.proj", f"{ours}.attn1.to_out.0")
            put(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj")
            put(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2")
            put(f"{theirs}.norm1", f"{ours}.norm1")
            put(f"{theirs}.norm2", f"{ours}.norm3")
        for i in range(2):
            skip = f"blocks.transformer_out_blocks.{i}.skip.skip_linear"
            put(f"out_blocks.{i}.skip_linear", skip)
        put("patch_embed.proj", "patches")
        by_class = isinstance(self.context, torch.nn.Embedding)
        put("label_emb" if by_class else "context_embed", "context")
        put("norm", "blocks.norm_out")
        put("decoder_pred", "out")
        put("final_layer", "conv")
        return {name: tensor.clone().contiguous() for name, tensor in made.items()}


def tiny_clip() -> tuple[CLIPTextModel, CLIPTokenizer]:
    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, eos_token_id=53, bos_token_id=52, pad_token_id=53,
    )  # fmt: skip
    return CLIPTextModel(config).eval(), CLIPTokenizer({w: i for i, w in enumerate(words)}, [])


@pytest.fixture(scope="module", params=["classes", "texts"])
def model(request, tmp_path_factory):
    """An oracle, its file, the folder with all else, and conditions: of a branch, and of none."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    oracle = Oracle(kind)
    (folder / "transformer").mkdir()
    file = folder / "transformer" / "uvit.safetensors"
    save_file(oracle.in_the_authors_names(), file)
    config = {**CONFIG, "num_classes": CLASSES if kind == "classes" else -1}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    tiny_kl().save_pretrained(folder / "vae")
    if kind == "classes":
        return kind, oracle, file, folder, [torch.tensor([c]) for c in (3, CLASSES - 1)]
    encoder, tokenizer = tiny_clip()
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = tokenizer(
        list(PROMPTS), truncation=True, max_length=WORDS, padding="max_length", return_tensors="pt"
    ).input_ids
    return kind, oracle, file, folder, list(encoder(ids).last_hidden_state.detach().split(1))


@pytest.fixture(scope="module")
def engine(model):
    limits = sora.Limits(pack_tokens=10_000)
    with sora.Engine.from_pretrained(model[2], device="cpu", limits=limits) as made:
        yield made


def picture(kind: str, **settings) -> sora.VideoRequest:
    words = {"label": 3} if kind == "classes" else {"prompt": PROMPTS[0]}
    values = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 3, **words, **settings}
    return tasks.image(**values)


def sampled(oracle, noise, conditions, scale, steps=4) -> torch.Tensor:
    """By diffusers' DPM-Solver++ and the paper's noise levels: latents as the decoder has them."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    scheduler.set_timesteps(steps)
    x = noise
    for level in scheduler.timesteps:
        with_it, without = (oracle(x, float(level), condition) for condition in conditions)
        x = scheduler.step(without + scale * (with_it - without), level, x).prev_sample
    return x / 0.18215


def test_whole_pictures_equal_the_oracles(model, engine):
    kind, oracle, _, _, conditions = model
    noise = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    want = sampled(oracle, noise, conditions, 3.0)
    given = noise[0][:, None]
    got = engine.generate(picture(kind, latents=given)).latents
    assert relative(got[:, 0], want[0]) < TOLERANCE
    # Leaving out the condition, or guidance, would be noticed.
    other = {"label": 4} if kind == "classes" else {"prompt": "blue"}
    for moved in (
        picture(kind, latents=given, **other),
        picture(kind, latents=given, guidance_scale=1.0),
    ):
        assert relative(engine.generate(moved).latents[:, 0], want[0]) > 100 * TOLERANCE


def test_a_skip_is_noticed(model, engine):
    """Random blocks would be forgiving: the long skips move the result."""
    _, oracle, _, _, conditions = model
    x = torch.randn(1, 4, SIZE, SIZE)
    want, cut = oracle(x, 500.0, conditions[0]), []
    skips = [block["skip"].skip_linear for block in oracle.blocks.transformer_out_blocks]
    kept = [skip.weight.clone() for skip in skips]
    for skip, weight in zip(skips, kept, strict=True):
        skip.weight[:, DIM:] = 0
        cut.append(oracle(x, 500.0, conditions[0]))
        skip.weight.copy_(weight)
    assert all(relative(other, want) > 100 * TOLERANCE for other in cut)


def test_company_changes_nothing(model, engine):
    kind = model[0]
    other = {"label": 5} if kind == "classes" else {"prompt": "the blue sea"}
    requests = [
        picture(kind),
        picture(kind, **other, seed=4),
        picture(kind, num_inference_steps=7, seed=5),
        picture(kind, guidance_scale=1.0, seed=6),
    ]
    alone = [engine.generate(one) for one in requests]
    together = engine.generate(requests)
    assert together[0].receipt.most_in_company == 4
    for one, both in zip(alone, together, strict=True):
        assert relative(both.latents, one.latents) < 1e-5
    with pytest.raises(RequestError, match="learned for 4 x 4, and no other size is made"):
        engine.generate(picture(kind, height=24))


def test_files_are_told(model, tmp_path):
    kind, oracle, file, folder, _ = model
    reads = "10 classes" if kind == "classes" else "texts"
    (told,) = inspect_file(file).kinds
    assert told.startswith(f"uvit transformer, of {reads}: 5 layers, 16 wide, patches of 2; goes")
    lone = tmp_path / "lone.safetensors"
    save_file(oracle.in_the_authors_names(), lone)
    with pytest.raises(CheckpointError, match=r"config\.json beside it would"):
        open_checkpoint(lone, folder)
    if kind == "texts":
        (tmp_path / "config.json").symlink_to(file.parent / "config.json")
        with pytest.raises(CheckpointError, match="no text_encoder and no tokenizer: CLIP's"):
            open_checkpoint(lone, {"vae": folder / "vae"})
    shapes = {
        "patch_embed.proj.weight": (1152, 4, 2, 2), "pos_embed": (1, 1 + 1 + 256, 1152),
        "label_emb.weight": (1001, 1152), "in_blocks.13.norm1.weight": (1152,),
    }  # fmt: skip
    huge = UViTFamily().told_by(shapes)  # as the authors' U-ViT-H/2 at 256 pixels
    assert (huge.depth, huge.num_heads, huge.img_size, huge.conv) == (28, 16, 32, False)


BAD = [
    ({"depth": 3}, "depth is 3; skips need an even number"),
    ({"depth": 10**7}, "depth is 10000000"),
    ({"depth": 6}, "missing tensors: in_blocks.2"),
    ({"embed_dim": 32}, "has shape"),
    ({"num_heads": 3}, "does not divide into 3 heads"),
    ({"img_size": 7}, "img_size 7 is no multiple"),
    ({"img_size": 16}, "pos_embed has shape"),
    ({"in_chans": 16}, "takes 16 channels and the autoencoder's latents have 4"),
    ({"mlp_ratio": 2}, "mlp_ratio is 2; a U-ViT has 4"),
    ({"qkv_bias": True}, "qkv_bias is True; a U-ViT has False"),
    ({"conv": "yes"}, "conv is 'yes'; it must be true or false"),
    ({"conv": False}, "unexpected tensors: final_layer"),
    ({"surprise": 1}, "unknown configuration keys"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_configurations_are_refused(model, tmp_path, values, message):
    _, _, file, folder, _ = model
    config = json.loads((file.parent / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=message):
        sora.Engine.from_pretrained(tmp_path / file.name, components=folder, device="cpu").close()


def test_ranks_that_would_cut_attention_apart_are_refused(model):
    parallel = sora.ParallelConfig(ring=2)
    with pytest.raises(LayoutError, match="attention of uvit"):
        sora.Engine.from_pretrained(model[2], device="cpu", parallel=parallel)


@pytest.mark.slow
def test_two_ranks_equal_one(model, engine):
    kind, _, file, _, _ = model
    want = engine.generate(picture(kind)).latents
    parallel = sora.ParallelConfig(guidance=2)
    with sora.Engine.from_pretrained(file, device="cpu", parallel=parallel) as ranks:
        assert relative(ranks.generate(picture(kind)).latents, want) < 1e-5


def test_padding_is_read(model, engine):
    """CLIP's padding is what its authors train on: all tokens of a text are read."""
    if model[0] == "classes":
        return
    long, short = (
        made["text"] for made in engine.loaded_model.prompt_encoder.encode([PROMPTS[0], "a"])
    )
    assert short.shape == long.shape == (WORDS, 8)
    assert relative(long, model[4][0][0]) < 1e-5
    # Each place of the padding is another token to the transformer.
    assert len(short.unique(dim=0)) == WORDS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_measured_peak_is_under_the_promise(model, monkeypatch, dtype):
    kind, _, file, _, _ = model
    other = {"label": 5} if kind == "classes" else {"prompt": "the blue sea"}
    first, second = picture(kind, **other), picture(kind)
    video, peak = measured(monkeypatch, file, first, second, dtype)
    assert 0.5 * video.receipt.promised_bytes < peak <= video.receipt.promised_bytes


def test_it_offloads_and_is_exact(model, engine):
    kind, _, file, _, _ = model
    want = engine.generate(picture(kind)).latents
    for option in ({"offload": "blocks"}, {"exact": True}):
        with sora.Engine.from_pretrained(file, device="cpu", **option) as other:
            assert relative(other.generate(picture(kind)).latents, want) < 1e-5


def test_a_saved_job_goes_on_where_it_was(model, engine, tmp_path):
    kind = model[0]
    whole, again = saved_midway(engine, picture(kind), tmp_path / "job.safetensors")
    assert 0 < again.receipt.resumed_at < 4
    assert torch.equal(again.latents, whole.latents)


@pytest.mark.slow
def test_the_command_makes_a_picture(model, tmp_path):
    kind, _, file, folder, _ = model
    asked = ["--label", "3"] if kind == "classes" else [PROMPTS[0]]
    command = [sys.executable, "-m", "sora_engine", "image", *asked, "--model", str(file)]
    done = subprocess.run(
        [*command, "--components", str(folder), "--steps", "2", "--device", "cpu", "-o", "a.png"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()
