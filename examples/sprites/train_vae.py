"""Train the sprites' video autoencoder: Wan 2.2's residual layout, 8x in space and 4x in time.

    torchrun --nproc-per-node 2 examples/sprites/train_vae.py --out runs/vae --minutes 60

Starting it again with the same `--out` resumes it. At the end it measures the latents' statistics
and writes `OUT/vae`, a folder that diffusers and the engine read.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import world
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import Clock, Muon, save, say, start

from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig

CONFIG = {
    "base_dim": 16,
    "z_dim": 48,
    "dim_mult": [1, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
    "clip_output": False,
}
# Sizes of what the model is trained on: mostly cuts round a sprite's edge, where the work is.
CUTS = [(32, 32)] * 5 + [(32, 48), (48, 32), (48, 48), (64, 64), (64, 64)]
LENGTHS = (1, 9, 9, 9, 17)
SIDES = range(64, 161, 16)
LATENT_NOISE = 0.05  # of each channel's deviation: keeps the decoder smooth in its latents


def new_vae() -> WanVAE:
    """A VAE whose residual branches start small and whose attention starts, and stays, silent.

    Sprites are local: without attention what is learned on small cuts holds for any size.
    """
    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig(**CONFIG))
    with torch.no_grad():
        for name, param in vae.named_parameters():
            if name.endswith("bias") or "attentions.0.proj" in name:
                param.zero_()
            elif "conv2.weight" in name or "resample.1.weight" in name:
                param.mul_(0.3)
            param.requires_grad_("attentions" not in name)
    return vae


def load_vae(folder: Path) -> WanVAE:
    """The VAE of a folder that `export` wrote."""
    vae = WanVAE(WanVAEConfig.from_dict(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({name: value.float() for name, value in weights.items()})
    return vae.eval().requires_grad_(False)


def batch(rng: random.Random, pixels: int) -> Tensor:
    """Clips of one size, about `pixels` in all, `[B, 3, n, h, w]` in [-1, 1]."""
    num_frames, (h, w) = rng.choice(LENGTHS), rng.choice(CUTS)
    clips = []
    for _ in range(min(96, max(4, round(pixels / ((num_frames + 1) * h * w))))):
        if min(h, w) >= 64 and rng.random() < 0.7:
            scene, crop = world.sample_scene(rng, h, w), None
        else:
            scene = world.sample_scene(rng, rng.choice(SIDES), rng.choice(SIDES))
            middle = torch.tensor([num_frames / 2])
            x, y, _ = rng.choice(scene.sprites).path(middle)
            left = cut(rng, x.item() % scene.width, w, scene.width)
            crop = (cut(rng, y.item() % scene.height, h, scene.height), left, h, w)
        clips.append(scene.render(num_frames, start=rng.randrange(1000), crop=crop))
    return torch.stack(clips).permute(0, 4, 1, 2, 3) * 2 - 1


def cut(rng: random.Random, centre: float, length: int, whole: int) -> int:
    """Where a cut of `length` out of `whole` starts, so that it shows what is near `centre`."""
    start = int(centre + length * rng.uniform(-1.1, 0.1))
    return min(max(start, 0), whole - length)


def round_trip(vae: WanVAE, frames: Tensor) -> Tensor:
    """A clip `[n, h, w, 3]` in [0, 1], encoded, decoded and rounded to 8 bits."""
    with torch.no_grad():
        out = vae.decode(vae.encode(frames.permute(3, 0, 1, 2)[None] * 2 - 1))[0]
    return (out.permute(1, 2, 3, 0).clamp(-1, 1) * 127.5 + 127.5).round() / 255


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((a - b).pow(2).mean() + 1e-10))


def unseen_clips(count: int, seed: int = 99) -> list[Tensor]:
    """Clips of mixed sizes and lengths that training does not show."""
    rng = random.Random(seed)
    sizes = [(64, 64), (128, 128), (64, 160), (160, 96), (96, 96)]
    return [
        world.sample_scene(rng, *sizes[i % 5], unseen=True).render(rng.choice((1, 9, 17, 33)))
        for i in range(count)
    ]


@torch.no_grad()
def export(vae: WanVAE, folder: Path) -> None:
    """Measure the latents' statistics and write a diffusers folder, weights in fp16."""
    rng = random.Random(7)
    latents = []
    for _ in range(120):
        frames = world.sample_scene(rng, rng.choice(SIDES), rng.choice(SIDES)).render(17)
        mean, _ = vae.encode_moments(frames.permute(3, 0, 1, 2)[None] * 2 - 1)
        latents.append(mean[0].flatten(1).float())
    values = torch.cat(latents, dim=1)
    config = dict(CONFIG)
    config.pop("clip_output")
    config["latents_mean"] = [round(v, 5) for v in values.mean(dim=1).tolist()]
    config["latents_std"] = [round(v, 5) for v in values.std(dim=1).tolist()]
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.42.1", **config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.half().contiguous() for name, value in vae.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run's state")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--pixels", type=int, default=280_000, help="a step, in each process")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rank, world_size = start(args.device)
    if world_size > 1 and args.device == "cpu":
        torch.set_num_threads(1)

    vae = new_vae().to(args.device)
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
        video = batch(rng, args.pixels).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            latents, _ = vae.encode_moments(video, latents_per_call=None)
            spread = latents.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
            noisy = latents + LATENT_NOISE * spread * torch.randn_like(latents)
            restored = vae.decode(noisy, latents_per_call=None)
        error = (restored.float() - video).pow(2).flatten(1).mean(dim=1)
        # The logarithm weighs all clips alike, as the mean of their PSNRs does.
        (error + 2e-4).log().mean().backward()
        optimiser.step(rate)
        step += 1
        quality = float(-10 * (error.detach() / 4).log10().mean())
        shown = quality if shown is None else 0.96 * shown + 0.04 * quality
        if rank == 0 and step % 20 == 0:
            say(f"step {step}: {shown:.2f} dB on cuts, rate {rate:.1e}, {clock.seconds:.0f} s")
        if rank == 0 and clock.seconds - saved > 120:
            state = {"optimiser": optimiser.state_dict(), "step": step, "seconds": clock.seconds}
            save(path, state)
            saved = clock.seconds
    if rank == 0:
        state = {"optimiser": optimiser.state_dict(), "step": step, "seconds": clock.seconds}
        save(path, state)
        export(vae, args.out / "vae")
        scores = [psnr(round_trip(vae, clip), clip) for clip in unseen_clips(100)]
        say(f"100 unseen clips: {sum(scores) / 100:.2f} dB on average, {min(scores):.2f} at worst")


if __name__ == "__main__":
    main()
