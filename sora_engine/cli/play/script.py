"""Worlds that nobody watches: actions that were written down, or a policy's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sora_engine.cli.app import UsageError, say
from sora_engine.request import Action, ActionSpace

if TYPE_CHECKING:
    from sora_engine.runtime.session import Session


def still(space: ActionSpace, seed: int) -> Iterator[Action]:
    """Nothing is ever done."""
    while True:
        yield Action()


def at_random(space: ActionSpace, seed: int) -> Iterator[Action]:
    """At each step one of the buttons or none, each as likely; the seed says which."""
    choose = random.Random(f"policy:{seed}")
    choices = [Action(), *(Action(frozenset({button})) for button in space.buttons)]
    while True:
        yield choose.choice(choices)


Policy = Callable[[ActionSpace, int], Iterator[Action]]
POLICIES: dict[str, Policy] = {"random": at_random, "still": still}


def policy_named(name: str) -> Policy:
    """One of `POLICIES`; UsageError for no name of one."""
    if name not in POLICIES:
        raise UsageError(f"--policy: {name!r} is none; {' or '.join(POLICIES)} would work")
    return POLICIES[name]


def run(world: Session, actions: Iterable[Action], total: int, output: Path | None) -> int:
    """Do them one after the other, as fast as it goes; a line is said at each tenth. Returns the
    number of frames. output: the recording."""
    frames = 0
    with contextlib.ExitStack() as stack:
        if output is not None:
            stack.enter_context(world.record(output))
        for done, action in enumerate(actions, 1):
            frames += len(world.step(action))
            tell(done, total)
    return frames


def tell(done: int, total: int) -> None:
    """A line at each tenth of the steps."""
    if done == total or done * 10 // total > (done - 1) * 10 // total:
        say(f"step {done}/{total}")


def summary(world: Session) -> str:
    """How it went, in a line."""
    stats = world.stats
    return (
        f"seed {world.seed}, {stats.fps:.1f} frames a second of work, {stats.step_ms:.0f} ms a "
        f"latent (p95 {stats.step_p95_ms:.0f}), {stats.num_places} places"
    )
