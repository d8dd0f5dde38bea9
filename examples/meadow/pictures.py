"""The pictures of permanence in docs/worlds.md, and a film of a walk, played by the engine.

    python -m examples.meadow.pictures --still docs/pictures/meadow.webp --film docs/meadow.gif

Each row of the still is a session of its own: tiles are acted on, the player walks away until
nothing of them is in view, and walks back. The last column has the same actions without the memory
of places.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import sora_engine as sora
from sora_engine.io.video_writer import write_video

PROMPTS = (
    "a green meadow with red berries and blue paint",
    "a sandy meadow with purple berries and teal paint",
    "a snowy meadow with orange berries and pink paint",
)
PAINT, AWAY, BACK = "act right act right act down", "right*10", "left*10"
WALK = "right*2 act right act down act left*3 up*2 act right*12 act up act left*13 down*3"
SCALE, GAP = 3, 6


def row(engine: sora.Engine, request: sora.SessionRequest) -> list[np.ndarray]:
    """Frames of one session: painted, away, back, and back without recall."""
    shown = []
    with engine.open_session(request) as session:
        for part in (PAINT, AWAY, BACK):
            for action in session.actions.parse(part):
                frames = session.step(action)
            shown.append(frames[-1])
    with engine.open_session(replace(request, recall=0)) as session:
        for action in session.actions.parse(f"{PAINT} {AWAY} {BACK}"):
            frames = session.step(action)
    return [*shown, frames[-1]]


def still(engine: sora.Engine, seed: int) -> Image.Image:
    """All rows, white between, every pixel `SCALE` times."""
    rows = []
    for i, prompt in enumerate(PROMPTS):
        frames = row(engine, sora.SessionRequest(prompt, seed=seed + i))
        edge = ((GAP, GAP), (GAP, GAP), (0, 0))
        large = [frame.repeat(SCALE, 0).repeat(SCALE, 1) for frame in frames]
        rows.append(np.concatenate([np.pad(f, edge, constant_values=255) for f in large], axis=1))
    return Image.fromarray(np.concatenate(rows))


def film(engine: sora.Engine, seed: int) -> np.ndarray:
    """A walk, uint8 `[frames, height, width, 3]`: every other frame, every pixel twice."""
    with engine.open_session(sora.SessionRequest(PROMPTS[0], seed=seed)) as session:
        steps = [session.step(action) for action in session.actions.parse(WALK)]
    return np.concatenate(steps)[1::2].repeat(2, 1).repeat(2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="meadow", help="'meadow' or a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--still", type=Path)
    parser.add_argument("--film", type=Path)
    args = parser.parse_args()
    with sora.Engine.from_pretrained(args.model) as engine:
        if args.still:
            still(engine, args.seed).save(args.still, lossless=True)
        if args.film:
            write_video(args.film, film(engine, args.seed), 8)


if __name__ == "__main__":
    main()
