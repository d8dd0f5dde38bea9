"""Embeddings of texts that are kept for later requests: the same bits, within a bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine import Limits, VideoRequest
from sora_engine.text import PromptEncoder
from sora_engine.text.kept_texts import KeptTexts
from tests.parity.oracles import tiny_pipeline

SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    tiny_pipeline("t2v", 0).save_pretrained(path)
    return path


def load(folder, **limits):
    return sora.Engine.from_pretrained(folder, device="cpu", limits=Limits(**limits))


def counted(engine):
    """The texts that the encoder really encodes from now on."""
    encoder = engine.loaded_model.prompt_encoder.encoders["text"]
    seen, encode = [], encoder.encode

    def spy(prompts):
        seen.extend(prompts)
        return encode(prompts)

    encoder.encode = spy
    return seen


def test_a_text_is_encoded_once_and_videos_keep_their_bits(folder):
    requests = [
        VideoRequest("red circle", negative_prompt="blue", seed=1, **SMALL),
        VideoRequest("red circle", negative_prompt="a cat", seed=1, **SMALL),
        VideoRequest(" red   circle ", negative_prompt="blue", seed=1, **SMALL),  # the same ids
        VideoRequest("a cat", negative_prompt="a cat", seed=1, **SMALL),
    ]
    with load(folder) as engine, load(folder, text_cache_bytes=0) as without:
        seen, plain = counted(engine), counted(without)
        found = [engine.generate(request) for request in requests]
        want = [without.generate(request) for request in requests]
        kept = engine.loaded_model.prompt_encoder.kept
        embeddings = engine.loaded_model.prompt_encoder.encode(["red circle", "blue", "a cat"])
        assert kept.nbytes == sum(each["text"].nbytes for each in embeddings)
        assert without.loaded_model.prompt_encoder.kept.nbytes == 0
    assert seen == ["red circle", "blue", "a cat"]
    assert len(plain) == 7
    assert [video.receipt.texts_reused for video in found] == [0, 1, 2, 2]
    assert [video.receipt.texts_reused for video in want] == [0] * 4
    assert found[1].receipt.to_dict()["texts_reused"] == 1
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert np.array_equal(a.frames, b.frames)


def test_the_bound_and_who_goes_first():
    kept = KeptTexts(100)
    for name in "abc":
        kept.put(name, torch.zeros(10))  # 40 bytes
    assert (len(kept), kept.nbytes, kept.get("a")) == (2, 80, None)
    assert kept.get("b") is not None  # used last
    kept.put("d", torch.zeros(5))
    assert kept.nbytes == 100
    kept.put("e", torch.zeros(1))
    assert kept.get("c") is None
    assert kept.get("b") is not None
    kept.put("too large", torch.zeros(26))
    assert kept.get("too large") is None
    assert kept.nbytes == 64  # it pushed nothing out
    kept.give_way(30)
    assert kept.nbytes <= 30
    kept.put("f", torch.zeros(8))  # 32 bytes
    assert kept.get("f") is None
    kept.give_way(1000)
    kept.put("f", torch.zeros(25))
    assert kept.nbytes == 100  # never over the bound


class Labels:
    """An encoder that tells no ids: nothing of it can be kept."""

    model, max_tokens, device = None, 1, torch.device("cpu")

    def encode(self, prompts):
        return [torch.tensor(len(prompt)) for prompt in prompts]


class Words(Labels):
    """One that encodes the first letter alone."""

    def ids(self, prompt):
        return (ord(prompt[0]),)

    def encode(self, prompts):
        return [torch.tensor([ord(prompt[0])]) for prompt in prompts]


def test_encoders_without_ids_are_asked_each_time():
    encoder = PromptEncoder({"words": Words(), "labels": Labels()})
    encoder.kept.bound(1000)
    for _ in range(2):
        first, second = encoder.encode(["ab", "acd"])
        assert (int(first["labels"]), int(second["labels"])) == (2, 3)
        assert first["words"].tolist() == second["words"].tolist() == [97]
        assert encoder.reused == 0
    encoder = PromptEncoder({"words": Words()})
    encoder.kept.bound(1000)
    encoder.encode(["ab", "acd"])
    assert encoder.reused == 0  # both are new to this request
    encoder.encode(["ax", "b"])
    assert encoder.reused == 1


def test_they_give_way_to_jobs(folder):
    """A job whose promise needs all that there is has it, whatever was kept before."""
    large = VideoRequest("a cat", height=64, width=64, num_frames=9, num_inference_steps=1)
    with load(folder) as engine:
        limit = engine.plan(large).peak
    with load(folder, memory_bytes=limit) as engine:
        kept = engine.loaded_model.prompt_encoder.kept
        engine.generate(VideoRequest("red circle moves left", **SMALL))
        before = kept.nbytes
        assert before > 0
        tight = []
        engine.submit(large, on_progress=lambda _: tight.append(kept.nbytes)).result()
        assert set(tight) == {0}
        engine.generate(VideoRequest("red circle moves left", **SMALL))
        assert kept.nbytes > 0


def test_the_limit_of_bytes():
    assert Limits(text_cache_bytes=0).text_cache_bytes == 0
    for value in (-1, True, 1.5, None):
        with pytest.raises(ValueError, match=r"Limits\.text_cache_bytes must be an integer of at"):
            Limits(text_cache_bytes=value)
