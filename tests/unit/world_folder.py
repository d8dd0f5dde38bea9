"""A tiny random world in a folder, as a trained one is: a driven transformer, a VAE, a text
encoder, and how it is played."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from tests.parity.oracles import tiny_text_encoder

BUTTONS = ["up", "down", "left", "right", "act"]
MOVES = {"up": [-8, 0], "down": [8, 0], "left": [0, -8], "right": [0, 8]}
SESSION = {
    "context": 2,
    "recall": 2,
    "num_inference_steps": 2,
    "first_steps": 3,
    "fps": 16,
    "world": [20, 20],
}
WORLD = sora.SessionRequest("a red circle", seed=7)
CONFIG = WanConfig(
    num_attention_heads=2,
    attention_head_dim=20,
    in_channels=16,
    out_channels=16,
    text_dim=32,
    freq_dim=16,
    ffn_dim=48,
    num_layers=2,
    action_dim=5,
    rope_pairs=(2, 2, 2, 2, 2),
    rope_theta=20.0,
)


def save_world(folder: Path, seed: int = 0, session: dict[str, Any] | None = None) -> Path:
    """Write it; frames are 32x32 pixels, latents 4x4."""
    text_encoder, tokenizer = tiny_text_encoder(seed)
    text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    vae.save_pretrained(folder / "vae")
    model = WanTransformer(CONFIG, text_tokens=16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "scale_shift_table" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 1.2 / math.sqrt(parameter[0].numel()))
    transformer = folder / "transformer"
    transformer.mkdir()
    save_file(model.state_dict(), transformer / "diffusion_pytorch_model.safetensors")
    say(transformer / "config.json", CONFIG.to_dict())
    say(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "shift": 1.0,
            "stochastic_sampling": True,
        },
    )
    say(
        folder / "model_index.json",
        {
            "_class_name": "WanPipeline",
            "expand_timesteps": True,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "WanWorldTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
    )
    say(
        folder / "generation_config.json",
        {
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "fps": 16,
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            "text_tokens": 16,
            "actions": {"buttons": BUTTONS, "axes": [], "moves": MOVES},
            "session": {**SESSION, **(session or {})},
        },
    )
    return folder


def say(path: Path, values: dict[str, Any]) -> None:
    """JSON in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def played(world: sora.Session, text: str) -> list[np.ndarray]:
    """The frames of actions, a step each."""
    return [world.step(action) for action in world.actions.parse(text)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether they are the same bytes."""
    assert len(one) == len(other) > 0
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def latents(world: sora.Session) -> torch.Tensor:
    """The latent frame that a session made last."""
    return world._standing.context[-1].latent
