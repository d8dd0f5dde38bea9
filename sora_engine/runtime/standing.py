"""What a session is between two steps, and how its past is told."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sora_engine.errors import MarkError
from sora_engine.request import Action
from sora_engine.runtime.recall import Index, Moment
from sora_engine.vae.state import VAEState
from sora_engine.vae.tiling import TiledState


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """Actions as runs of equal ones, newest first: a session and its marks share what is the same.

    step: how many actions there are.
    """

    action: Action
    times: int
    before: Log | None
    step: int

    @staticmethod
    def with_one(log: Log | None, action: Action) -> Log:
        """The log with a further action."""
        if log is None:
            return Log(action, 1, None, 1)
        if log.action == action:
            return replace(log, times=log.times + 1, step=log.step + 1)
        return Log(action, 1, log, log.step + 1)

    @staticmethod
    def runs(log: Log | None) -> list[tuple[Action, int]]:
        """Oldest first, each with how often it was done."""
        found = []
        while log is not None:
            found.append((log.action, log.times))
            log = log.before
        return found[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """A session after so many actions. Nothing in it ever changes, so marks and branches share it.

    context: the last latent frames. decoder: the state after them; None: it is made again from
    them. index: what was remembered. prompt: the text in force. frames: uint8 `[n, height, width,
    3]`, those that came last. company: the most jobs that were in a batch with a step of it, itself
    included.
    """

    context: tuple[Moment, ...]
    decoder: Any
    index: Index
    prompt: str
    frames: np.ndarray
    log: Log | None = None
    company: int = 1

    @property
    def step(self) -> int:
        """Actions so far."""
        return 0 if self.log is None else self.log.step

    @property
    def nbytes(self) -> int:
        """What it holds that memory does not."""
        return state_bytes(self.decoder) + self.frames.nbytes + self.context[-1].nbytes

    def on_host(self) -> Standing:
        """As it is where the device has failed: with no decoder's state that lies there."""
        if isinstance(self.decoder, VAEState):
            caches = [cache for cache in self.decoder.caches if cache is not None]
            if all(cache.device.type == "cpu" for cache in caches):
                return self
        return replace(self, decoder=None)


class Mark:
    """A session's state at one moment, to go back to: `Session.mark`.

    step: how many actions had been done. It takes no time to make, and holds no more than the
    decoder's state and what the session has since forgotten.
    """

    def __init__(self, standing: Standing, session: object) -> None:
        self.step = standing.step
        self._standing: Standing | None = standing
        self._session = weakref.ref(session)

    def __repr__(self) -> str:
        kept = "" if self._standing is not None else ", forgotten"
        return f"<Mark at step {self.step}{kept}>"

    @property
    def forgotten(self) -> bool:
        """Whether it is too old to go back to."""
        return self._standing is None

    def forget(self) -> None:
        """Let go of what it holds."""
        self._standing = None

    def standing_for(self, session: object, oldest: int) -> Standing:
        """What it holds; MarkError where it is another session's, or forgotten.

        oldest: the first step that the session can still go back to.
        """
        if self._session() is not session:
            raise MarkError(
                f"the mark at step {self.step} is another session's; "
                "`branch` of that one makes a session from it"
            )
        if self._standing is None:
            raise MarkError(
                f"the mark at step {self.step} is forgotten; the oldest step that is kept is "
                f"{oldest}"
            )
        return self._standing


class Past:
    """The last standings of a session, for going back without a mark."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._kept: list[Standing] = []

    def __iter__(self) -> Iterator[Standing]:
        return iter(self._kept)

    def oldest(self, now: Standing) -> int:
        """The first step that is kept."""
        return self._kept[0].step if self._kept else now.step

    def add(self, standing: Standing) -> None:
        """A step leads on from this."""
        self._kept = [*self._kept, standing][-self._length :] if self._length else []

    def back(self, now: Standing, steps: int) -> Standing:
        """What was so many steps ago; MarkError where that is forgotten."""
        if steps == 0:
            return now
        if steps > len(self._kept):
            oldest = self.oldest(now)
            raise MarkError(
                f"{steps} steps back from step {now.step} is forgotten, or was never; the oldest "
                f"step that is kept is {oldest}, {now.step - oldest} back"
            )
        return self._kept[-steps]

    def cut(self, standing: Standing) -> None:
        """The session is at this standing now: what came before it, as far as it is kept."""
        at = [i for i, kept in enumerate(self._kept) if kept is standing]
        if at:
            self._kept = self._kept[: at[0]]
        else:
            self._kept = [kept for kept in self._kept if is_before(kept, standing)]

    def clear(self) -> None:
        """Forget all."""
        self._kept = []


def is_before(one: Standing, other: Standing) -> bool:
    """Whether the one lies on the other's way, by their actions."""
    own, log = one.log, other.log
    if own is None or log is None:
        return own is None and log is not None
    while log.before is not None and log.step - log.times >= own.step:
        log = log.before
    same = log.before is own.before and log.action == own.action
    return same and own.step < other.step


def state_bytes(state: Any) -> int:
    """What a decoder's state takes, as far as that is known."""
    if isinstance(state, TiledState):
        return sum(state_bytes(tile) for tile in state.tiles)
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, (tuple, list)):
        return sum(map(state_bytes, state))
    return int(getattr(state, "nbytes", 0))
