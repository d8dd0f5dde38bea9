"""Play sessions of the engine by random walks and score them by the reader.

    python -m examples.meadow.score sora_engine/checkpoints/meadow --sessions 100 --steps 200

`--recall 0` takes its memory away. Sessions run side by side, and their steps are packed.
"""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import sora_engine as sora
from examples.meadow import reader, world
from examples.meadow.scoring import Tally, score
from examples.sprites.training import say


def play(
    engine: sora.Engine, number: int, steps: int, *, given: bool, options: dict[str, Any]
) -> tuple[Tally, np.ndarray]:
    """One session: its tally, and the last frame of each step."""
    rng = random.Random(number)
    look = world.some_look(rng)
    first = world.World(rng, look).view() if given else None
    walk = world.some_walk(rng, steps)
    request = sora.SessionRequest(look.caption(), first=first, seed=number, rewind=0, **options)
    shown = []
    with engine.open_session(request) as session:
        side = (session.settings.driving.world or (0, 0))[0]
        shown.append(session.frames[-1])
        for button in walk:
            shown.append(session.step(sora.Action(button) if button else None)[-1])
    readings = [reader.read(frame, look) for frame in shown]
    return score(readings, walk, side, given=given), np.stack(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--begin", choices=("given", "dreamt"), default="given")
    parser.add_argument("--recall", type=int, help="latent frames recalled; 0: none")
    parser.add_argument("--denoise", type=int, help="steps of a latent frame")
    parser.add_argument("--together", type=int, default=8, help="sessions at once")
    parser.add_argument("--seed", type=int, default=1000, help="of the first session")
    parser.add_argument("--sheet", type=Path, help="a picture of frames of the first sessions")
    args = parser.parse_args()
    options = {"recall": args.recall, "num_inference_steps": args.denoise}
    total, films = Tally(), []
    with (
        sora.Engine.from_pretrained(args.model) as engine,
        ThreadPoolExecutor(args.together) as threads,
    ):
        jobs = [
            threads.submit(
                *(play, engine, args.seed + i, args.steps),
                given=args.begin == "given",
                options=options,
            )
            for i in range(args.sessions)
        ]
        for job in jobs:
            tally, film = job.result()
            total.add(tally)
            films.append(film[:: max(1, args.steps // 12)] if len(films) < 8 else film[:1])
    say(json.dumps({key: str(value) for key, value in vars(args).items() if value is not None}))
    print("\n".join(total.lines()))
    if args.sheet:
        from PIL import Image

        rows = [np.concatenate(list(film), axis=1) for film in films[:8]]
        Image.fromarray(np.concatenate(rows)).save(args.sheet)


if __name__ == "__main__":
    main()
