"""Buttons that are held down, and taps: what a player's hands do, as actions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from sora_engine.request.actions import Action

Clock = Callable[[], float]


class Keys:
    """The latest state of some buttons. `Session.stream` asks it once a latent frame.

    What is held goes on until it is released; a tap counts once, in the next latent frame. Safe to
    use from any thread.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._held: set[str] = set()
        self._tapped: set[str] = set()
        self._prompt: str | None = None
        self._over = False
        self._changed = clock()
        self._lock = threading.Lock()

    def press(self, *buttons: str) -> None:
        """Hold these down, from now on."""
        self._change(self._held.update, buttons)

    def release(self, *buttons: str) -> None:
        """Hold these down no longer."""
        self._change(self._held.difference_update, buttons)

    def tap(self, *buttons: str) -> None:
        """Press these once."""
        self._change(self._tapped.update, buttons)

    def say(self, prompt: str) -> None:
        """Another text, from the next latent frame on."""
        with self._lock:
            self._prompt, self._changed = prompt, self._clock()

    def stop(self) -> None:
        """End the stream."""
        with self._lock:
            self._over = True

    @property
    def changed_at(self) -> float:
        """When they last changed, by the clock."""
        return self._changed

    def __call__(self) -> Action | None:
        """What is done now; None once it is over. Taps are done with."""
        with self._lock:
            if self._over:
                return None
            action = Action(frozenset(self._held | self._tapped), prompt=self._prompt)
            self._tapped.clear()
            self._prompt = None
            return action

    def _change(self, change: Callable[[Iterable[str]], None], buttons: Iterable[str]) -> None:
        with self._lock:
            change(buttons)
            self._changed = self._clock()
