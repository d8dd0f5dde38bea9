"""The text encoder and the transformer as one module, and their export.

It trains on clips laid out as [recalled][clean][noised]: a noised latent frame sees what is
recalled, the `CONTEXT` clean ones before it, and itself. So `NEW` frames learn in one pass, each as
a session makes it: from a past that is clean and given.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.meadow import world
from examples.meadow.text import new_tokenizer
from examples.sprites.encoder import TEXT_DIM, encode, new_text_encoder
from sora_engine.denoise.conditioning import Context
from sora_engine.denoise.packing import ANCHOR_GAP, VIDEO, PackedBatch, Stream, lay_out, patchify
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer

RECALLED, CONTEXT, NEW = 3, 4, 6
"""Latent frames of a training clip: those recalled, those just before, and those to be made."""
CLEAN = CONTEXT + NEW - 1
FRAMES = RECALLED + CLEAN + NEW
GRID = world.SIDE // 16
"""Tokens of a side of a latent frame, each of two latents a side."""
SHIFT = 1.5
CONFIG = WanConfig(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=48,
    in_channels=24,
    out_channels=24,
    text_dim=TEXT_DIM,
    freq_dim=256,
    ffn_dim=768,
    num_layers=6,
    action_dim=len(world.BUTTONS),
    rope_pairs=(4, 5, 5, 5, 5),
    rope_theta=16.0,
)
SETTINGS = {
    "height": world.SIDE,
    "width": world.SIDE,
    "num_frames": 1,
    "fps": 16,
    "num_inference_steps": 4,
    "solver": "renoise",
    "guidance_scale": 1.0,
    "text_tokens": 24,
    "actions": {
        "buttons": list(world.BUTTONS),
        "axes": [],
        "moves": {
            way: [down * world.TILE, right * world.TILE]
            for way, (down, right) in world.STEPS.items()
        },
    },
    "session": {
        "context": CONTEXT,
        "recall": RECALLED,
        "num_inference_steps": 4,
        "first_steps": 16,
        "fps": 16,
        "world": [world.MAP, world.MAP],
    },
}


def clip_sight() -> Tensor:
    """Bool `[FRAMES, FRAMES]`, who sees whom in a training clip: as in a session (see
    `sora_engine.denoise.drive.sight`), what is past itself alone."""
    sees = torch.eye(FRAMES, dtype=torch.bool)
    for i in range(NEW):
        here = RECALLED + CLEAN + i
        sees[here, :RECALLED] = True
        sees[here, RECALLED + i : RECALLED + i + CONTEXT] = True
    return sees


def clip_times() -> Tensor:
    """Int64 `[FRAMES]`: the places in time that a session gives to what it recalls, to its context
    and to the new frame."""
    later = RECALLED + ANCHOR_GAP
    clean = later + torch.arange(CLEAN)
    noised = later + CONTEXT + torch.arange(NEW)
    return torch.cat([torch.arange(RECALLED), clean, noised])


class Meadow(nn.Module):
    """The transformer, which is trained, and the text encoder, which was trained before it.

    text: folder with the text encoder's `model.safetensors`; None leaves it as it starts.
    """

    def __init__(self, text: Path | None = None) -> None:
        super().__init__()
        self.tokenizer = new_tokenizer()
        self.text = new_text_encoder(self.tokenizer).requires_grad_(False)
        if text is not None:
            weights = {k: v.float() for k, v in load_file(text / "model.safetensors").items()}
            weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
            self.text.load_state_dict(weights)
        self.states: dict[str, Tensor] = {}
        torch.manual_seed(2)
        self.transformer = WanTransformer(
            CONFIG, text_tokens=SETTINGS["text_tokens"], backend="reference"
        )
        for name, param in self.transformer.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(param)
            elif param.ndim == 2 and "to_out" not in name and "net.2" not in name:
                nn.init.xavier_uniform_(param)
        for layer in (
            self.transformer.proj_out,
            self.transformer.condition_embedder.action_embedder.linear_2,
        ):
            nn.init.zeros_(layer.weight)
        self.look_at_words()

    @torch.no_grad()
    def look_at_words(self) -> None:
        """Start cross-attention where it looks at a text's words rather than at its padding: that
        has a key of zero here, and the queries' bias is what all words' keys have in common."""
        rng = random.Random(0)
        captions = [world.some_look(rng).caption() for _ in range(32)]
        words = torch.cat(encode(self.text, self.tokenizer, captions))
        embedded = self.transformer.condition_embedder.text_embedder(words)
        for block in self.transformer.blocks:
            keys = block.attn2.to_k(embedded)
            common = (keys / keys.pow(2).mean(dim=1, keepdim=True).sqrt()).mean(dim=0)
            block.attn2.to_q.bias.copy_(3 * common / common.pow(2).mean().sqrt())
            block.attn2.norm_q.weight.fill_(1.3)
            block.attn2.norm_k.weight.fill_(1.3)

    def contexts(self, captions: list[str]) -> list[Context]:
        unique = sorted(set(captions))
        fresh = [caption for caption in unique if caption not in self.states]
        if fresh:
            with torch.no_grad():
                states = encode(self.text, self.tokenizer, fresh)
            self.states |= dict(zip(fresh, states, strict=True))
        encoded = self.transformer.encode_contexts(
            [{"text": self.states[caption]} for caption in unique]
        )
        done = dict(zip(unique, encoded, strict=True))
        return [done[caption] for caption in captions]

    def forward(
        self,
        latents: Tensor,
        levels: Tensor,
        actions: Tensor,
        places: Tensor,
        sees: Tensor,
        captions: list[str],
    ) -> Tensor:
        """x0 of the clips' new frames, as tokens `[B, NEW, tokens, 96]`, channel last.

        latents: `[B, FRAMES, 24, h, w]`; levels: `[B, FRAMES]` in [0, 1]; actions: `[B, FRAMES,
        5]`; places: `[B, FRAMES, 2]`; sees: bool `[B, FRAMES, FRAMES]`.
        """
        B, tokens = len(latents), GRID * GRID
        grids = [(FRAMES, GRID, GRID)] * B
        device = latents.device
        spans = [((context, FRAMES),) for context in self.contexts(captions)]
        layout = lay_out(grids, spans, [0] * B, (1, 2, 2), device)
        coords = layout.coords.clone()
        coords[:, 0] = clip_times().to(device).repeat_interleave(tokens).repeat(B)
        seen = sees.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)[:, None]

        def attend(q: Tensor, k: Tensor, v: Tensor, _: Stream, *, backend: str) -> Tensor:
            parts = (x.unflatten(0, (B, FRAMES * tokens)).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*parts, attn_mask=seen)
            return out.transpose(1, 2).flatten(0, 1)

        stream = Stream(
            tokens=patchify(latents.flatten(0, 1).transpose(0, 1), (1, 2, 2)),
            rows=torch.arange(B * FRAMES, device=device).repeat_interleave(tokens),
            coords=coords,
            cu_seqlens=layout.cu_seqlens,
            max_seqlen=layout.max_seqlen,
            grids=layout.grids,
            attend=attend,
            places=places.flatten(0, 1).repeat_interleave(tokens, 0),
        )
        batch = PackedBatch(
            {VIDEO: stream},
            timesteps=levels.flatten() * 1000.0,
            contexts=layout.contexts,
            layout=replace(layout, coords=coords),
            actions=actions.flatten(0, 1),
        )
        out = self.transformer(batch).unflatten(0, (B, FRAMES, tokens))
        return out[:, -NEW:]


def as_targets(latents: Tensor) -> Tensor:
    """`[B, F, C, h, w]` to what the model emits for it: tokens `[B, F, h w / 4, 4 C]`."""
    B, frames, C, h, w = latents.shape
    x = latents.reshape(B, frames, C, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 4, 6, 2)
    return x.reshape(B, frames, h * w // 4, 4 * C)


def from_targets(tokens: Tensor) -> Tensor:
    """The inverse of `as_targets`."""
    B, frames, _, values = tokens.shape
    C = values // 4
    x = tokens.reshape(B, frames, GRID, GRID, 2, 2, C).permute(0, 1, 6, 2, 4, 3, 5)
    return x.reshape(B, frames, C, 2 * GRID, 2 * GRID)


def export(weights: dict[str, Tensor], model: Meadow, vae_folder: Path, folder: Path) -> None:
    """Write the whole pipeline as diffusers lays it out, weights in fp16.

    weights: the transformer's, by their names in `model`.
    """
    weights = weights | {f"text.{name}": value for name, value in model.text.state_dict().items()}
    for part, file in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        prefix = "text." if part == "text_encoder" else f"{part}."
        tensors = {
            key.removeprefix(prefix): value.half().contiguous().cpu()
            for key, value in weights.items()
            if key.startswith(prefix) and not key.endswith("encoder.embed_tokens.weight")
        }
        save_file(tensors, folder / part / f"{file}.safetensors", {"format": "pt"})
    version = {"_diffusers_version": "0.42.1"}
    write_json(folder / "transformer" / "config.json", {**CONFIG.to_dict(), **version})
    names = (
        "model_type vocab_size d_model d_kv d_ff num_layers num_heads dropout_rate "
        "relative_attention_num_buckets relative_attention_max_distance feed_forward_proj "
        "layer_norm_epsilon is_encoder_decoder pad_token_id eos_token_id"
    )
    config = {"architectures": ["UMT5EncoderModel"], "dtype": "float16"}
    config |= {name: getattr(model.text.config, name) for name in names.split()}
    write_json(folder / "text_encoder" / "config.json", config)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "vae").mkdir(exist_ok=True)
    for file in vae_folder.iterdir():
        (folder / "vae" / file.name).write_bytes(file.read_bytes())
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        **version,
        "num_train_timesteps": 1000,
        "prediction_type": "sample",
        "use_flow_sigmas": True,
        "flow_shift": SHIFT,
        "solver_order": 2,
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "WanPipeline",
        **version,
        "boundary_ratio": None,
        "expand_timesteps": True,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / "generation_config.json", SETTINGS)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
