"""The ends of engines that nobody closes: let go of, forked, or left behind at exit."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Sequence
from typing import Protocol

from sora_engine.errors import EngineForkedError

EXIT_S = 5.0
"""How long the process's end waits for what is under way: a step cannot be cut short."""


class Stoppable(Protocol):
    """A worker, as far as its end is concerned."""

    def let_go(self) -> None:
        """Nobody will ask for more: finish what is there, then stop."""
        ...

    def cancel(self) -> None:
        """Cancel what is there, and stop."""
        ...

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end."""
        ...


class Origin:
    """The process in which something was made."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        return os.getpid() == self._pid

    @property
    def error(self) -> EngineForkedError | None:
        """The error of this process, if it is another one."""
        if self.here:
            return None
        return EngineForkedError(
            f"this engine was made in process {self._pid}, and this is process {os.getpid()}, "
            "forked later: threads and devices do not come along. Make the engine after the fork, "
            "one in each process (gunicorn: in post_worker_init, not under --preload)"
        )

    def check(self) -> None:
        """Raises EngineForkedError in another process. Before any lock: the fork may have caught
        one that is held."""
        if (error := self.error) is not None:
            raise error


def stop_when_dropped(owner: object, workers: Sequence[Stoppable]) -> None:
    """Stop workers once nobody holds their owner, and when the process ends.

    Jobs that are under way when it is dropped are still done: somebody may wait for them.
    """
    weakref.finalize(owner, _let_go, list(workers), Origin()).atexit = False
    _living.update(workers)


def _let_go(workers: Sequence[Stoppable], origin: Origin) -> None:
    if origin.here:
        for worker in workers:
            worker.let_go()


_living: weakref.WeakSet[Stoppable] = weakref.WeakSet()


def _at_exit() -> None:
    """Stop all threads before the interpreter tears down what they use."""
    workers = list(_living)
    for worker in workers:
        worker.cancel()
    for worker in workers:
        worker.join(EXIT_S)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_living.clear)
