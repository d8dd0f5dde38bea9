"""Fun-Control-Camera checkpoints with tiny sharpened random weights, and three models of each.

The engine reads a file under the published names. Two others stand against it, both within
diffusers' `WanImageToVideoPipeline`, which brings prompts, pictures, autoencoder and solver:

- `Reading`: diffusers' transformer, with what the camera adds put behind its embedding of patches,
  and the kind's own channels before it. Rays and adapter are written out here.
- `Published`: the classes of DiffSynth-Studio (PyPI `diffsynth`, and `einops`), where those are
  installed: `pip install --no-deps diffsynth einops`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from sora_engine.models.wan.names import to_wan_name
from tests.parity.oracles import tiny_text_encoder, tiny_transformer, tiny_vae

DIM = 24
IMAGE_WIDTH, IMAGE_TOKENS = 20, 257
KINDS = ("2.1", "a14b", "5b")
"""Of Wan 2.1 Fun-V1.1, and of 2.2 Fun with two experts and with one."""


@dataclass
class Tiny:
    """A checkpoint: its diffusers pipeline, its files, and the weights of its adapters.

    files: of each expert; parts: what the engine needs beside them.
    """

    kind: str
    pipe: DiffusionPipeline
    files: list[Path]
    parts: dict[str, Path]
    adapters: list[dict[str, Tensor]]

    @property
    def fold(self) -> int:
        return 16 if self.kind == "5b" else 8


def tiny_camera(kind: str, folder: Path, seed: int = 0) -> Tiny:
    """A checkpoint of a kind, its files in a folder."""
    text_encoder, tokenizer = tiny_text_encoder(seed)
    shape: dict[str, object] = {"in_channels": 36}
    image: dict[str, Any] = {"image_encoder": None, "image_processor": None}
    if kind == "2.1":
        shape = {"in_channels": 32, "image_dim": IMAGE_WIDTH, "added_kv_proj_dim": DIM}
        torch.manual_seed(seed)
        clip = CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=2, image_size=224, patch_size=14, projection_dim=8,
        )  # fmt: skip
        image = {
            "image_encoder": CLIPVisionModel(clip).eval(),
            "image_processor": CLIPImageProcessor(crop_size=224, size=224),
        }
    elif kind == "5b":
        shape = {"in_channels": 100, "out_channels": 48}
    transformers = [tiny_transformer(seed + 100 * i, **shape) for i in range(1 + (kind == "a14b"))]
    pipe = WanImageToVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        vae=tiny_vae(seed, residual=kind == "5b"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformers[0],
        transformer_2=transformers[1] if kind == "a14b" else None,
        boundary_ratio=0.9 if kind == "a14b" else None,
        expand_timesteps=kind == "5b",
        **image,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    names = ["vae", "text_encoder", "tokenizer"]
    names += ["image_encoder", "image_processor"] if kind == "2.1" else []
    tiny = Tiny(kind, pipe, [], {name: folder / name for name in names}, [])
    for i, transformer in enumerate(transformers):
        adapter = random_adapter(tiny.fold, seed + i)
        weights = {to_wan_name(n): v for n, v in transformer.state_dict().items()}
        weights |= {f"control_adapter.{n}": v for n, v in adapter.items()}
        at = folder / "published" / ("high_noise_model", "low_noise_model")[i]
        at.mkdir(parents=True)
        path = at / "diffusion_pytorch_model.safetensors"
        save_file({n: v.contiguous() for n, v in weights.items()}, path)
        (at / "config.json").write_text(json.dumps({"dim": DIM, "num_heads": 2}))
        tiny.files.append(path)
        tiny.adapters.append(adapter)
    return tiny


def random_adapter(fold: int, seed: int) -> dict[str, Tensor]:
    """Weights under the published names, large enough to count."""
    generator = torch.Generator().manual_seed(seed + 7)

    def drawn(*shape: int) -> Tensor:
        size = 1.5 / (np.prod(shape[1:]) ** 0.5) if len(shape) > 1 else 0.1
        return torch.randn(shape, generator=generator) * float(size)

    adapter = {"conv.weight": drawn(DIM, 24 * fold**2, 2, 2), "conv.bias": drawn(DIM)}
    for name in ("conv1", "conv2"):
        adapter[f"residual_blocks.0.{name}.weight"] = drawn(DIM, DIM, 3, 3)
        adapter[f"residual_blocks.0.{name}.bias"] = drawn(DIM)
    return adapter


def rays_of_pose(pose: np.ndarray, first: np.ndarray, height: int, width: int) -> np.ndarray:
    """Moments and directions (fp64) `[height, width, 6]`: pinhole geometry, written out.

    pose, first: 19 numbers of a frame, as files have them.
    """
    fx, fy, cx, cy = pose[1:5]
    # The lens is told for a picture of 16:9: another shape is cut out of one that covers it.
    focal_x, focal_y = fx * width, fy * width * 9 / 16
    if width / height < 16 / 9:
        focal_x, focal_y = fx * height * 16 / 9, fy * height
    row, column = np.mgrid[:height, :width] + 0.5
    x, y = (column - cx * width) / focal_x, (row - cy * height) / focal_y
    seen = np.stack([x, y, np.ones_like(x)], axis=-1)
    seen /= np.sqrt((seen**2).sum(-1, keepdims=True))
    there, begun = pose[7:].reshape(3, 4), first[7:].reshape(3, 4)
    back = np.linalg.inv(there[:, :3])
    turn = begun[:, :3] @ back
    centre = begun[:, 3] - turn @ there[:, 3]
    direction = seen @ turn.T
    return np.concatenate([np.cross(centre, direction), direction], axis=-1)


def rays(poses: np.ndarray, latent_frame: int, height: int, width: int) -> Tensor:
    """float64 `[24, height, width]`: of each coordinate the four frames of a latent one."""
    frames = range(4 * latent_frame - 3, 4 * latent_frame + 1) if latent_frame else [0] * 4
    of_frames = [rays_of_pose(poses[i], poses[0], height, width) for i in frames]
    seen = np.stack(of_frames)  # 4, height, width, 6
    return torch.from_numpy(seen.transpose(3, 0, 1, 2).reshape(24, height, width))


def adapted(weights: dict[str, Tensor], seen: Tensor, fold: int) -> Tensor:
    """`[24, height, width]` to `[dim, h, w]`, in fp64, as the adapter's description has it."""
    w = {name: value.double() for name, value in weights.items()}
    c, height, width = seen.shape
    folded = seen.reshape(c, height // fold, fold, width // fold, fold).permute(0, 2, 4, 1, 3)
    x = F.conv2d(folded.flatten(0, 2)[None], w["conv.weight"], w["conv.bias"], stride=2)
    own = "residual_blocks.0.conv"
    inner = F.conv2d(x, w[f"{own}1.weight"], w[f"{own}1.bias"], padding=1).clamp(min=0)
    return (F.conv2d(inner, w[f"{own}2.weight"], w[f"{own}2.bias"], padding=1) + x)[0]


def kinds_channels(tiny: Tiny, image: Any, height: int, width: int, frames: int):
    """What the pipeline's input becomes before the embedding of patches, for each kind."""
    pipe = tiny.pipe

    def a14b(x: Tensor) -> Tensor:
        return x

    def first_frame(x: Tensor) -> Tensor:  # 16, a mask of 4, and 16 known
        known = torch.zeros_like(x[:, 20:])
        known[:, :, :1] = x[:, 20:, :1]
        return torch.cat([x[:, :16], known], dim=1)

    if tiny.kind != "5b":
        return a14b if tiny.kind == "a14b" else first_frame
    picture = pipe.video_processor.preprocess(image, height=height, width=width)[:, :, None]
    video = torch.cat([picture, torch.zeros(1, 3, frames - 1, height, width)], dim=2)
    with torch.no_grad():
        known = pipe.vae.encode(video).latent_dist.mode()
    config = pipe.vae.config
    mean, std = (
        torch.tensor(v)[:, None, None, None] for v in (config.latents_mean, config.latents_std)
    )
    known = (known - mean) / std
    mask = torch.zeros(1, 4, *known.shape[2:])
    mask[:, :, 0] = 1

    def with_mask(x: Tensor) -> Tensor:
        return torch.cat([x, mask, known], dim=1)

    return with_mask


class Reading:
    """While it lasts, the pipeline's transformers read the camera: diffusers' own, by hooks."""

    def __init__(self, tiny: Tiny, poses: np.ndarray | None, image, height, width, frames) -> None:
        self.tiny, self.poses, self.size = tiny, poses, (height, width, frames)
        self.before = kinds_channels(tiny, image, height, width, frames)

    def __enter__(self) -> None:
        height, width, frames = self.size
        pipe, self.hooks = self.tiny.pipe, []
        own = [t for t in (pipe.transformer, pipe.transformer_2) if t is not None]
        seen = []
        if self.poses is not None:
            count = (frames - 1) // 4 + 1
            seen = [rays(self.poses, i, height, width) for i in range(count)]
        for transformer, weights in zip(own, self.tiny.adapters, strict=True):
            patches = transformer.patch_embedding
            self.hooks.append(
                patches.register_forward_pre_hook(lambda _, args: (self.before(args[0]),))
            )
            if seen:
                added = torch.stack([adapted(weights, s, self.tiny.fold) for s in seen], dim=1)
                self.hooks.append(
                    patches.register_forward_hook(
                        lambda _m, _a, out, added=added: out + added.to(out)[None]
                    )
                )

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def diffsynth() -> Any:
    """DiffSynth's classes of Wan, by themselves: its package brings far more than they need. None
    where it, or einops, is not installed."""
    found = importlib.util.find_spec("diffsynth")
    if found is None or importlib.util.find_spec("einops") is None:
        return None
    (root,) = found.submodule_search_locations
    names = ("diffsynth", "diffsynth.core", "diffsynth.models")
    before = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            package = types.ModuleType(name)
            package.__path__ = [str(Path(root, *name.split(".")[1:]))]
            sys.modules[name] = package
        return importlib.import_module("diffsynth.models.wan_video_dit")
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


class Published(nn.Module):
    """A transformer of DiffSynth's classes, called as diffusers' pipeline calls its own.

    rays: `[1, 24, T, height, width]`, by its own functions.
    """

    def __init__(
        self, tiny: Tiny, expert: int, weights: dict[str, Tensor], rays: Tensor | None, before
    ):
        super().__init__()
        wan, own = diffsynth(), (tiny.pipe.transformer, tiny.pipe.transformer_2)[expert]
        self.config, self.rays, self.before = own.config, rays, before
        self.wan, image = wan, tiny.kind == "2.1"
        model = wan.WanModel(
            dim=DIM, in_dim=own.config.in_channels, ffn_dim=own.config.ffn_dim,
            out_dim=own.config.out_channels, text_dim=32, freq_dim=256, eps=1e-6,
            patch_size=(1, 2, 2), num_heads=2, num_layers=2, has_image_input=image,
            add_control_adapter=True,
        )  # fmt: skip
        if image:
            model.img_emb = wan.MLP(IMAGE_WIDTH, DIM)
        if tiny.fold != 8:  # VideoX-Fun's class has it as an argument
            model.control_adapter.pixel_unshuffle = nn.PixelUnshuffle(tiny.fold)
            model.control_adapter.conv = nn.Conv2d(24 * tiny.fold**2, DIM, 2, 2)
        model.load_state_dict(weights)
        self.model = model.eval()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def cache_context(self, _name: str):
        return contextlib.nullcontext()

    @torch.no_grad()
    def forward(
        self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=None, **_
    ):
        dit, wan = self.model, self.wan
        levels = wan.sinusoidal_embedding_1d(dit.freq_dim, timestep.flatten().float())
        if timestep.dim() == 2:  # of each token
            levels = levels.unflatten(0, timestep.shape)
        t = dit.time_embedding(levels)
        t_mod = dit.time_projection(t).unflatten(-1, (6, dit.dim))
        context = dit.text_embedding(encoder_hidden_states)
        if encoder_hidden_states_image is not None:
            context = torch.cat([dit.img_emb(encoder_hidden_states_image), context], dim=1)
        x = dit.patchify(self.before(hidden_states), self.rays)
        f, h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        freqs = [
            dit.freqs[0][:f].view(f, 1, 1, -1).expand(f, h, w, -1),
            dit.freqs[1][:h].view(1, h, 1, -1).expand(f, h, w, -1),
            dit.freqs[2][:w].view(1, 1, w, -1).expand(f, h, w, -1),
        ]
        freqs = torch.cat(freqs, dim=-1).reshape(f * h * w, 1, -1)
        for block in dit.blocks:
            x = block(x, context, t_mod, freqs)
        return (dit.unpatchify(dit.head(x, t), (f, h, w)),)


def published_rays(poses: np.ndarray, height: int, width: int, frames: int) -> Tensor:
    """By DiffSynth's `process_pose_file`, laid out as its pipeline does: `[1, 24, T, H, W]`."""
    module = sys.modules[diffsynth().SimpleAdapter.__module__]
    video = module.process_pose_file([list(p) for p in poses[:frames]], width, height)
    video = video.permute(3, 0, 1, 2)  # 6, frames, ...
    video = torch.cat([video[:, :1].repeat_interleave(4, dim=1), video[:, 1:]], dim=1)
    grouped = video.unflatten(1, (-1, 4)).transpose(1, 2)  # 6, 4, T
    return grouped.flatten(0, 1)[None]
