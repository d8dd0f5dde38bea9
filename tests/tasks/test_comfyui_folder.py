"""A folder of ComfyUI's parts, as a new user has it: one command makes a video, and where a part is
missing or lies elsewhere the error says which, and under which name people hold it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_engine import Lora
from sora_engine.cli.app import UsageError, main
from sora_engine.cli.options import Common
from sora_engine.io.video_reader import read_video
from tests.parity.oracles import tiny_pipeline, tiny_transformer
from tests.unit.part_recipes import (
    make_spiece,
    transformer_tensors,
    umt5_tensors,
    vae_tensors,
    with_tokenizer,
)
from tests.unit.test_vae_tiny import weights as tiny_vae_tensors
from tests.unit.weight_recipes import write_gguf, write_safetensors

HIGH = "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
LOW = "diffusion_models/wan2.2_t2v_low_noise_14B_Q8_0.gguf"
TEXT = "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "vae/wan_2.1_vae.safetensors"
TINY = "vae_approx/taew2_1.safetensors"
LORAS = ("loras/style_high_noise.safetensors", "loras/style_low_noise.safetensors")
USUAL = {
    HIGH: "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    TEXT: "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    VAE: r"wan_2\.1_vae\.safetensors",
    TINY: r"taew2_1\.safetensors",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    plain, root = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("home") / "comfy"
    pipe = tiny_pipeline("t2v", 0)
    pipe.transformer = tiny_transformer(
        0, num_attention_heads=1, attention_head_dim=128, ffn_dim=256
    )
    pipe.save_pretrained(plain)
    for file in (HIGH, TEXT, VAE, TINY, LORAS[0], "clip_vision/none"):
        (root / file).parent.mkdir(parents=True)
    tensors = transformer_tensors(plain)
    write_safetensors(root / HIGH, "fp8_scaled, legacy", tensors)
    write_gguf(root / LOW, "Q8_0", tensors)
    write_safetensors(
        root / TEXT, "fp8_scaled, legacy", umt5_tensors(plain),
        chosen=lambda name, _: "SelfAttention.q" in name,
    )  # fmt: skip
    save_file(with_tokenizer(load_file(root / TEXT), make_spiece()), root / TEXT)
    save_file(vae_tensors(plain), root / VAE)
    save_file(tiny_vae_tensors("taew2_1"), root / TINY)
    for i, file in enumerate(LORAS):
        torch.manual_seed(i)
        key = "lora_unet_blocks_0_self_attn_q"
        pair = {f"{key}.lora_down.weight": torch.randn(2, 128) * 0.1}
        pair[f"{key}.lora_up.weight"] = torch.randn(128, 2) * 0.1
        save_file({**pair, f"{key}.alpha": torch.tensor(2.0)}, root / file)
    return root


SMALL = ["--size", "32x32", "--frames", "5", "--steps", "4", "--seed", "1", "--device", "cpu"]


def command(root: Path, output: Path, *more: str) -> list[str]:
    return ["generate", "a red circle", "--model", str(root), *SMALL, "-o", str(output), *more]


def with_loras() -> list[str]:
    """By their names alone: they lie in loras/."""
    high, low = (Path(file).name for file in LORAS)
    return ["--lora", f"{high}:1:high", "--lora", f"{low}:0.8:low"]


def test_one_command_in_a_process_of_its_own(parts, tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    output = tmp_path / "out.mp4"
    run = subprocess.run(
        [sys.executable, "-m", "sora_engine", *command(parts, output, *with_loras())],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "sora: " not in run.stderr  # no warning, either
    frames, _ = read_video(output)
    assert frames.shape == (5, 32, 32, 3)


def test_the_adapters_and_the_tiny_decoder_take_part(parts, tmp_path, capsys):
    outputs = {}
    for name, more in {
        "plain": [],
        "adapted": with_loras(),
        "tiny": ["--vae-backend", "tiny"],
        "named": ["--tiny-vae", str(parts / TINY)],
    }.items():
        path = tmp_path / f"{name}.png"
        one = [*command(parts, path, *more)]
        one[one.index("5")] = "1"
        assert main(one) == 0, capsys.readouterr().err
        outputs[name] = read_video(path)[0]
    assert (outputs["plain"] != outputs["adapted"]).any()
    assert (outputs["plain"] != outputs["tiny"]).any()
    assert (outputs["tiny"] == outputs["named"]).all()
    assert (
        main([*command(parts, tmp_path / "o.mp4"), "--tiny-vae", "t", "--vae-backend", "torch"])
        == 2
    )
    assert "decodes with the model's own VAE; give one or the other" in capsys.readouterr().err


def test_adapters_by_name_are_those_of_the_folder(parts, tmp_path, monkeypatch):
    high, name = parts / LORAS[0], Path(LORAS[0]).name
    for model in (parts, parts / HIGH):
        found = Common(model=[str(model)], lora=[f"{name}:0.5:high"]).loras()
        assert found == (Lora(str(high), 0.5, "high"),)
    with pytest.raises(UsageError, match=r"none does not exist; .*loras has style_high_noise"):
        Common(model=[str(parts)], lora=["none:0.5"]).loras()
    with pytest.raises(UsageError, match=rf"{name} does not exist$"):
        Common(model=["sprites"], lora=[name]).loras()
    shutil.copy(high, tmp_path / name)  # the current folder goes first
    monkeypatch.chdir(tmp_path)
    assert Common(model=[str(parts)], lora=[name]).loras() == (Lora(name),)


@pytest.fixture
def copy(parts, tmp_path):
    return shutil.copytree(parts, tmp_path / "comfy")


LEFT_OUT = {
    VAE: ([], rf"comfy/vae: no file for the vae in vae/, which {USUAL[HIGH]} lacks"),
    TEXT: ([], r"no file for the text_encoder in text_encoders/, which .* \(on .* --text-encoder"),
    TINY: (["--vae-backend", "tiny"], r"--vae-backend: .* needs a tiny autoencoder .* --tiny-vae"),
    HIGH: ([], r"comfy: no transformer: it has text_encoders, vae, clip_vision, loras, .*/ as Com"),
}


@pytest.mark.parametrize("file", LEFT_OUT)
def test_a_part_that_is_missing_is_named_with_its_usual_name(copy, tmp_path, capsys, file):
    more, says = LEFT_OUT[file]
    (copy / file).unlink()
    if file == HIGH:
        (copy / LOW).unlink()
    assert main(command(copy, tmp_path / "out.mp4", *more)) == 2
    told = capsys.readouterr().err
    assert told.count("sora: ") == 1
    assert told.endswith("\n")
    assert re.search(says, told), told
    assert re.search(f"people hold it as .*{USUAL[file]}", told), told
    # With its whole folder gone, as well.
    shutil.rmtree((copy / file).parent)
    assert main(command(copy, tmp_path / "out.mp4", *more)) == 2
    assert re.search(f"people hold it as .*{USUAL[file]}", capsys.readouterr().err)


@pytest.mark.parametrize(("file", "other"), [(HIGH, "high"), (LOW, "low")])
def test_one_of_two_experts_alone_is_told_of(copy, tmp_path, capsys, file, other):
    (copy / file).unlink()
    one = command(copy, tmp_path / "out.mp4")
    one[one.index("5")] = "1"
    assert main(one) == 0
    told = capsys.readouterr().err
    assert "is one of two experts, by its name, and alone" in told
    assert f"the one for {other} noise goes beside it" in told


def test_two_experts_by_either_option_and_in_order(parts, tmp_path, capsys):
    """--model-2 is a second --model; by their names in the wrong order they are refused."""
    beside = ["--components", str(parts)]
    made = {}
    for name, models in {
        "twice": ["--model", str(parts / HIGH), "--model", str(parts / LOW)],
        "two": ["--model", str(parts / HIGH), "--model-2", str(parts / LOW)],
        "one": ["--model", str(parts / HIGH), "--model", str(parts / VAE)],
    }.items():
        path = tmp_path / f"{name}.png"
        one = ["generate", "a", *models, *beside, *SMALL, "-o", str(path)]
        one[one.index("5")] = "1"
        assert main(one) == (2 if name == "one" else 0), capsys.readouterr().err
        made[name] = read_video(path)[0] if path.exists() else None
    assert (made["twice"] == made["two"]).all()
    capsys.readouterr()
    for models, says in (
        (["--model", LOW, "--model-2", HIGH], "by their names the two experts are low and high"),
        (["--model", HIGH, "--model-2", HIGH], "are high and high noise; the one for high noise"),
        (["--model-2", LOW], "--model-2: it goes beside one --model.*none are given"),
        (["--model", HIGH, "--model", LOW, "--model-2", LOW], "2 are given"),
        (["--model", HIGH, "--model-2", "no.gguf"], "no.gguf does not exist"),
    ):
        paths = [part if part.startswith("--") else str(parts / part) for part in models]
        assert main(["generate", "a", *paths, *beside, *SMALL, "-o", str(tmp_path / "o.mp4")]) == 2
        told = capsys.readouterr().err
        assert re.search(says, told), told


@pytest.mark.parametrize(
    ("file", "what", "use"),
    [
        (TEXT, "UMT5 text encoder, with its tokenizer", "--text-encoder"),
        (VAE, "AutoencoderKLWan with 16 latent channels", "--vae"),
        (TINY, r"tiny autoencoder \(TAEHV\) for 16 latent channels", "--tiny-vae"),
        (LORAS[0], "adapter", "--lora"),
    ],
)
def test_a_part_in_the_place_of_the_model_says_what_it_is(parts, tmp_path, capsys, file, what, use):
    assert main(command(parts / file, tmp_path / "out.mp4")) == 2
    told = capsys.readouterr().err
    found = f"no transformer but {what}: give it as .*{use}\\), beside a transformer; people hold"
    assert re.search(found, told), told
