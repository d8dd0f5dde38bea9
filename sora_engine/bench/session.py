"""Worlds in real time: frames a second, from an input to its frame, players in one pack, memory.

A session at the checkpoint's own settings, played by seeded hands. Nothing is beside it: what
counts is whether it holds the rate that the checkpoint asks for.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sora_engine.bench.peak import resident
from sora_engine.bench.results import SUBJECT, Measurement
from sora_engine.bench.serving import with_percentiles
from sora_engine.request import Action, ActionSpace, SessionRequest
from sora_engine.request.keys import Keys
from sora_engine.runtime.engine import Engine
from sora_engine.runtime.pace import Tick
from sora_engine.runtime.session import Session

WORLD = "meadow"
GAPS_S = (0.3, 1.2)
"""Between two key strokes of a player; each time in between is as likely."""
STRETCH_S = 10.0
"""Of a stream, by which its rate is told."""
MIB = 2**20


@dataclass(slots=True)
class Streamed:
    """What came of a stream. at_s: when each tick was given. shown_s: from each key stroke to the
    first frame that was made after it."""

    ticks: list[Tick] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    shown_s: list[float] = field(default_factory=list)


class Hands:
    """A player whose keys go down at random times, which a stream may ask for an action."""

    def __init__(self, space: ActionSpace, seconds: float, seed: int) -> None:
        self._space, self._seconds = space, seconds
        self._random = random.Random(seed)
        self._keys = Keys()
        self._over = threading.Event()
        self._typing = threading.Thread(target=self._type, daemon=True)
        self.struck_at: float | None = None
        """When the key went down that the latest action tells of; None where there was none."""

    def __call__(self) -> Action | None:
        if self._typing.ident is None:
            self._typing.start()
        struck, action = self._keys.changed_at, self._keys()
        self.struck_at = struck if action is not None and action.press else None
        return action

    def close(self) -> None:
        """Keys rest."""
        self._over.set()
        if self._typing.ident is not None:
            self._typing.join()

    def _type(self) -> None:
        until = time.monotonic() + self._seconds
        while time.monotonic() < until:
            if self._over.wait(self._random.uniform(*GAPS_S)):
                return
            self._keys.tap(self._random.choice(self._space.buttons))
        self._keys.stop()


def session(
    *,
    model: str | Path = WORLD,
    seconds: float = 60.0,
    players: Sequence[int] = (1, 2, 3, 8),
    steps: int = 60,
    long_steps: int = 1000,
) -> list[Measurement]:
    """A stream of `seconds`, `steps` of several players as fast as it goes, and the memory over
    `long_steps`."""
    with Engine.from_pretrained(model, device="cpu") as engine:
        with engine.open_session(SessionRequest(seed=1)) as warm:
            at_random(warm, 8, seed=1)
        return [
            *in_time(engine, seconds),
            *(together(engine, count, steps) for count in players),
            over_time(engine, long_steps),
        ]


def in_time(engine: Engine, seconds: float) -> list[Measurement]:
    """One player at the checkpoint's rate."""
    with engine.open_session(SessionRequest(seed=2)) as world:
        found = streamed(world, seconds)
        stats, asked = world.stats, world.fps
    frames = [len(tick.frames) for tick in found.ticks]
    figures = {"asked": asked, "late": stats.late, "stalls": stats.stalls, "seconds": seconds}
    return [
        Measurement(
            "session: frames a second held",
            "frames/s",
            {SUBJECT: rates(found.at_s, frames)},
            "higher",
            paired=False,
            figures=figures,
        ),
        with_percentiles(
            Measurement(
                "session: a latent frame, denoised and decoded",
                "s",
                {SUBJECT: [tick.spent_s for tick in found.ticks]},
                paired=False,
                figures={"frames": max(frames)},
            )
        ),
        with_percentiles(
            Measurement(
                "session: from an input to its first frame",
                "s",
                {SUBJECT: found.shown_s},
                paired=False,
                figures={"inputs": len(found.shown_s)},
            )
        ),
    ]


def streamed(world: Session, seconds: float) -> Streamed:
    """A stream that lasts so long."""
    hands, found = Hands(world.actions, seconds, seed=3), Streamed()
    try:
        for tick in world.stream(hands):
            now = time.monotonic()
            found.ticks.append(tick)
            found.at_s.append(now)
            if hands.struck_at is not None:
                found.shown_s.append(now - hands.struck_at)
    finally:
        hands.close()
    return found


def rates(at_s: Sequence[float], frames: Sequence[int]) -> list[float]:
    """Frames a second in each stretch of a stream. at_s: when each tick was given, which lasts
    until the next one."""
    found: list[float] = []
    begun, count = at_s[0], 0
    for now, shown in zip(at_s[1:], frames[:-1], strict=True):
        count += shown
        if now - begun >= STRETCH_S:
            found.append(count / (now - begun))
            begun, count = now, 0
    if count and not found:  # it was shorter than one
        found.append(count / (at_s[-1] - begun))
    return found


def together(engine: Engine, count: int, steps: int) -> Measurement:
    """Players who each do as many steps as fast as it goes, in one pack."""
    worlds = [engine.open_session(SessionRequest(seed=10 + i)) for i in range(count)]
    rate: list[float] = [0.0] * count
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def play(i: int) -> None:
        try:
            barrier.wait()
            begun = time.monotonic()
            frames = at_random(worlds[i], steps, seed=i)
            rate[i] = frames / (time.monotonic() - begun)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=play, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    company = max(world.stats.company for world in worlds)
    for world in worlds:
        world.close()
    if errors:
        raise errors[0]
    noun = "player" if count == 1 else "players"
    return Measurement(
        f"session: frames a second of each of {count} {noun}, as fast as it goes",
        "frames/s",
        {SUBJECT: rate},
        "higher",
        paired=False,
        figures={"all together": sum(rate), "most in a pack": company, "steps": steps},
    )


def over_time(engine: Engine, steps: int, points: int = 10) -> Measurement:
    """What a session holds while it goes on, and how far the process grows beside it from a tenth
    of the way on, when the world is seen."""
    request = SessionRequest(seed=4)
    held, grown = [], []
    with engine.open_session(request) as world:
        planned = engine.plan(request).held
        for point in range(points):
            at_random(world, max(1, steps // points), seed=point)
            held.append(world.stats.bytes_held / MIB)
            grown.append(resident("VmRSS") / MIB)
        places = world.stats.num_places
    return Measurement(
        f"session: held over {steps} steps",
        "MiB",
        {SUBJECT: held},
        paired=False,
        figures={
            "planned": planned / MIB,
            "resident, growth from the first tenth": grown[-1] - grown[0],
            "places": places,
        },
    )


def at_random(world: Session, steps: int, seed: int) -> int:
    """Buttons at random; the number of frames that came."""
    choose = random.Random(seed)
    choices = [Action(), *(Action(frozenset({button})) for button in world.actions.buttons)]
    return sum(len(world.step(choose.choice(choices))) for _ in range(steps))
