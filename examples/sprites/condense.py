"""Express a trained VAE's latents in the decoder's own measure, and keep what shows.

    python examples/sprites/condense.py --vae runs/vae/vae --out runs/vae24 --channels 24

A VAE's channels all have one variance, whether a pixel depends on them or not, so a denoiser spends
most of its effort on what nobody sees. Here latents are rotated and scaled so that a step of given
length changes the pixels by as much in every direction (the mean of J^T J over clips, J being the
decoder's Jacobian), then turned to their principal axes, of which the strongest are kept. Noise
then hides fine detail first and the background last, as it does for pixels.

All of it is linear, so it goes into the weights beside the latents: the encoder's last convolution
and the decoder's first. The layout stays Wan's.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import world
from safetensors.torch import save_file
from torch import Tensor
from train_vae import load_vae
from training import say

from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig

STEP = 0.15  # of a latent's deviation: small beside it, large beside rounding


@torch.no_grad()
def moments(vae: WanVAE, clips: int, probed: int) -> tuple[Tensor, Tensor]:
    """The decoder's measure and the latents' second moment, both `[z, z]`, before `conv_in`."""
    rng, signs = random.Random(3), torch.Generator().manual_seed(0)
    z = vae.config.z_dim
    measure, second, cells = torch.zeros(z, z), torch.zeros(z, z), 0
    for index in range(clips):
        scene = world.sample_scene(rng, 64, 64)
        video = scene.render(9).permute(3, 0, 1, 2)[None] * 2 - 1
        latents = vae.encode(video, latents_per_call=None)
        before = raw(vae, latents)[0].flatten(1)
        second += before @ before.T
        cells += before.shape[1]
        if index >= probed:
            continue
        here = vae.decode(latents, latents_per_call=None)
        # Independent signs at every cell: the products of two channels' changes average out
        # between cells, so one decode a channel measures all cells.
        sign = torch.randint(0, 2, latents.shape[2:], generator=signs) * 2.0 - 1.0
        changes = []
        for channel in range(z):
            moved = latents.clone()
            moved[:, channel] += STEP * sign
            changes.append((vae.decode(moved, latents_per_call=None) - here).flatten() / STEP)
        change = torch.stack(changes)
        measure += change @ change.T / (sign.numel() * probed)
    # From normalised latents to what `conv_in` reads.
    back = torch.linalg.inv(to_raw(vae)[0])
    return back.T @ measure @ back, second / cells


def to_raw(vae: WanVAE) -> tuple[Tensor, Tensor]:
    """`(G, h)` with `G @ latents + h` = what the decoder's `conv_in` reads, for each cell."""
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    weight = vae.post_quant_conv.weight.flatten(1)
    return weight * std, weight @ mean + vae.post_quant_conv.bias


def raw(vae: WanVAE, latents: Tensor) -> Tensor:
    matrix, offset = to_raw(vae)
    return torch.einsum("ij,bj...->bi...", matrix, latents) + offset[:, None, None, None]


@torch.no_grad()
def condense(
    vae: WanVAE, channels: int, *, clips: int = 60, probed: int = 10
) -> tuple[WanVAE, Tensor, Tensor]:
    """The same VAE with `channels` latents, and `(A, a)`: old normalised latents to the new."""
    measure, second = moments(vae, clips, probed)
    values, vectors = torch.linalg.eigh(measure)
    values = values.clamp(min=1e-6 * values.max()).sqrt()
    root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    # Not about the mean: zeros that pad the latents have to stay zeros.
    shares, axes = torch.linalg.eigh(root @ second @ root)
    axes = axes.flip(1)[:, :channels]
    down, up = axes.T @ root, inverse @ axes  # [channels, z], [z, channels]
    say(f"{channels} channels keep {shares.flip(0)[:channels].sum() / shares.sum():.2%}")

    rng, told = random.Random(4), []
    for _ in range(3 * clips):
        video = world.sample_scene(rng, 64, 64).render(rng.choice((1, 9))).permute(3, 0, 1, 2)
        latents = vae.encode(video[None] * 2 - 1, latents_per_call=None)
        told.append((down @ raw(vae, latents)[0].flatten(1)).T)
    seen = torch.cat(told)
    mean = seen.mean(dim=0)
    std = (seen - mean).pow(2).mean().sqrt()  # one for all: the channels' sizes are the point

    config = vae.config.to_dict() | {
        "z_dim": channels,
        "latents_mean": [round(float(value), 5) for value in mean],
        "latents_std": [round(float(std), 5)] * channels,
    }
    out = WanVAE(WanVAEConfig.from_dict(config))
    weights = dict(vae.state_dict())
    z = vae.config.z_dim
    to_posterior = vae.quant_conv.weight.flatten(1)[:z]
    weight, bias = weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"]
    after, shift = vae.post_quant_conv.weight.flatten(1), vae.post_quant_conv.bias
    chain = down @ after @ to_posterior
    offset = down @ (after @ vae.quant_conv.bias[:z] + shift)
    kept = torch.zeros(channels, *weight.shape[1:])
    weights["encoder.conv_out.weight"] = torch.cat(
        [torch.einsum("ij,jklmn->iklmn", chain, weight), kept]
    )
    # The posterior is narrow: its log-variance is a constant.
    weights["encoder.conv_out.bias"] = torch.cat(
        [chain @ bias + offset, torch.full((channels,), -12.0)]
    )
    first = weights["decoder.conv_in.weight"]
    weights["decoder.conv_in.weight"] = torch.einsum("ojklm,ji->oiklm", first, up)
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        weights[f"{name}.weight"] = torch.eye(size)[:, :, None, None, None]
        weights[f"{name}.bias"] = torch.zeros(size)
    out.load_state_dict(weights)
    matrix, offset = to_raw(vae)
    return out.eval(), down @ matrix / std, (down @ offset - mean) / std


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="a folder that train_vae.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=24)
    args = parser.parse_args()
    out, _, _ = condense(load_vae(args.vae), args.channels)
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in out.state_dict().items()}
    save_file(weights, args.out / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    old = json.loads((args.vae / "config.json").read_text())
    config = {name: out.config.to_dict().get(name, value) for name, value in old.items()}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
