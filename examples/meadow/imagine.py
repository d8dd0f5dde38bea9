"""Play sessions in a trained network as the engine does, many at a time, and score them.

    python -m examples.meadow.imagine runs/meadow/meadow --sessions 12 --steps 60

It is how training is watched: it packs and samples with the engine's own parts, without an engine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.meadow import reader, world
from examples.meadow.model import CONTEXT, RECALLED, SHIFT, Meadow
from examples.meadow.pool import action_row, choose
from examples.meadow.scoring import Tally, score
from examples.meadow.train_vae import load_vae
from examples.meadow.walks import as_frames, as_video
from examples.sprites.training import say
from sora_engine.denoise.conditioning import Context
from sora_engine.denoise.drive import sight
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.vae.wan import WanVAE


class Memory:
    """Which latent frame last saw each tile of a torus."""

    def __init__(self, side: int) -> None:
        self.last = np.full((side, side), -1)
        self.places: list[tuple[int, int]] = []

    def add(self, place: tuple[int, int]) -> None:
        """One more latent frame, seen from there."""
        self.last[world.in_view(place, len(self.last))] = len(self.places)
        self.places.append(place)

    def pick(self, view: tuple[int, int], context: list[tuple[int, int]], most: int) -> list[int]:
        """The frames that show most of what `view` does and the context does not; oldest first."""
        side = len(self.last)
        need = np.zeros_like(self.last, bool)
        need[world.in_view(view, side)] = True
        for place in context:
            need[world.in_view(place, side)] = False
        return choose(self.last, self.places, need, most)


class Dream:
    """One session: its latents so far, what was done, and where it is."""

    def __init__(self, context: Context, side: int, seed: int, *, recall: str) -> None:
        self.context, self.side, self.recall = context, side, recall
        self.noise = torch.Generator().manual_seed(seed)
        self.latents: list[Tensor] = []
        self.actions: list[Tensor] = []
        self.places: list[tuple[int, int]] = []
        self.memory = Memory(side)

    def begin(self, button: str | None) -> None:
        """Lay out the next latent frame: noise, behind what is known."""
        down, right = world.STEPS.get(button or "", (0, 0))
        here = self.places[-1] if self.places else (0, 0)
        self.view = ((here[0] + down) % self.side, (here[1] + right) % self.side)
        count = len(self.latents)
        low = max(0, count - CONTEXT)
        near = list(range(low, count))
        old: list[int] = []
        if self.recall == "places":
            seen = [self.places[i] for i in near]
            old = self.memory.pick(self.view, seen, RECALLED)
        elif self.recall == "recency":
            old = list(range(max(0, low - RECALLED), low))
        self.ids, self.recalled = old + near, len(old)
        self.action = action_row(button)
        self.x = torch.randn(24, 8, 8, generator=self.noise)

    def segment(self, level: float) -> Segment:
        known = [self.latents[i] for i in self.ids]
        frames = len(known) + 1
        at = np.array([*(self.places[i] for i in self.ids), self.view])
        offsets = (at - at[-1] + self.side // 2) % self.side - self.side // 2
        return Segment(
            torch.stack([*known, self.x], dim=1),
            torch.tensor([*[0.0] * len(known), level * 1000]),
            ((self.context, frames),),
            sees=sight(self.recalled, len(known) - self.recalled),
            num_anchors=self.recalled,
            actions=torch.stack([*(self.actions[i] for i in self.ids), self.action]),
            places=torch.from_numpy(offsets).float(),
        )

    def move(self, x0: Tensor, level: float) -> None:
        """Renoise the estimate to a level."""
        fresh = torch.randn(x0.shape, generator=self.noise)
        self.x = (1 - level) * x0 + level * fresh

    def end(self) -> None:
        """The new frame is done."""
        self.put(self.x)
        self.actions.append(self.action)

    def put(self, latent: Tensor) -> None:
        self.memory.add(self.view)
        self.latents.append(latent)
        self.places.append(self.view)


def levels(steps: int) -> list[float]:
    line = torch.linspace(1, 0, steps + 1)
    return (SHIFT * line / (1 + (SHIFT - 1) * line)).tolist()


@torch.no_grad()
def make(model: Meadow, packer: Packer, dreams: list[Dream], steps: int) -> None:
    """Denoise the frame that each has begun."""
    line = levels(steps)
    for here, there in itertools.pairwise(line):
        batch = packer.pack([dream.segment(here) for dream in dreams])
        parts = packer.unpack(model.transformer(batch), batch, 24)
        for dream, part in zip(dreams, parts, strict=True):
            dream.move(part[:, -1], there)
    for dream in dreams:
        dream.end()


@torch.no_grad()
def play(
    model: Meadow,
    vae: WanVAE,
    count: int,
    steps: int,
    *,
    denoise: int,
    given: bool,
    recall: str = "places",
    seed: int = 0,
) -> tuple[Tally, list[np.ndarray]]:
    """Sessions of random walks; their score, and the last frame of each step of each."""
    rng = random.Random(seed)
    looks = [world.some_look(rng) for _ in range(count)]
    contexts = model.contexts([look.caption() for look in looks])
    dreams = [Dream(c, world.MAP, seed + i, recall=recall) for i, c in enumerate(contexts)]
    walks = [world.some_walk(rng, steps) for _ in range(count)]
    packer = Packer((1, 2, 2), torch.device("cpu"), max_layouts=1)
    for dream, look in zip(dreams, looks, strict=True):
        dream.begin(None)
        if given:
            view = world.World(rng, look).view()
            dream.x = vae.encode(as_video(view[None])[None])[0, :, 0].float()
    if given:
        for dream in dreams:
            dream.end()
    else:
        make(model, packer, dreams, 16)
    for step in range(steps):
        for dream, walk in zip(dreams, walks, strict=True):
            dream.begin(walk[step])
        make(model, packer, dreams, denoise)
    tally, films = Tally(), []
    for dream, look, walk in zip(dreams, looks, walks, strict=True):
        state, shown = None, []
        for latent in dream.latents:
            frames, state = vae.decode_chunk(latent[None, :, None], state, consume=True)
            shown.append(as_frames(frames[0])[-1])
        readings = [reader.read(frame, look) for frame in shown]
        tally.add(score(readings, walk, world.MAP, given=given))
        films.append(np.stack(shown))
    return tally, films


def load(folder: Path) -> tuple[Meadow, WanVAE]:
    """The networks of a folder that `export` wrote."""
    model = Meadow(folder / "text_encoder").eval().requires_grad_(False)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    model.transformer.load_state_dict({name: w.float() for name, w in weights.items()})
    return model, load_vae(folder / "vae").prepare()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--denoise", type=int, nargs="+", default=[4])
    parser.add_argument("--recall", nargs="+", default=["places"])
    parser.add_argument("--begin", choices=("given", "dreamt"), nargs="+", default=["given"])
    parser.add_argument("--sheet", type=Path, help="a picture of the first sessions' frames")
    args = parser.parse_args()
    model, vae = load(args.folder)
    for begin in args.begin:
        for recall in args.recall:
            for denoise in args.denoise:
                tally, films = play(
                    *(model, vae, args.sessions, args.steps),
                    denoise=denoise,
                    given=begin == "given",
                    recall=recall,
                )
                say(json.dumps({"begin": begin, "recall": recall, "denoise": denoise}))
                print("\n".join("  " + line for line in tally.lines()), flush=True)
    if args.sheet:
        from PIL import Image

        every = max(1, args.steps // 12)
        rows = [np.concatenate(list(film[::every]), axis=1) for film in films[:8]]
        Image.fromarray(np.concatenate(rows)).save(args.sheet)


if __name__ == "__main__":
    main()
