"""Train the meadow's video autoencoder: Wan 2.2's residual layout, 8x in space and 4x in time.

    torchrun --nproc-per-node 2 -m examples.meadow.train_vae --out runs/meadow-vae --minutes 40

Starting it again with the same `--out` resumes it. At the end it measures the latents' statistics,
writes `OUT/vae`, a folder that diffusers and the engine read, and says what the reader makes of
clips that went through it.

With `--decoder FOLDER` it goes on with the decoder of such a folder alone. Latents then stay as
they are, and a transformer that learnt them still fits.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sora_engine
from examples.meadow import reader, world
from examples.meadow.walks import as_frames, as_video, some_clip
from examples.sprites.training import Clock, Muon, save, say, start
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig

START = Path(sora_engine.__file__).parent / (
    "checkpoints/sprites/vae/diffusion_pytorch_model.safetensors"
)
"""The weights that it begins with."""
CHANNELS = 24
CONFIG = {
    "base_dim": 16,
    "z_dim": CHANNELS,
    "dim_mult": [1, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * CHANNELS,
    "latents_std": [1.0] * CHANNELS,
    "clip_output": False,
}
LENGTHS = (0, 1, 2, 2, 3)
"""Actions of a clip."""
LATENT_NOISE, MOST_NOISE = 0.05, 0.2
"""Of each channel's deviation: it keeps the decoder smooth in its latents. A decoder that learns
alone meets up to the latter: the latents that it is for are a transformer's."""
PLAYER = slice(world.CENTRE * world.TILE, (world.CENTRE + 1) * world.TILE)
"""Rows, and columns, of the player's tile."""


def new_vae(start: Path = START) -> WanVAE:
    """A VAE that begins as that of sprites, which has its layout, and whose attention is, and
    stays, silent: what is on a tile hangs on what is near it alone."""
    vae = WanVAE(WanVAEConfig(**CONFIG))
    vae.load_state_dict(load_file(start))
    vae.float()
    with torch.no_grad():
        for name, param in vae.named_parameters():
            if "attentions.0.proj" in name:
                param.zero_()
            param.requires_grad_("attentions" not in name)
    return vae


def load_vae(folder: Path) -> WanVAE:
    """The VAE of a folder that `export` wrote."""
    vae = WanVAE(WanVAEConfig.from_dict(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({name: value.float() for name, value in weights.items()})
    return vae.eval().requires_grad_(False)


def batch(rng: random.Random, clips: int) -> Tensor:
    """Clips of one length, `[B, 3, n, SIDE, SIDE]` in [-1, 1]."""
    steps = rng.choice(LENGTHS)
    count = max(2, clips * 2 // (steps + 1))
    made = [some_clip(rng, steps, busy=rng.random() < 0.5)[0] for _ in range(count)]
    return torch.stack([as_video(frames) for frames in made])


@torch.no_grad()
def read_back(vae: WanVAE, clips: int, seed: int = 99) -> tuple[float, float]:
    """Of unseen clips that went through the VAE: the share of tiles that are read right, and the
    mean PSNR in dB."""
    rng = random.Random(seed)
    right, tiles, quality = 0, 0, 0.0
    for _ in range(clips):
        frames, look = some_clip(rng, 5)
        back = as_frames(vae.decode(vae.encode(as_video(frames)[None]))[0])
        error = (back.astype(float) - frames.astype(float)) ** 2
        quality += float(10 * torch.log10(torch.tensor(255.0**2 / max(error.mean(), 1e-3)))) / clips
        for i in range(world.FRAMES, len(frames), world.FRAMES):
            want, got = reader.read(frames[i], look), reader.read(back[i], look)
            right += int((want.tiles == got.tiles).sum())
            tiles += want.tiles.size
    return right / tiles, quality


def loss_of(restored: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a batch `[B, 3, n, SIDE, SIDE]`, and the mean squared error of each clip `[B]`.

    The logarithm weighs all clips alike, as the mean of their PSNRs does. The player's tile is one
    of 64, and on it little of the ground is left to be seen: it counts by itself.
    """
    error = (restored.float() - video).pow(2)
    whole, player = (part.flatten(1).mean(1) for part in (error, error[..., PLAYER, PLAYER]))
    return (whole + 2e-4).log().mean() + 0.5 * (player + 2e-4).log().mean(), whole


@torch.no_grad()
def measured(vae: WanVAE) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel of the latents of 60 clips."""
    rng = random.Random(7)
    latents = []
    for _ in range(60):
        frames, _ = some_clip(rng, 5)
        mean, _ = vae.encode_moments(as_video(frames)[None])
        latents.append(mean[0].flatten(1).float())
    values = torch.cat(latents, dim=1)
    mean, std = ([round(v, 5) for v in part.tolist()] for part in (values.mean(1), values.std(1)))
    return mean, std


@torch.no_grad()
def export(vae: WanVAE, folder: Path) -> None:
    """Write a diffusers folder, weights in fp16. The latents' statistics are measured first where
    they are not known."""
    statistics = list(vae.config.latents_mean), list(vae.config.latents_std)
    if statistics == (CONFIG["latents_mean"], CONFIG["latents_std"]):
        statistics = measured(vae)
    config = {key: value for key, value in CONFIG.items() if key != "clip_output"}
    config["latents_mean"], config["latents_std"] = statistics
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.42.1", **config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.half().contiguous() for name, value in vae.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run's state")
    parser.add_argument("--decoder", type=Path, help="a VAE's folder whose decoder goes on")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--clips", type=int, default=8, help="of one action, a step and process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="where the processor has its products")
    args = parser.parse_args()
    rank, world_size = start(args.device)
    if world_size > 1 and args.device == "cpu":
        torch.set_num_threads(1)

    vae = new_vae() if args.decoder is None else load_vae(args.decoder).train()
    if args.decoder is not None:
        for part in (vae.decoder, vae.post_quant_conv):
            for name, param in part.named_parameters():
                param.requires_grad_("attentions" not in name)
    vae.to(args.device)
    optimiser = Muon(dict(vae.named_parameters()))
    step, seconds, path = 0, 0.0, args.out / "state.pt"
    if path.exists():
        state = torch.load(path, map_location=args.device)
        optimiser.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]
    clock = Clock(args.minutes, seconds)
    rng = random.Random(step * world_size + rank)
    shown, saved = None, clock.seconds
    while (rate := clock.rate(args.rate, step)) > 0:
        video = batch(rng, args.clips).to(args.device)
        share = LATENT_NOISE
        if args.decoder is not None:
            share = MOST_NOISE * torch.rand(len(video), 1, 1, 1, 1, device=args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            latents = vae.encode(video, latents_per_call=None)
            spread = latents.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
            noisy = latents + share * spread * torch.randn_like(latents)
            restored = vae.decode(noisy, latents_per_call=None)
        loss, error = loss_of(restored, video)
        loss.backward()
        optimiser.step(rate)
        step += 1
        quality = float(-10 * (error.detach() / 4).log10().mean())
        shown = quality if shown is None else 0.96 * shown + 0.04 * quality
        if rank == 0 and step % 20 == 0:
            say(f"step {step}: {shown:.2f} dB, rate {rate:.1e}, {clock.seconds:.0f} s")
        if rank == 0 and clock.seconds - saved > 120:
            state = {"optimiser": optimiser.state_dict(), "step": step, "seconds": clock.seconds}
            save(path, state)
            saved = clock.seconds
    if rank == 0:
        state = {"optimiser": optimiser.state_dict(), "step": step, "seconds": clock.seconds}
        save(path, state)
        export(vae, args.out / "vae")
        share, quality = read_back(vae, 40)
        say(f"40 unseen clips: {share:.2%} of their tiles are read right, {quality:.2f} dB")


if __name__ == "__main__":
    main()
