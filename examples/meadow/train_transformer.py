"""Train the meadow's transformer on the latents and texts of a finished VAE and text encoder.

    torchrun --nproc-per-node 2 -m examples.meadow.train_transformer \
        --vae runs/meadow-vae/vae --text runs/meadow-text --out runs/meadow --minutes 100

Starting it again with the same `--out` resumes it. It writes `OUT/meadow`, a folder in diffusers'
layout, every few minutes and at the end.

Flow matching: x_s = (1 - s) x0 + s noise, and the network says what x0 is. Three in ten of the new
frames are pure noise, as a session's first step is. In six of ten clips the past carries noise that
the model is not told of: in a session it is the model's own, and never quite clean.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.meadow.model import NEW, Meadow, as_targets, export, from_targets
from examples.meadow.pool import Pool
from examples.meadow.text import caption_of
from examples.meadow.train_vae import load_vae
from examples.sprites.training import Average, Clock, Muon, save, say, start

FLAW = 0.25
"""The most noise, as a level, that is left on what is past."""


OWN, OWN_FROM = 0.5, 600
"""Of how many clips the past is the model's own, and from which step on."""
OWN_FROM_LEVEL = 0.3
"""Noise from which a frame counts as made by the model."""


def loss_of(model: Meadow, pool: Pool, rng: random.Random, count: int, own: float) -> Tensor:
    clips = pool.draw(count, own)
    captions = []
    for walk in clips.walks:
        plain = rng.random() < 0.8
        captions.append(caption_of(rng, walk.look, plain=plain)[0] if rng.random() < 0.95 else "")
    x = clips.latents
    B = len(x)
    flaw = torch.rand(B, 1, 1, 1, 1) * FLAW * (torch.rand(B, 1, 1, 1, 1) < 0.6)
    past = x[:, :-NEW]
    past = (1 - flaw) * past + flaw * torch.randn_like(past)
    shift = rng.choice((1.0, 3.0))
    u = torch.rand(B, NEW)
    s = (shift * u / (1 + (shift - 1) * u)).clamp(min=0.02)
    s = torch.where(torch.rand(B, NEW) < 0.3, 1.0, s)
    share = s[..., None, None, None]
    new = (1 - share) * x[:, -NEW:] + share * torch.randn_like(x[:, -NEW:])
    levels = torch.cat([torch.zeros(B, x.shape[1] - NEW), s], dim=1)
    predicted = model(
        torch.cat([past, new], dim=1), levels, clips.actions, clips.places, clips.sees, captions
    )
    error = from_targets((predicted.float() - as_targets(x[:, -NEW:])).pow(2)).mean(dim=2)
    error = (clips.weights * error).mean(dim=(2, 3)) / clips.weights.mean()
    clips.keep(from_targets(predicted.detach()), s > OWN_FROM_LEVEL)
    # As a velocity's error would be weighed, down to a level below which it is tiny anyway.
    weight = 1 / (s * s + 0.3)
    return (weight * error).sum() / weight.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="a VAE's folder")
    parser.add_argument("--text", type=Path, required=True, help="a text encoder's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run's state")
    parser.add_argument("--begin", type=Path, help="a checkpoint whose transformer a new run takes")
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--clips", type=int, default=8, help="a step, in each process")
    parser.add_argument("--walks", type=int, default=1000, help="kept, in each process")
    parser.add_argument("--bf16", action="store_true", help="where the processor has its products")
    args = parser.parse_args()
    rank, world_size = start("cpu")
    if world_size > 1:
        torch.set_num_threads(1)

    vae = load_vae(args.vae).prepare()
    model = Meadow(args.text)
    if args.begin is not None:
        weights = load_file(args.begin / "transformer" / "diffusion_pytorch_model.safetensors")
        model.transformer.load_state_dict({name: w.float() for name, w in weights.items()})
    optimiser = Muon(dict(model.named_parameters()))
    if args.bf16:
        model.transformer.to(torch.bfloat16)
    average = Average(optimiser.master, 150)
    step, seconds, path = 0, 0.0, args.out / "state.pt"
    if path.exists():
        state = torch.load(path)
        optimiser.load_state_dict(state["optimiser"])
        average.weights = state["average"]
        step, seconds = state["step"], state["seconds"]
    rng = random.Random(step * world_size + rank)
    torch.manual_seed(step * world_size + rank)
    pool = Pool(vae, rng, args.walks)
    while len(pool.walks) < 60:
        pool.add()

    def checkpoint() -> None:
        if rank == 0:
            trained = {"optimiser": optimiser.state_dict(), "average": average.weights}
            save(path, {**trained, "step": step, "seconds": clock.seconds})
            export(average.weights, model, args.vae, args.out / "meadow")

    clock = Clock(args.minutes, seconds)
    shown, saved = None, clock.seconds
    while (rate := clock.rate(args.rate, step)) > 0:
        # The pool is filled as training goes, and then renewed slowly.
        if step % (2 if len(pool.walks) < args.walks else 8) == 0:
            pool.add()
        loss = loss_of(model, pool, rng, args.clips, OWN if step >= OWN_FROM else 0.0)
        loss.backward()
        optimiser.step(rate)
        step += 1
        average.update(optimiser.master, step)
        shown = loss.item() if shown is None else 0.97 * shown + 0.03 * loss.item()
        if rank == 0 and step % 20 == 0:
            say(f"step {step}: loss {shown:.4f}, rate {rate:.1e}, {clock.seconds:.0f} s")
        if clock.seconds - saved > 240:
            checkpoint()
            saved = clock.seconds
    checkpoint()


if __name__ == "__main__":
    main()
