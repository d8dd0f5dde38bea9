"""Play sessions of the engine by random walks and score them by the reader.

    python -m examples.meadow.score sora_engine/checkpoints/meadow --sessions 100 --steps 200
    python -m examples.meadow.score sora_engine/checkpoints/meadow --sessions 20 --shared

`--recall 0` takes its memory away, and `--by recency` has it recall the last latent frames before
its context, wherever they were seen from. Sessions run side by side, and their steps are packed.
With `--shared` each is two sessions with one memory: one walks off, paints, and comes back; then
the other follows it. Does it see what was painted?
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import sora_engine as sora
from examples.meadow import reader, world
from examples.meadow.scoring import Share, Tally, score
from examples.sprites.training import say
from sora_engine.runtime.recall import Recent


def play(
    engine: sora.Engine, number: int, steps: int, *, given: bool, by: str, options: dict[str, Any]
) -> tuple[Tally, np.ndarray]:
    """One session: its tally, and the last frame of each step. by: what is recalled, see `main`."""
    rng = random.Random(number)
    look = world.some_look(rng)
    first = world.World(rng, look).view() if given else None
    walk = world.some_walk(rng, steps)
    request = sora.SessionRequest(look.caption(), first=first, seed=number, rewind=0, **options)
    shown = []
    with engine.open_session(request) as session:
        driving = session.settings.driving
        side = (driving.world or (0, 0))[0]
        if by == "recency":
            seen = session.memory.index.moments
            session.memory.index = Recent(driving.context + driving.recall, seen)
        shown.append(session.frames[-1])
        for button in walk:
            shown.append(session.step(sora.Action(button) if button else None)[-1])
    readings = [reader.read(frame, look) for frame in shown]
    return score(readings, walk, side, given=given), np.stack(shown)


def share(
    engine: sora.Engine, number: int, options: dict[str, Any]
) -> tuple[Share, Share, np.ndarray]:
    """Of what one session made out of the other's sight: how much the other sees as it is, and how
    much of that is paint or earth; and what the other saw last of each step."""
    rng = random.Random(number)
    look = world.some_look(rng)
    way, back = rng.choice(list(world.OPPOSITE.items()))
    out = [way] * 5 + [button for _ in range(5) for button in (way, "act")]
    home = [back] * sum(button == way for button in out)
    first = world.World(rng, look).view()
    request = sora.SessionRequest(look.caption(), first=first, seed=number, rewind=0, **options)
    down, right = world.STEPS[way]
    middle, edge = world.CENTRE, (world.VIEW - 1 if down + right > 0 else 0)
    made, seen, shown = Share(), Share(), []
    with engine.open_session(request) as one:
        painted: dict[int, int] = {}
        for button in (*out, *home):
            frame = one.step(sora.Action(button))[-1]
            at = round(sum(one.place)) // world.TILE
            if button == "act":
                painted[at] = int(reader.read(frame, look).tiles[middle, middle])
                made.add(painted[at] in (world.EARTH, world.PAINT))
        again = replace(request, first=frame, place=one.place, seed=number + 1)
        with engine.open_session(again, memory=one.memory) as other:
            for _ in range(sum(button == way for button in out)):
                frame = other.step(sora.Action(way))[-1]
                shown.append(frame)
                ahead = round(sum(other.place)) // world.TILE + (edge - middle)
                row, column = (edge, middle) if down else (middle, edge)
                if ahead in painted:
                    kind = int(reader.read(frame, look).tiles[row, column])
                    seen.add(kind == painted[ahead])
    return seen, made, np.stack(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, or the name of a bundled one")
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--begin", choices=("given", "dreamt"), default="given")
    parser.add_argument("--recall", type=int, help="latent frames recalled; 0: none")
    parser.add_argument("--by", choices=("places", "recency"), default="places", help="recalled")
    parser.add_argument("--denoise", type=int, help="steps of a latent frame")
    parser.add_argument("--together", type=int, default=8, help="sessions at once")
    parser.add_argument("--seed", type=int, default=1000, help="of the first session")
    parser.add_argument("--shared", action="store_true", help="two sessions with one memory")
    parser.add_argument("--sheet", type=Path, help="a picture of frames of the first sessions")
    args = parser.parse_args()
    options = {"recall": args.recall, "num_inference_steps": args.denoise}
    total, films = Tally(), []
    with (
        sora.Engine.from_pretrained(args.model) as engine,
        ThreadPoolExecutor(args.together) as threads,
    ):
        if args.shared:
            seen, made = Share(), Share()
            for i in range(args.sessions):
                one, two, _ = share(engine, args.seed + i, options)
                seen += one
                made += two
            say(f"made by one {made}; seen by the other as it was made {seen}")
            sys.exit()
        jobs = [
            threads.submit(
                *(play, engine, args.seed + i, args.steps),
                given=args.begin == "given",
                by=args.by,
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
