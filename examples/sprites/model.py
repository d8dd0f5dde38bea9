"""The text encoder and the transformer as one module, their plain sampler and their export."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import torch
import world
from clips import ANCHORS, SHIFT
from encoder import TEXT_DIM, encode, new_text_encoder
from safetensors.torch import load_file, save_file
from text import new_tokenizer
from torch import Tensor, nn

from sora_engine.denoise.conditioning import Context
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer

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
)
SETTINGS = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "fps": 8,
    "num_inference_steps": 40,
    "solver": "renoise",  # corrects on its way what the last step got wrong
    "guidance_scale": 2.5,
    "max_window": 5,
    "window_schedule": "chained",
    "window_overlap": 3,  # what bounces is told from its way over 12 frames better than over 8
    "window_anchors": ANCHORS,
    "text_tokens": 512,
}


class Sprites(nn.Module):
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
        self.transformer = WanTransformer(CONFIG, backend="reference")
        for name, param in self.transformer.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(param)
            elif param.ndim == 2 and "to_out" not in name and "net.2" not in name:
                nn.init.xavier_uniform_(param)
        nn.init.zeros_(self.transformer.proj_out.weight)
        self._look_at_words()

    @torch.no_grad()
    def _look_at_words(self) -> None:
        """Start cross-attention where it looks at a text's words rather than at its padding.

        Wan pads every text to 512 tokens and masks none: a start that looks at all alike sees a
        caption of 12 words as through 40 panes of glass. Here padding has a key of zero, and the
        queries' bias is what all words' keys have in common.
        """
        rng = random.Random(0)
        captions = [world.sample_scene(rng, 64, 64).caption(rng) for _ in range(32)]
        words = torch.cat(encode(self.text, self.tokenizer, captions)).to(self.transformer.dtype)
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
        packer: Packer,
        latents: list[Tensor],
        levels: list[Tensor],
        contexts: list[Context],
        anchors: list[int] | None = None,
    ) -> Tensor:
        """x0 of noisy `latents` (`[24, t, h, w]` each), as tokens `[N, 96]`, channel last.

        anchors: how many of the first latents of each are anchors.
        """
        dtype = self.transformer.dtype
        segments = [
            Segment(x.to(dtype), s * 1000.0, ((context, len(s)),), num_anchors=seen)
            for x, s, context, seen in zip(
                latents, levels, contexts, anchors or [0] * len(latents), strict=True
            )
        ]
        return self.transformer(packer.pack(segments)).float()


def as_targets(latents: Tensor) -> Tensor:
    """`[C, t, h, w]` to what the model emits for it: tokens `[N, 4 * C]`, channel last."""
    C, t, h, w = latents.shape
    return latents.reshape(C, t, h // 2, 2, w // 2, 2).permute(1, 2, 4, 3, 5, 0).reshape(-1, 4 * C)


@torch.no_grad()
def sample(
    model: Sprites,
    captions: list[str],
    shapes: list[tuple[int, int, int]],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
) -> list[Tensor]:
    """Latents `[24, t, h, w]` by renoising, as by default, in fewer steps: how training goes."""
    weight = model.transformer.proj_out.weight
    packer = Packer((1, 2, 2), weight.device)
    noise = torch.Generator().manual_seed(seed)
    latents = [
        torch.randn(CONFIG.in_channels, *shape, generator=noise).to(weight.device)
        for shape in shapes
    ]
    contexts = model.contexts(captions + [""] * len(captions))
    line = torch.linspace(1, 0, steps + 1)
    sigmas = (SHIFT * line / (1 + (SHIFT - 1) * line)).tolist()
    for here, there in itertools.pairwise(sigmas):
        levels = [torch.full((x.shape[1],), here) for x in latents]
        tokens = model(packer, latents * 2, levels * 2, contexts)
        parts = tokens.split([x[0].numel() // 4 for x in latents] * 2)
        for i, x in enumerate(latents):
            with_text, without = parts[i], parts[len(latents) + i]
            x0 = from_targets(without + guidance * (with_text - without), x.shape)
            fresh = torch.randn(x.shape, generator=noise).to(weight.device)
            latents[i] = (1 - there) * x0 + there * fresh
    return latents


def from_targets(tokens: Tensor, shape: torch.Size) -> Tensor:
    C, t, h, w = shape
    x = tokens.reshape(t, h // 2, w // 2, 2, 2, C)
    return x.permute(5, 0, 1, 3, 2, 4).reshape(C, t, h, w)


def export(weights: dict[str, Tensor], model: Sprites, vae_folder: Path, folder: Path) -> None:
    """Write the whole pipeline as diffusers lays it out, weights in fp16.

    weights: the transformer's, by their names in `model`.
    """
    weights = weights | {f"text.{name}": value for name, value in model.text.state_dict().items()}
    parts = {
        "transformer": (
            {**CONFIG.to_dict(), "_diffusers_version": "0.42.1"},
            "diffusion_pytorch_model",
        ),
        "text_encoder": (None, "model"),
    }
    for part, (config, name) in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        prefix = "text." if part == "text_encoder" else f"{part}."
        tensors = {
            key.removeprefix(prefix): value.half().contiguous().cpu()
            for key, value in weights.items()
            if key.startswith(prefix) and not key.endswith("encoder.embed_tokens.weight")
        }
        save_file(tensors, folder / part / f"{name}.safetensors", {"format": "pt"})
        if config is not None:
            write_json(folder / part / "config.json", config)
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
        "_diffusers_version": "0.42.1",
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
        "_diffusers_version": "0.42.1",
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
