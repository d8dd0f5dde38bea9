"""Engines with adapters merged in: their videos, what tells of them, and taking jobs up again."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine import CheckpointError, Lora, VideoRequest
from sora_engine.cli import main
from sora_engine.io.provenance import read_provenance
from sora_engine.io.video_reader import read_video
from sora_engine.models.inspection import inspect_file
from sora_engine.models.loading import load_video_model
from sora_engine.models.registry import BUNDLED
from tests.unit.adapter_recipes import Noise, own

REQUEST = VideoRequest("a red circle", height=32, width=48, num_frames=5, num_inference_steps=2,
                       seed=3)  # fmt: skip
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def plain_weights():
    return load_file(next((BUNDLED["sprites"] / "transformer").glob("*.safetensors")))


def make_adapter(path, seed=0, scale=0.3, layers=(0, 3), extra=None):
    """A LoRA for sprites, and by hand the weights that it makes."""
    weights, noise, tensors, after = plain_weights(), Noise(seed), {}, {}
    for layer in layers:
        for part in ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_v", "ffn.net.2"):
            module = f"blocks.{layer}.{part}"
            weight = weights[f"{module}.weight"]
            b, a = noise(weight.shape[0], 4, scale=scale), noise(4, weight.shape[1], scale=scale)
            key = f"lora_unet_{own(module).replace('.', '_')}"
            tensors |= {f"{key}.lora_up.weight": b, f"{key}.lora_down.weight": a}
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
            after[f"{module}.weight"] = 0.5 * b.double() @ a.double()
    save_file({**tensors, **(extra or {})}, path)
    return after


def folder_with(path, *changes):
    """Sprites' folder with its weights changed by hand in float64."""
    weights = plain_weights()
    for deltas, strength in changes:
        for name, delta in deltas.items():
            weights[name] = weights[name].double() + strength * delta
    shutil.copytree(BUNDLED["sprites"], path)
    for old in (path / "transformer").glob("*.safetensors*"):
        old.unlink()
    save_file({n: v.float().contiguous() for n, v in weights.items()}, path / WEIGHTS)
    return path


def close(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "style.safetensors"
    make_adapter(path)
    return path


def test_a_video_is_that_of_weights_merged_by_hand(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    deltas = make_adapter(one), make_adapter(two, seed=1)
    by_hand = folder_with(tmp_path / "by hand", (deltas[0], 0.7), (deltas[1], -0.4))
    loras = [Lora(one, 0.7), Lora(two, -0.4)]
    with sora.Engine.from_pretrained(by_hand, device="cpu") as engine:
        theirs = engine.generate(REQUEST)
    with sora.Engine.from_pretrained("sprites", device="cpu", loras=loras) as engine:
        ours = engine.generate(REQUEST)
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        without = engine.generate(REQUEST)
    assert close(ours.latents, theirs.latents) < 1e-5
    assert close(without.latents, theirs.latents) > 1e-2
    assert ours.receipt.loras == ["one.safetensors:0.7", "two.safetensors:-0.4"]
    assert [r["name"] for r in ours.provenance.settings["loras"]] == [
        "one.safetensors", "two.safetensors",
    ]  # fmt: skip
    assert str(tmp_path) not in ours.provenance.to_json()
    assert "loras" not in without.provenance.settings
    assert without.receipt.loras == []


def test_a_saved_job_goes_on_with_the_same_adapters_alone(tmp_path, adapter):
    saved = tmp_path / "job"
    with sora.Engine.from_pretrained("sprites", device="cpu", loras=[Lora(adapter, 0.5)]) as engine:
        whole = engine.submit(REQUEST, save_to=saved).result()
        assert torch.equal(engine.resume(saved).result().latents, whole.latents)
    for other, says in (((), "no adapters"), ([Lora(adapter)], "style.safetensors:1")):
        with sora.Engine.from_pretrained("sprites", device="cpu", loras=other) as engine:
            with pytest.raises(CheckpointError, match=re.escape(says)) as told:
                engine.resume(saved)
            assert "was saved with style.safetensors:0.5 merged in" in str(told.value)
    with sora.Engine.from_pretrained("sprites", device="cpu", loras=[Lora(adapter, 0.5)]) as engine:
        assert torch.equal(engine.resume(saved).result().latents, whole.latents)


def test_a_broken_adapter_leaves_no_engine(tmp_path):
    path = tmp_path / "broken.safetensors"
    make_adapter(path, extra={"lora_unet_blocks_0_self_attn_k.lora_up.weight": torch.ones(192, 2)})
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: half an adapter: .*attn_k"):
        sora.Engine.from_pretrained("sprites", device="cpu", loras=[Lora(path)])
    make_adapter(path, scale=float("nan"))
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        load_video_model("sprites", device="cpu", loras=[Lora(path)])


SMALL = ["--size", "48x32", "--frames", "5", "--steps", "2", "--seed", "3", "--device", "cpu"]


def test_the_command_line_merges_and_makes_again(tmp_path, adapter, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(adapter, tmp_path / "style.safetensors")
    lora = ["--lora", "style.safetensors:0.8"]
    assert main(["generate", "a red circle", *SMALL, *lora, "-o", "a.webp"]) == 0
    assert main(["generate", "a red circle", *SMALL, "-o", "plain.webp"]) == 0
    assert main(["generate", "--like", "a.webp", "--device", "cpu", "-o", "b.webp"]) == 0
    frames = [read_video(tmp_path / name)[0] for name in ("a.webp", "b.webp", "plain.webp")]
    assert (frames[0] == frames[1]).all()
    assert (frames[0] != frames[2]).any()
    (told,) = read_provenance(tmp_path / "b.webp").settings["loras"]
    assert (told["name"], told["strength"], told["expert"]) == ("style.safetensors", 0.8, None)
    (tmp_path / "style.safetensors").unlink()
    capsys.readouterr()
    assert main(["generate", "--like", "a.webp", "--device", "cpu", "-o", "c.webp"]) == 2
    assert "the adapter style.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("none.safetensors", "--lora: none.safetensors does not exist"),
        ("style.safetensors:much", "'much' in 'style.safetensors:much' is no strength"),
        ("style.safetensors:1:middle", "'middle' in"),
        ("style.safetensors:nan", "a Lora's strength must be finite"),
        ("style.safetensors:1:high", "this checkpoint has one transformer"),
    ],
)
def test_a_bad_lora_option_is_named(tmp_path, adapter, monkeypatch, capsys, given, says):
    monkeypatch.chdir(tmp_path)
    shutil.copy(adapter, tmp_path / "style.safetensors")
    assert main(["generate", "a red circle", *SMALL, "--lora", given, "-o", "a.webp"]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "a.webp").exists()


def test_inspect_tells_what_an_adapter_is(adapter, tmp_path, capsys):
    assert main(["inspect", str(adapter)]) == 0
    told = capsys.readouterr().out
    for what in (
        "LoRA of rank 4", "kohya and musubi-tuner", "10 changes", "attn1.to_q", "ffn.net.2",
        "goes with a wan transformer 192 wide of 4 layers or more",
    ):  # fmt: skip
        assert what in told
    assert inspect_file(adapter).num_tensors == 30
    # Values are not read: that these are none shows when they are used.
    torn = tmp_path / "torn.safetensors"
    make_adapter(torn, scale=float("nan"))
    assert "LoRA of rank 4" in inspect_file(torn).lines()[0]


@pytest.mark.parametrize("shard_weights", [False, True])
def test_ranks_merge_as_one_process_does(tmp_path, shard_weights):
    path = tmp_path / "style.safetensors"
    make_adapter(path)
    tensors = load_file(path)
    for layer in (0, 3):
        key = f"lora_unet_blocks_{layer}_self_attn_q"
        tensors[f"{key}.dora_scale"] = torch.full((192, 1), 2.0)  # of rows
        key = f"lora_unet_blocks_{layer}_cross_attn_k"
        tensors[f"{key}.dora_scale"] = torch.full((1, 192), 2.0)  # of columns: of all rows
    save_file(tensors, path)
    with sora.Engine.from_pretrained("sprites", device="cpu", loras=[Lora(path, 0.5)]) as engine:
        alone = engine.generate(REQUEST)
    parallel = sora.ParallelConfig(ulysses=2, shard_weights=shard_weights)
    with sora.Engine.from_pretrained(
        "sprites", device="cpu", loras=[Lora(path, 0.5)], parallel=parallel
    ) as engine:
        video = engine.generate(REQUEST)
    assert close(video.latents, alone.latents) < 1e-5
    assert video.receipt.loras == alone.receipt.loras == ["style.safetensors:0.5"]
    tensors["lora_unet_blocks_0_self_attn_q.alpha"] = torch.tensor(float("nan"))
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"attn_q\.alpha' is nan"):
        sora.Engine.from_pretrained("sprites", device="cpu", loras=[Lora(path)], parallel=parallel)
