"""A step and a decode of each family beside diffusers, on the CPU, interleaved.

    python benchmarks/families.py -o benchmarks/results/families.json [--only dit decode]
        [--dtype bfloat16] [--tiny]

A step is one prediction with guidance (two branches) at the published width, with 1,024 tokens a
branch and 2 layers of the published 28: a step is as many times longer as there are layers more.
A decode is of as many tokens: a picture of 512 x 512, or 25 frames of LTX's. Weights are random,
and the same on both sides; outputs are compared before anything is timed.
diffusers is as its pipelines run it: one batch of two, texts padded to their full length and
masked, its own attention. Ours has the texts' keys from before, as the engine has in every step but
the first. Attention is by the backend that the engine takes on this machine. `--dtype` is that of
both sides. What a file that is given with `-o` has already is not measured again. `--cpu` measures
the process's CPU time on one thread, for a machine that others use meanwhile. `--tiny` shows no
more than that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    DiTTransformer2DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
)
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel
from torch import Tensor

from sora_engine.bench.results import Measurement, Result
from sora_engine.bench.timing import cpu_seconds, interleaved, seconds
from sora_engine.denoise.packing import PackedBatch, Packer, Segment
from sora_engine.models.dit.config import DiTConfig
from sora_engine.models.dit.model import DiT
from sora_engine.models.latte.config import LatteConfig
from sora_engine.models.latte.model import LatteTransformer
from sora_engine.models.ltx.config import LTXConfig
from sora_engine.models.ltx.model import LTXTransformer
from sora_engine.models.machine import machine_rates, prefer_attention
from sora_engine.models.pixart.config import PixArtConfig
from sora_engine.models.pixart.model import PixArt
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.models.uvit.config import UViTConfig
from sora_engine.models.uvit.family import UViTFamily
from sora_engine.models.uvit.model import UViT
from sora_engine.vae.kl import KLVAE
from sora_engine.vae.kl_config import KLConfig
from sora_engine.vae.ltx import LTXVAE
from sora_engine.vae.ltx_checkpoint import to_own_name
from sora_engine.vae.ltx_config import LTXVAEConfig

LEVEL, TEXT, WORDS = 500, 300, 40
"""Of texts the padded length of PixArt's pipeline (Latte's is 120), and of them a prompt's own."""
T = TypeVar("T", bound=torch.nn.Module)
Pair = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class Size:
    """heads x head_dim is the width. side: latents along a side of a picture of 1,024 tokens."""

    heads: int = 16
    head_dim: int = 72
    layers: int = 2
    side: int = 64
    frames: int = 16
    text_dim: int = 4096
    vae: tuple[int, ...] = (128, 256, 512, 512)
    decoded: int = 64
    dtype: torch.dtype = torch.float32
    """Of both sides."""

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)

    def frozen(self, module: T) -> T:
        torch.nn.Module.to(module, self.dtype)  # diffusers' own says what is of no matter here
        return module.eval().requires_grad_(False)

    @property
    def shape(self) -> dict[str, object]:
        """What all of diffusers' classes here take."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "num_layers": self.layers,
            "in_channels": 4,
            "patch_size": 2,
        }


TINY = Size(heads=2, head_dim=8, side=8, frames=2, text_dim=16, vae=(32, 32), decoded=8)
COMMON = {
    "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False,
}  # fmt: skip


def filled(ours: DiffusionTransformer, oracle: torch.nn.Module, size: Size) -> DiffusionTransformer:
    """With the oracle's weights, laid out for the processor."""
    state = dict(oracle.state_dict())
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"].unsqueeze(2)
    ours.load_state_dict(state)
    return size.frozen(ours).prepare()


def config_of(oracle: torch.nn.Module) -> dict[str, object]:
    return {name: value for name, value in oracle.config.items() if name[0] != "_"}


def packed(ours: DiffusionTransformer, samples: list[Tensor], embeddings: list) -> PackedBatch:
    """Two branches of one picture or video."""
    contexts = ours.encode_contexts(embeddings)
    frames = samples[0].shape[1]
    levels = torch.full((frames,), float(LEVEL))
    parts = zip(samples, contexts, strict=True)
    segments = [Segment(sample, levels, ((context, frames),)) for sample, context in parts]
    return Packer((1, 2, 2), torch.device("cpu")).pack(segments)


def dit(size: Size) -> Pair:
    oracle = DiTTransformer2DModel(
        **size.shape, **COMMON, sample_size=size.side, norm_type="ada_norm_zero"
    )
    size.frozen(oracle)
    ours = filled(DiT(DiTConfig.from_dict(config_of(oracle))), oracle, size)
    x = size.random(1, 4, size.side, size.side)
    batch = packed(ours, [x.transpose(0, 1)] * 2, [{"label": torch.tensor(n)} for n in (7, -1)])
    both, levels, labels = x.expand(2, -1, -1, -1), torch.full((2,), LEVEL), torch.tensor([7, 1000])
    return (
        lambda: ours(batch),
        lambda: oracle(both, timestep=levels, class_labels=labels).sample,
    )


def texts(size: Size, length: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    made = size.random(2, length, size.text_dim)
    return made, [{"text": text, "count": torch.tensor(WORDS)} for text in made]


def pixart(size: Size) -> Pair:
    oracle = PixArtTransformer2DModel(
        **size.shape, **COMMON, sample_size=size.side, norm_type="ada_norm_single",
        caption_channels=size.text_dim, cross_attention_dim=size.heads * size.head_dim,
        norm_eps=1e-6,
    )  # fmt: skip
    size.frozen(oracle)
    ours = filled(PixArt(PixArtConfig.from_dict(config_of(oracle))), oracle, size)
    x = size.random(1, 4, size.side, size.side)
    padded, embeddings = texts(size, TEXT)
    batch = packed(ours, [x.transpose(0, 1)] * 2, embeddings)
    mask = (torch.arange(TEXT) < WORDS).long().expand(2, -1)
    return (
        lambda: ours(batch),
        lambda: (
            oracle(
                x.expand(2, -1, -1, -1),
                encoder_hidden_states=padded,
                encoder_attention_mask=mask,
                timestep=torch.full((2,), LEVEL),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        ),
    )


def latte(size: Size) -> Pair:
    side = size.side * 4 // 16 if size.frames == 16 else size.side
    oracle = LatteTransformer3DModel(
        **size.shape, **COMMON, sample_size=side, norm_type="ada_norm_single", norm_eps=1e-6,
        caption_channels=size.text_dim, cross_attention_dim=size.heads * size.head_dim,
        video_length=size.frames,
    )  # fmt: skip
    size.frozen(oracle)
    ours = filled(LatteTransformer(LatteConfig.from_dict(config_of(oracle))), oracle, size)
    x = size.random(1, 4, size.frames, side, side)
    padded, embeddings = texts(size, 120)
    batch = packed(ours, [x[0]] * 2, embeddings)
    cut = padded[:, :WORDS]
    return (
        lambda: ours(batch),
        lambda: (
            oracle(
                x.expand(2, -1, -1, -1, -1),
                timestep=torch.full((2,), LEVEL),
                encoder_hidden_states=cut,
            ).sample
        ),
    )


def uvit(size: Size) -> Pair:
    """diffusers has its blocks alone: the tokens around them are given to it as they are."""
    dim, side = size.heads * size.head_dim, size.side
    oracle = size.frozen(UTransformer2DModel(
        **size.shape, out_channels=4, sample_size=side, activation_fn="gelu",
        attention_bias=False, block_type="paper", pre_layer_norm=True,
    ))  # fmt: skip
    for block in oracle.transformer_out_blocks:
        block["skip"].norm = torch.nn.Identity()
    config = UViTConfig(
        img_size=side, embed_dim=dim, depth=size.layers, num_heads=size.heads, num_classes=1001,
        conv=False,
    )  # fmt: skip
    ours = size.frozen(UViT(config))
    state = dict(ours.state_dict())
    theirs = oracle.state_dict()
    for own, other in (("in_blocks", "in_blocks"), ("mid_blocks", "mid_block")):
        for name in [n for n in state if n.startswith(own)]:
            source = name.replace(
                f"{own}.0" if own == "mid_blocks" else own, f"transformer_{other}"
            )
            state[name] = theirs[source.replace("norm2", "norm3")]
    for name in [n for n in state if n.startswith("out_blocks")]:
        _, number, rest = name.split(".", 2)
        inner = f"skip.{rest}" if rest.startswith("skip") else f"block.{rest}"
        state[name] = theirs[f"transformer_out_blocks.{number}.{inner}".replace("norm2", "norm3")]
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = theirs[f"norm_out.{kind}"]
    ours.load_state_dict(state)
    out, places = ours.decoder_pred, ours.pos_embed
    patch, classes = ours.patch_embed["proj"], ours.label_emb
    ours.prepare()
    x = size.random(1, 4, side, side)
    batch = packed(ours, [x.transpose(0, 1)] * 2, [{"label": torch.tensor(n)} for n in (7, -1)])

    def step() -> Tensor:
        half = torch.arange(dim // 2)
        angles = LEVEL * torch.exp(-half * torch.log(torch.tensor(1e4)) / (dim // 2))
        time = torch.cat([angles.cos(), angles.sin()]).to(x.dtype).expand(2, 1, -1)
        patches = torch.nn.functional.conv2d(x, patch.weight[:, :, 0], patch.bias, stride=2)
        tokens = patches.flatten(2).transpose(1, 2).expand(2, -1, -1)
        words = classes(torch.tensor([[7], [1000]]))
        joined = torch.cat([time, words, tokens], dim=1) + places
        done = oracle(joined, hidden_states_is_embedding=True, unpatchify=False, return_dict=False)[
            0
        ]
        return out(done[:, 2:])

    return lambda: ours(batch), step


def ltx(size: Size) -> Pair:
    """At the width of the 2B: 32 heads of 64. 1,024 tokens are 4 latent frames of 16 x 16."""
    small = size.side < 64
    heads, head_dim = (2, 8) if small else (32, 64)
    frames, side = 4, 2 if small else 16
    oracle = size.frozen(LTXVideoTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=size.layers,
        cross_attention_dim=heads * head_dim, caption_channels=size.text_dim,
    ))  # fmt: skip
    ours = LTXTransformer(LTXConfig.from_dict(config_of(oracle)))
    ours.load_state_dict(oracle.state_dict())
    size.frozen(ours).prepare()
    x = size.random(128, frames, side, side)
    padded, embeddings = texts(size, 128)
    contexts = ours.encode_contexts(embeddings)
    levels = torch.full((frames,), float(LEVEL))
    segments = [Segment(x, levels, ((context, frames),), fps=25.0) for context in contexts]
    batch = Packer((1, 1, 1), torch.device("cpu")).pack(segments)
    both = x.flatten(1).T.expand(2, -1, -1)
    mask = (torch.arange(128) < WORDS).long().expand(2, -1)
    return (
        lambda: ours(batch),
        lambda: (
            oracle(
                both,
                encoder_hidden_states=padded,
                timestep=torch.full((2,), float(LEVEL)),
                encoder_attention_mask=mask,
                num_frames=frames,
                height=side,
                width=side,
                rope_interpolation_scale=(8 / 25, 32, 32),
            ).sample
        ),
    )


FAMILIES = {"dit": dit, "pixart": pixart, UViTFamily.name: uvit, "latte": latte, "ltx": ltx}


def decode(size: Size) -> Pair:
    stages = len(size.vae)
    oracle = AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=2,
        latent_channels=4,
    )
    size.frozen(oracle)
    ours = KLVAE(KLConfig.from_dict(config_of(oracle)))
    ours.load_state_dict(oracle.state_dict())
    size.frozen(ours).prepare()
    latents = size.random(1, 4, size.decoded, size.decoded)
    normalised = ours.normalise(latents[:, :, None])
    return (
        lambda: ours.decode_chunk(normalised)[0],
        lambda: oracle.decode(latents).sample,
    )


def decode_ltx(size: Size) -> Pair:
    """Of 0.9.0's layout: as many tokens, and as large, as the pictures of the other."""
    widths = (8, 8, 8, 8) if size.decoded < 64 else (128, 256, 512, 512)
    oracle = size.frozen(
        AutoencoderKLLTXVideo(block_out_channels=widths, decoder_block_out_channels=widths)
    )
    ours = LTXVAE(LTXVAEConfig.from_dict(config_of(oracle)))
    ours.load_state_dict({to_own_name(k): v for k, v in oracle.state_dict().items()})
    size.frozen(ours).prepare()
    side = size.decoded // 4
    latents = size.random(1, 128, 4, side, side)
    return lambda: ours.decode(latents), lambda: oracle.decode(latents).sample


KINDS = {
    **{f"step of {name}": make for name, make in FAMILIES.items()},
    "decode by AutoencoderKL": decode,
    "decode by AutoencoderKLLTXVideo": decode_ltx,
}


def checked(name: str, pair: Pair, most: float = 1e-3) -> Pair:
    """That both sides give one result, in whichever shape: of sorted values, within `most`."""
    with torch.inference_mode():
        a, b = (torch.as_tensor(call()).double().flatten().sort().values for call in pair)
    error = float((a - b).norm() / b.norm())
    if not error < most:
        raise SystemExit(f"{name}: the two sides differ by {error:.2g}")
    return pair


def name_of(kind: str, size: Size, *, cpu: bool) -> str:
    """What a measurement is called."""
    tokens = (size.side // 2) ** 2
    what = f"{tokens} tokens a branch"
    if "decode" in kind:
        what = f"{(size.decoded // 2) ** 2} tokens, {8 * size.decoded} pixels a side"
    dtype = str(size.dtype).removeprefix("torch.")
    return f"families/{kind}, {what}, {dtype}" + (", CPU time on one thread" if cpu else "")


def measured(kind: str, size: Size, rounds: int, *, cpu: bool) -> Measurement:
    torch.manual_seed(0)
    most = 1e-3 if size.dtype == torch.float32 else 3e-2
    ours, theirs = checked(kind, KINDS[kind](size), most)
    clock = cpu_seconds if cpu else seconds
    with torch.inference_mode():
        times = interleaved({"sora": ours, "diffusers": theirs}, rounds, warmup=0, clock=clock)
    return Measurement(name_of(kind, size, cpu=cpu), "s", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument(
        "--only", nargs="*", default=[""], metavar="WORD", help="what has one of these in its name"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cpu", action="store_true", help="CPU time, on one thread")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.cpu:
        torch.set_num_threads(1)
    prefer_attention(machine_rates())
    size = replace(TINY if given.tiny else Size(), dtype=getattr(torch, given.dtype))
    made: list[Measurement] = []
    if given.output is not None and given.output.exists():
        before = Result.read(given.output)
        made += before.measurements if before.commit == Result.here("", ()).commit else ()
    for kind in KINDS:
        names = {found.name for found in made}
        if name_of(kind, size, cpu=given.cpu) in names or not any(w in kind for w in given.only):
            continue
        found = measured(kind, size, given.rounds, cpu=given.cpu)
        made.append(found)
        times, spread = found.ratios("diffusers"), found.spread
        print(
            f"{found.name}: {spread('sora').median:.3g} s, diffusers "
            f"{spread('diffusers').median:.3g} s, {sorted(times)[len(times) // 2]:.2f} times",
            flush=True,
        )
        if given.output is not None:  # what there is so far, should it be stopped
            Result.here("families", made).write(given.output)


if __name__ == "__main__":
    main()
