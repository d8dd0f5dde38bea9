"""Train the sprites' transformer on the latents and texts of a finished VAE and text encoder.

    torchrun --nproc-per-node 2 examples/sprites/train_transformer.py \
        --out runs/transformer --stage small --minutes 75

Starting it again with the same `--out` resumes it. It writes `OUT/sprites`, a folder in diffusers'
layout, every few minutes and at the end.

Flow matching: x_s = (1 - s) x0 + s noise, and the network says what x0 is. Every batch packs clips
of many sizes and lengths; three in ten have known frames at noise level 0, as in animating,
extending, connecting and filling; some have a level of their own for each frame; some are windows
from the middle of a longer clip, which in stage "long" go on from known frames and see anchors,
frames of another time of the clip; some there are noised with a part of another clip in them, as a
sampler's estimates are; a tenth have no caption, for guidance.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import reader
import torch
import world
from clips import STAGES, Clip, Pool, Stage, noise_levels, to_frames
from model import Sprites, as_targets, export, sample
from safetensors.torch import load_file
from torch import Tensor
from train_vae import load_vae
from training import Average, Clock, Muon, save, say, start

from sora_engine.denoise.packing import Packer
from sora_engine.vae.wan import WanVAE

FLAW, ANCHOR_FLAW = 0.2, 0.05
"""The most noise, as a level, that is left on given frames, and on anchors."""
TOLD: tuple[tuple[float, float | None], ...] = (
    *5 * ((0.95, None),),
    *2 * ((0.5, None),),
    *3 * ((0.95, 0.15),),
)
"""Where nothing is given: how much captions tell, and how much of how sprites look."""
BUNDLED = Path(__file__).parents[2] / "sora_engine" / "checkpoints" / "sprites"


def loss_of(
    model: Sprites, packer: Packer, clips: list[Clip], rng: random.Random, stage: Stage
) -> Tensor:
    device = model.transformer.proj_out.weight.device
    shown = []
    for clip in clips:
        s = noise_levels(rng, clip, stage)
        # What given frames and anchors show, a caption need not tell; and some tell little.
        tells, looks = 0.7 if clip.anchors is None else 0.4, None
        if bool((s > 0).all()):
            tells, looks = rng.choice(TOLD)
        caption = clip.scene.caption(rng, tells=tells, looks=looks)
        shown.append(("" if rng.random() < 0.1 else caption, clip, s))
    # Neighbours of one size, and of captions of one length, are one dense attention call.
    shown.sort(key=lambda one: (one[1].latents.shape[1:], len(one[0].split())))
    captions, levels = [caption for caption, _, _ in shown], [s for _, _, s in shown]
    clean, noisy, anchors = [], [], []
    for i, (_, clip, s) in enumerate(shown):
        x = clip.latents.to(device).float()
        share = s.to(device)[None, :, None, None]
        given = x if clip.strayed is None else clip.strayed.to(device).float()
        made = x if clip.perturbation is None else clip.perturbation.mixed(rng, x)
        # What a window goes on from was made by the model too, and is never quite clean.
        sample = torch.where(share > 0, noised(made, share), noised(given, flaw(rng, FLAW)))
        anchors.append(0)
        if clip.anchors is not None:
            seen = clip.anchors.to(device).float()
            anchors[i] = seen.shape[1]
            x = torch.cat([seen, x], dim=1)
            sample = torch.cat([noised(seen, flaw(rng, ANCHOR_FLAW)), sample], dim=1)
            levels[i] = torch.cat([s.new_zeros(anchors[i]), s])
        clean.append(x)
        noisy.append(sample)
    predicted = model(packer, noisy, levels, model.contexts(captions), anchors)
    target = torch.cat([as_targets(x) for x in clean])
    # Weighs errors as a velocity's would be, down to a level below which they are tiny anyway;
    # given frames do not count, and a long clip counts for more than a short one by its root.
    weights = []
    for x, s in zip(clean, levels, strict=True):
        per_token = x.shape[2] * x.shape[3] // 4
        weight = torch.where(s > 0, 1 / (s * s + 0.3), 0.0)
        weights.append((weight / (len(s) * per_token) ** 0.5).repeat_interleave(per_token))
    weight = torch.cat(weights).to(device)
    error = (predicted - target).pow(2).mean(dim=1)
    return (weight * error).sum() / (weight > 0).float().mul(weight).sum().clamp(min=1e-6)


def noised(x: Tensor, share: Tensor | float) -> Tensor:
    return (1 - share) * x + share * torch.randn_like(x)


def flaw(rng: random.Random, most: float) -> float:
    """A level of noise up to `most`; none in half of all clips."""
    return rng.choice((0.0, rng.random() * most))


def score(model: Sprites, vae: WanVAE, count: int, seed: int) -> dict[str, float]:
    """The reader's scores on captions held out from training, one sprite each."""
    rng = random.Random(seed)
    sizes = [(64, 64), (96, 64), (64, 96)]
    scenes = [world.sample_scene(rng, *sizes[i % 3], sprites=1, unseen=True) for i in range(count)]
    shapes = [(5, scene.height // 8, scene.width // 8) for scene in scenes]
    right = dict.fromkeys(("background", "colour", "shape", "motion", "all"), 0.0)
    for low in range(0, count, 8):
        part = slice(low, low + 8)
        captions = [scene.caption() for scene in scenes[part]]
        for scene, x in zip(scenes[part], sample(model, captions, shapes[part]), strict=True):
            reading = reader.read(to_frames(vae, x))
            want, got = scene.sprites[0], (*reading.sprites, None)[0]
            facts = {
                "background": reading.background == scene.background,
                "colour": got is not None and got.colour == want.colour,
                "shape": got is not None and got.shape == want.shape,
                "motion": got is not None and got.motion == want.motion,
            }
            for name, fact in {**facts, "all": all(facts.values())}.items():
                right[name] += fact / count
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=BUNDLED / "vae", help="a VAE's folder")
    parser.add_argument(
        "--text", type=Path, default=BUNDLED / "text_encoder", help="a text encoder's folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run's state")
    parser.add_argument("--begin", type=Path, help="a checkpoint whose transformer a new run takes")
    parser.add_argument("--stage", choices=STAGES, default="all", help="sizes and lengths shown")
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=1400, help="a step, in each process")
    parser.add_argument("--pool", type=int, default=2500, help="clips kept, in each process")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rank, world_size = start(args.device)
    if world_size > 1 and args.device == "cpu":
        torch.set_num_threads(1)

    vae = load_vae(args.vae).to(args.device).eval()
    # Computes in bf16; the optimiser keeps the weights in fp32.
    model = Sprites(args.text).to(args.device)
    if args.begin is not None:
        weights = load_file(args.begin / "transformer" / "diffusion_pytorch_model.safetensors")
        model.transformer.load_state_dict({name: w.float() for name, w in weights.items()})
    optimiser = Muon(dict(model.named_parameters()))
    model.transformer.to(torch.bfloat16)
    average = Average(optimiser.master, 250)
    step, seconds, path = 0, 0.0, args.out / "state.pt"
    if path.exists():
        state = torch.load(path, map_location=args.device)
        optimiser.load_state_dict(state["optimiser"])
        average.weights = state["average"]
        step, seconds = state["step"], state["seconds"]
    rng = random.Random(step * world_size + rank)
    stage = STAGES[args.stage]
    pool = Pool(vae, stage, rng, args.out / f"pool-{args.stage}-{rank}.pt", args.pool)
    if not pool.clips:
        while len(pool.clips) < min(200, args.pool):
            pool.add()
    packer = Packer((1, 2, 2), torch.device(args.device), max_layouts=1)

    def checkpoint() -> None:
        pool.save()
        if rank == 0:
            trained = {"optimiser": optimiser.state_dict(), "average": average.weights}
            save(path, {**trained, "step": step, "seconds": clock.seconds})
            export(average.weights, model, args.vae, args.out / "sprites")

    clock = Clock(args.minutes, seconds)
    shown, saved, scored = None, clock.seconds, clock.seconds
    while (rate := clock.rate(args.rate, step)) > 0:
        # A pool is filled as training goes, and then renewed slowly.
        for _ in range(2 if len(pool.clips) < args.pool else 1):
            pool.add()
        clips: list[Clip] = []
        while sum(clip.latents[0].numel() // 4 for clip in clips) < args.tokens:
            clips.append(pool.draw())
        loss = loss_of(model, packer, clips, rng, stage)
        loss.backward()
        optimiser.step(rate)
        step += 1
        average.update(optimiser.master, step)
        shown = loss.item() if shown is None else 0.97 * shown + 0.03 * loss.item()
        if rank == 0 and step % 20 == 0:
            say(f"step {step}: loss {shown:.4f}, rate {rate:.1e}, {clock.seconds:.0f} s")
        if clock.seconds - saved > 180:
            checkpoint()
            saved = clock.seconds
        if rank == 0 and clock.seconds - scored > 900:
            say_scores(model, average, optimiser, vae, 32)
            scored = clock.seconds
    checkpoint()
    if rank == 0:
        say_scores(model, average, optimiser, vae, 64)


@torch.no_grad()
def say_scores(model: Sprites, average: Average, optimiser: Muon, vae: WanVAE, count: int) -> None:
    """Score the averaged weights, then put the trained ones back."""
    for name, param in optimiser.params.items():
        param.copy_(average.weights[name])
    right = score(model, vae, count, seed=5)
    say(f"{count} unseen captions:", ", ".join(f"{k} {v:.0%}" for k, v in right.items()))
    for name, param in optimiser.params.items():
        param.copy_(optimiser.master[name])


if __name__ == "__main__":
    main()
