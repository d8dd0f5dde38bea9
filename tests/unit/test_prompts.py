"""What is read of a prompt, and what None and "" mean for the negative one."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.cli import main
from sora_engine.config import Limits
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid, resolve_request
from tests.faults.engines import engine

SMALL = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 2, "seed": 1}
LONG = "a red circle moves right " * 150


def test_a_prompt_that_is_cut_is_told_by_log_job_and_receipt(caplog):
    caplog.set_level(logging.WARNING)
    with engine() as made:
        encoder = made.loaded_model.prompt_encoder
        tokens = encoder.encoders["text"].count(LONG, whole=True)
        assert tokens > 512 == encoder.count(LONG)
        job = made.submit(sora.VideoRequest(LONG, **SMALL))
        video = job.result(300)
        (line,) = job.cut_prompts
        assert f"it has {tokens} tokens, and the encoder 'text' reads 512" in line
        assert "\n" not in line
        assert video.receipt.cut_prompts == [line]
        assert video.receipt.to_dict()["cut_prompts"] == [line]
        assert caplog.messages.count(line) == 1


def test_each_of_several_texts_is_told_once():
    shots = [sora.Shot(LONG, 5), sora.Shot("a blue star", 4), sora.Shot(LONG + "up", 4)]
    values = {**SMALL, "num_frames": 13}
    with engine() as made:
        request = sora.VideoRequest("", shots=shots, negative_prompt=LONG, **values)
        assert len(made.generate(request).receipt.cut_prompts) == 2


def test_what_fits_is_not_told_to_the_last_token():
    with engine() as made:
        encoder = made.loaded_model.prompt_encoder.encoders["text"]
        fits = "a " * (512 - encoder.count("a ", whole=True))
        while encoder.count(fits, whole=True) < 512:
            fits += "a "
        assert encoder.count(fits, whole=True) == 512
        assert made.generate(sora.VideoRequest(fits, **SMALL)).receipt.cut_prompts == []
        over = made.generate(sora.VideoRequest(fits + "a a", **SMALL))
        assert len(over.receipt.cut_prompts) == 1


def test_a_resumed_job_tells_too(tmp_path):
    with engine() as made:
        kept = tmp_path / "job.safetensors"
        whole = made.submit(sora.VideoRequest(LONG, **SMALL), save_to=kept).result(300)
        again = made.resume(kept).result(300)
        assert again.receipt.cut_prompts == whole.receipt.cut_prompts
        assert torch.equal(again.latents, whole.latents)


def test_the_command_warns_in_one_line(tmp_path, capsys):
    size = ["--size", "16x16", "--frames", "1", "--steps", "1", "--seed", "1"]
    assert main(["generate", LONG, *size, "-o", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().err
    assert said.startswith("sora: warning: the prompt 'a red circle")
    assert said.count("\n") == 1
    assert main(["generate", "a red circle", *size, "-o", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().err == ""


class Facts:
    """A checkpoint with a negative prompt of its own."""

    grid = LatentGrid(channels=4, vae_spatial=8, patch=(1, 2, 2), time=4)
    known_mode = KnownMode.REPLACEMENT
    labels = None
    defaults = GenerationDefaults(
        height=16,
        width=16,
        num_frames=1,
        fps=8.0,
        num_inference_steps=2,
        guidance_scale=5.0,
        negative_prompt="blurry",
    )


@pytest.mark.parametrize(("given", "meant"), [(None, "blurry"), ("", ""), ("dull", "dull")])
def test_none_is_the_checkpoints_negative_prompt_and_empty_is_none(given, meant):
    request = sora.VideoRequest("a cat", negative_prompt=given)
    assert resolve_request(request, Facts(), Limits()).negative_prompt == meant
    assert (
        resolve_request(sora.VideoRequest("a cat"), Facts(), Limits()).negative_prompt == "blurry"
    )
    with pytest.raises(sora.RequestError, match="negative_prompt must be a string, got int"):
        resolve_request(sora.VideoRequest("a cat", negative_prompt=3), Facts(), Limits())


@pytest.mark.parametrize(("options", "meant"), [([], None), (["--negative-prompt", ""], "")])
def test_the_option_says_the_same(options, meant, monkeypatch, tmp_path):
    seen = []

    def stop(_self, request):
        seen.append(request.negative_prompt)
        raise sora.RequestError("stop here")

    monkeypatch.setattr(sora.Engine, "resolve", stop)
    monkeypatch.setattr("sora_engine.cli.work.load_engine", lambda _common: engine())
    assert main(["generate", "a cat", *options, "-o", str(tmp_path / "a.mp4")]) == 2
    assert seen == [meant]


def test_every_field_of_a_request_may_be_none_where_its_default_is():
    """What the class promises: None stands for the checkpoint's own default."""
    import dataclasses

    for field in dataclasses.fields(sora.VideoRequest):
        if field.default is None:
            request = sora.VideoRequest("a cat", **{field.name: None})
            resolve_request(request, Facts(), Limits())


def test_no_negative_prompt_is_the_same_as_the_bundled_checkpoints():
    """Which has none: what "" gave before it gives now."""
    with engine() as made:
        videos = [
            made.generate(sora.VideoRequest("a red circle", negative_prompt=text, **SMALL))
            for text in (None, "")
        ]
    assert torch.equal(videos[0].latents, videos[1].latents)
    assert np.array_equal(videos[0].frames, videos[1].frames)
