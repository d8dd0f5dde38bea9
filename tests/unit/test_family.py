"""A family that the engine has never heard of, registered from outside: labels in place of texts, a
stream of tokens beside the video's, a learned variance, an autoencoder of its own."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import nn

import sora_engine as sora
from sora_engine.denoise.conditioning import Context
from sora_engine.denoise.model import TransformerShape
from sora_engine.errors import CheckpointError
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import Weights
from sora_engine.models.backends import Backends
from sora_engine.models.family import Checkpoint, ExpertSource, TextSource
from sora_engine.models.folder import FolderLayout, ModelFolder
from sora_engine.models.registry import (
    families,
    open_checkpoint,
    register_family,
    unregister_family,
)
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.request.ladders import LADDERS, Ladder
from sora_engine.samplers.noise import initial_noise
from sora_engine.text import register_text_encoder, unregister_text_encoder
from sora_engine.vae import CausalVAE, VAEKind, register_vae, unregister_vae
from sora_engine.vae.registry import vae_kind

WORDS = ["", "red", "blue"]  # the first is the null label
DIM, CHANNELS = 6, 12


class Labels:
    """Prompts are words of a list: a label, and as many tokens as the word has letters."""

    def __init__(self, device: torch.device) -> None:
        self.model, self.max_tokens, self.device = nn.Linear(1, 1), 8, device

    @classmethod
    def from_folders(cls, text_encoder, tokenizer, *, device, dtype, max_tokens):
        assert tokenizer is None
        return cls(device)

    def encode(self, prompts):
        return [torch.tensor(WORDS.index(prompt)) for prompt in prompts]

    def count(self, prompt, *, whole=False):
        return 1

    def activation_bytes(self, num_tokens):
        return 0


class ToyTransformer(DiffusionTransformer):
    """Predicts by one matrix, the pooled label of each token's row, its timestep, and the mean of
    the words that its segment reads."""

    own_parts = ()

    def __init__(self, attention_backend: str) -> None:
        super().__init__()
        self.backends = Backends("auto", attention_backend)
        self.blocks = nn.ModuleList()
        self.mix = nn.Linear(4 * CHANNELS, 2 * 4 * CHANNELS)
        self.labels = nn.Embedding(len(WORDS), DIM)
        self.by_label = nn.Linear(DIM, 2 * 4 * CHANNELS)
        self.by_words = nn.Linear(DIM, 2 * 4 * CHANNELS, bias=False)

    @property
    def shape(self):
        return TransformerShape(
            num_layers=0, num_heads=1, head_dim=DIM, ffn_dim=DIM,
            in_channels=CHANNELS, out_channels=2 * CHANNELS,
        )  # fmt: skip

    @property
    def dtype(self):
        return self.mix.weight.dtype

    def rebuild(self):
        return ToyTransformer(self.backends.attention)

    def example_embedding(self, num_tokens, device):
        return {"label": torch.zeros((), dtype=torch.int64, device=device)}

    def encode_contexts(self, embeddings):
        return [self.read(embedding["label"]) for embedding in embeddings]

    def read(self, label):
        pooled = self.labels(label)
        count = 2 if label.is_meta else max(1, len(WORDS[int(label)]))
        letters = torch.arange(1, count + 1, device=pooled.device)[:, None]
        return Context(tokens={"words": pooled * letters}, pooled=pooled)

    def forward(self, batch):
        video, words = batch.video, batch.streams["words"]
        table = self.by_label(batch.pooled) + batch.timesteps[:, None] / 1000
        out = self.mix(video.tokens) + (table if video.rows is None else table[video.rows])
        texts = words.tokens.split([length for length, _, _ in words.grids])
        read = [
            self.by_words(text.mean(0)).expand(t * h * w, -1)
            for text, (t, h, w) in zip(texts, video.grids, strict=True)
        ]
        return out + torch.cat(read)


class ToyConfig:
    """Every kind of autoencoder's facts; this one folds 2 x 2 pixels into channels."""

    class_name, z_dim, factor_temporal, factor_spatial = "AutoencoderToy", CHANNELS, 1, 2
    latents_mean, latents_std = (0.0,) * CHANNELS, (1.0,) * CHANNELS
    pixel_channels, size_multiple, widest = 3, 2, CHANNELS

    @classmethod
    def from_dict(cls, values, *, path=None):
        return cls()

    def to_dict(self):
        return {"_class_name": self.class_name}


class ToyVAE(CausalVAE):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.encoder, self.decoder = nn.Identity(), nn.Identity()

    def encode_step(self, frames, feat_cache):
        folded = nn.functional.pixel_unshuffle(frames.transpose(1, 2), 2).transpose(1, 2)
        return torch.cat([folded, torch.zeros_like(folded)], dim=1)

    def decode_step(self, raw, feat_cache):
        return nn.functional.pixel_shuffle(raw.transpose(1, 2), 2).transpose(1, 2).clamp(-1, 1)


class ToyFamily:
    name = "toy"
    ladders: ClassVar = {"toy-2": Ladder((1.0, 0.5), "euler", "toy2", "toys in two steps")}
    layout = FolderLayout(
        pipelines=("ToyPipeline",),
        components={
            "transformer": ("ToyTransformer",),
            "vae": ("AutoencoderToy",),
            "text_encoder": ("ToyLabels",),
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        },
    )

    def claims_file(self, shapes):
        return "by_label.weight" in shapes

    def open_files(self, paths, components, settings):
        return self.open_folder(components, settings)

    def open_folder(self, path, settings):
        folder = ModelFolder.open(path, self.layout)
        weights = folder["transformer"].weights_path
        expert = ExpertSource(
            path=weights,
            shape=ToyTransformer("auto").shape,
            num_parameters=1000,
            build=ToyTransformer,
            fill=partial(fill, weights),
        )
        return Checkpoint(
            family=self.name,
            variant="labels",
            path=path,
            experts=(expert,),
            vae=folder["vae"],
            scheduler_config=folder["scheduler"].config,
            grid=LatentGrid(channels=CHANNELS, vae_spatial=2, patch=(1, 2, 2), time=1),
            known_mode=KnownMode.REPLACEMENT,
            defaults=GenerationDefaults(
                height=8, width=12, num_frames=3, fps=4.0, num_inference_steps=4,
                guidance_scale=3.0,
            ),
            text_encoders={
                "label": TextSource(encoder=folder["text_encoder"], tokenizer=None, max_tokens=8)
            },
            learned_variance=True,
        )  # fmt: skip


def fill(path, module, *, device, dtype, shard=None):
    with Weights.open(path) as weights:
        load_into(module, weights, device=device, dtype=dtype, shard=shard)


@pytest.fixture
def folder(tmp_path: Path):
    torch.manual_seed(0)
    parts = {
        "transformer": ({"_class_name": "ToyTransformer"}, ToyTransformer("auto").state_dict()),
        "vae": ({"_class_name": "AutoencoderToy"}, {}),
        "text_encoder": ({"architectures": ["ToyLabels"]}, {"weight": torch.zeros(1)}),
    }
    index = {"_class_name": "ToyPipeline"}
    for name, (config, tensors) in parts.items():
        library = "transformers" if name == "text_encoder" else "diffusers"
        index[name] = [library, config.get("_class_name", "ToyLabels")]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, tmp_path / name / f"{stem}.safetensors")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    family = ToyFamily()
    register_family(family)
    assert "toy-2" in LADDERS
    register_vae("AutoencoderToy", VAEKind(config=ToyConfig, layers=ToyVAE))
    register_text_encoder("ToyLabels", Labels)
    yield tmp_path
    unregister_family(family)
    assert "toy-2" not in LADDERS
    unregister_vae("AutoencoderToy")
    unregister_text_encoder("ToyLabels")


def by_hand(weights: dict, request: sora.VideoRequest, scale: float) -> torch.Tensor:
    """The final latents in float64, a frame's patches as rows, by the model's formulas."""
    model = ToyTransformer("auto").double()
    model.load_state_dict({name: value.double() for name, value in weights.items()})
    noise = initial_noise(request.seed, (CHANNELS, 3, 4, 6)).double()
    x = nn.functional.pixel_unshuffle(noise.transpose(0, 1), 2)  # [T, C * 4, 2, 3]
    x = x.permute(0, 2, 3, 1).reshape(-1, 4 * CHANNELS)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.double().tolist()

    def predicted(word: str, sigma: float) -> torch.Tensor:
        pooled = model.labels(torch.tensor(WORDS.index(word)))
        letters = torch.arange(1, max(1, len(word)) + 1)[:, None]
        words = model.by_words((pooled * letters).mean(0))
        out = model.mix(x) + model.by_label(pooled) + sigma + words
        # The model's tokens are channel last: patch pixels outside, channels and variance inside.
        mean = out.view(-1, 4, 2 * CHANNELS)[..., :CHANNELS]
        return mean.transpose(1, 2).reshape(-1, 4 * CHANNELS)

    for sigma, after in itertools.pairwise(sigmas):
        cond, uncond = predicted(request.prompt, sigma), predicted("", sigma)
        x = x + (after - sigma) * (uncond + scale * (cond - uncond))
    latents = x.view(3, 2, 3, CHANNELS, 2, 2).permute(3, 0, 1, 4, 2, 5)
    return latents.reshape(CHANNELS, 3, 4, 6)


@torch.no_grad()
def test_a_family_from_outside_makes_videos(folder):
    limits = sora.Limits(pack_tokens=1000)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=limits) as engine:
        model = engine.loaded_model
        weights = model.transformer(0).state_dict()
        assert model.family == "toy"
        requests = [
            sora.VideoRequest("red", seed=3),
            sora.VideoRequest("blue", seed=4),  # another label, a longer word, in one batch
        ]
        alone = engine.generate(requests[0])
        videos = engine.generate(requests)
        assert videos[0].receipt.most_in_company == 2
        for request, video in zip(requests, videos, strict=True):
            expected = by_hand(weights, request, 3.0)
            error = (video.latents.double() - expected).abs().max() / expected.abs().max()
            assert error < 1e-5
            pixels = nn.functional.pixel_shuffle(expected.transpose(0, 1), 2).clamp(-1, 1)
            frames = (pixels.permute(0, 2, 3, 1) / 2 + 0.5).mul(255).round()
            assert (torch.from_numpy(video.frames).double() - frames).abs().max() <= 1
        assert (alone.latents - videos[0].latents).abs().max() < 1e-5 * alone.latents.abs().max()
        assert not torch.equal(videos[0].latents, videos[1].latents)
        # A start video goes through the family's own encoder.
        edited = engine.generate(sora.VideoRequest("red", seed=3, init=alone, strength=0.5))
        assert edited.frames.shape == alone.frames.shape


def test_what_a_family_brings_is_its_alone(folder):
    with pytest.raises(ValueError, match=r"ToyPipeline.* belong to the family 'toy'"):
        register_family(type("Other", (ToyFamily,), {"name": "other"})())
    with pytest.raises(ValueError, match="the name 'toy' belong"):
        register_family(type("Other", (ToyFamily,), {"layout": FolderLayout(
            pipelines=("OtherPipeline",), components={})})())  # fmt: skip
    checkpoint, name = open_checkpoint(folder)
    assert (checkpoint.family, checkpoint.variant, name) == ("toy", "labels", folder.name)
    claimed = [family.claims_file({"by_label.weight": (1, 1)}) for family in families()]
    assert claimed == [*[False] * (len(claimed) - 1), True]


def test_the_class_of_an_autoencoder_has_one_kind(folder):
    toy = VAEKind(config=ToyConfig, layers=ToyVAE)
    for taken in ("AutoencoderToy", "AutoencoderKLWan"):
        with pytest.raises(ValueError, match=f"the class '{taken}' has its kind already"):
            register_vae(taken, toy)
    unregister_vae("AutoencoderToy")
    with pytest.raises(CheckpointError, match="the vae's class is 'AutoencoderToy'"):
        vae_kind("AutoencoderToy")
    register_vae("AutoencoderToy", toy)
    assert vae_kind("AutoencoderToy") is toy
    assert vae_kind("AutoencoderKLWan") is not toy


@pytest.mark.usefixtures("folder")
def test_the_class_of_a_text_encoder_has_one_kind():
    for taken in ("ToyLabels", "UMT5EncoderModel"):
        with pytest.raises(ValueError, match=f"the class '{taken}' has its kind already"):
            register_text_encoder(taken, Labels)


def test_what_no_family_claims_is_told_with_what_is_known(folder, tmp_path):
    stranger = tmp_path / "stranger.safetensors"
    save_file({"unet.conv_in.weight": torch.zeros(2, 2)}, stranger)
    with pytest.raises(CheckpointError, match=r"1 tensors such as unet.conv_in.weight; known are"):
        open_checkpoint(stranger, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "SomePipeline"}))
    with pytest.raises(CheckpointError, match=r"'SomePipeline'; supported: .*ToyPipeline"):
        open_checkpoint(folder)
