"""A world that somebody plays: a thread makes it, others show it and say what is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sora_engine.cli.play.feed import Feed
from sora_engine.errors import (
    JobCancelledError,
    MarkError,
    MediaError,
    MemoryLimitError,
    SessionLimitError,
)
from sora_engine.request import Action
from sora_engine.request.keys import Keys

if TYPE_CHECKING:
    from sora_engine.runtime.recording import Recording
    from sora_engine.runtime.session import Session
    from sora_engine.runtime.standing import Mark

REWIND_S = 2.0
"""How far `rewind` goes back."""
SAME_S = 0.15
"""A key that is held repeats faster than this; what it says counts once."""
MESSAGE_S = 6.0
"""How long what happened is told."""

COMMANDS = {
    "q": "quit",
    "z": "rewind",
    "r": "record",
    "m": "mark",
    "b": "branch",
    "tab": "next",
    "p": "pause",
}
"""What keys say, beside those that are buttons of the world. A narrow window names the first."""


class Player(Feed):
    """Worlds, of which one is played. `start` it, and `stop` it in the end.

    world: the first; it is closed by whoever opened it. output: where recordings go, a number
    added where there is a file already. Frames are in the feed; the commands are those of
    `COMMANDS`.
    """

    def __init__(
        self, world: Session, output: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self.keys = Keys(clock)
        self.recorded: list[Path] = []
        self._output = output
        self._worlds = [world]
        self._at = 0
        self._marked: tuple[Session, Mark] | None = None
        self._recording: Recording | None = None
        self._paused = False
        self._stopped = False
        self._pending: dict[str, None] = {}
        self._asked_at: dict[str, float] = {}
        self._said_at = clock()
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sora-play", daemon=True)

    @property
    def world(self) -> Session:
        """The one that is played."""
        return self._worlds[self._at]

    def start(self) -> None:
        """Make it, from now on."""
        self.put(self.world.frames, self.world.fps)
        self._tell()
        self._thread.start()

    def do(self, command: str) -> None:
        """Do one of `COMMANDS`, before the next latent frame is made."""
        now = self._clock()
        with self._turn:
            again = now - self._asked_at.get(command, -SAME_S) < SAME_S
            self._asked_at[command] = now
            if again:
                return
            if command == "quit":
                self._stopped = True
            self._pending[command] = None
            self._turn.notify_all()

    def stop(self) -> None:
        """End it, the recording too, and close the worlds that branched off."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        if self._thread.ident is not None:
            self.world.cancel()  # a step of a large model takes long
            self._thread.join()
        for world in self._worlds[1:]:
            world.close()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while not self._stopped:
                for tick in self.world.stream(self._ask):
                    self.put(tick.frames, self.world.fps)
                    self._tell()
                self._while_paused()
        except BaseException as raised:  # the thread that shows it raises it
            if not (self._stopped and isinstance(raised, JobCancelledError)):
                error = raised
        try:
            self._end_recording()
        except MediaError as raised:
            error = error or raised
        self.end(error)

    def _ask(self) -> Action | None:
        """What is done in the next latent frame; None where the stream is to end."""
        world = self.world
        self._do_pending()
        if self._stopped or self._paused or self.world is not world:
            return None
        return self.keys()

    def _while_paused(self) -> None:
        while self._paused and not self._stopped:
            with self._turn:
                if not self._pending and not self._stopped:
                    self._turn.wait()
            self._do_pending()
            self._tell()

    def _do_pending(self) -> None:
        with self._turn:
            commands = list(self._pending)
            self._pending.clear()
        for command in commands:
            try:
                getattr(self, f"_{command}")()
            except (MarkError, SessionLimitError, MemoryLimitError, MediaError) as error:
                self._say(str(error))

    # The commands.

    def _quit(self) -> None:
        self._stopped = True

    def _pause(self) -> None:
        self._paused = not self._paused
        self._say("it waits; p goes on" if self._paused else "it goes on")

    def _rewind(self) -> None:
        world = self.world
        per_step = 4 if len(world.frames) < 2 else len(world.frames)
        wanted = min(world.num_steps, max(1, round(REWIND_S * world.fps / per_step)))
        for steps in range(wanted, 0, -1):
            try:
                world.rewind(steps=steps)
            except MarkError:  # as far as it is kept, then
                continue
            self.cut(world.frames[-1])
            self._say(f"{steps * per_step / world.fps:.1f} s back, at step {world.num_steps}")
            return
        self._say("nothing further back is kept")

    def _mark(self) -> None:
        self._marked = self.world, self.world.mark()
        self._say(f"step {self.world.num_steps} is marked; b branches from it")

    def _branch(self) -> None:
        owner, mark = self._marked or (self.world, None)
        branch = owner.branch(mark)
        self._worlds.append(branch)
        self._switch(len(self._worlds) - 1)
        self._say(f"world {self._at + 1} branches off at step {branch.num_steps}; Tab goes round")

    def _next(self) -> None:
        if len(self._worlds) == 1:
            self._say("there is one world; b branches off another")
            return
        self._switch((self._at + 1) % len(self._worlds))
        self._say(f"world {self._at + 1}, at step {self.world.num_steps}")

    def _record(self) -> None:
        if self._recording is not None:
            self._end_recording()
            return
        path = unused(self._output)
        self._recording = self.world.record(path)
        self._say(f"{path} is being recorded; r ends it")

    def _switch(self, to: int) -> None:
        """Play another world. A recording is of one."""
        self._end_recording()
        self._at = to
        self.cut(self.world.frames[-1])

    def _end_recording(self) -> None:
        recording, self._recording = self._recording, None
        if recording is None:
            return
        recording.end()
        if not recording.path.exists():
            self._say("nothing was recorded")
            return
        self.recorded.append(recording.path)
        self._say(f"{recording.path} is recorded")

    # What is told.

    def _say(self, message: str) -> None:
        self.status.message = message
        self._said_at = self._clock()
        self._tell()

    def _tell(self) -> None:
        world, stats = self.world, self.world.stats
        if self._clock() - self._said_at > MESSAGE_S:
            self.status.message = ""
        values: dict[str, object] = {
            "fps": round(self.rate(), 1),
            "ms": round(stats.step_ms),
            "p95_ms": round(stats.step_p95_ms),
            "late": stats.late,
            "places": stats.num_places,
            "step": world.num_steps,
            "world": self._at + 1,
            "worlds": len(self._worlds),
            "recording": self._recording is not None,
            "paused": self._paused,
        }
        parts = [
            "paused" if self._paused else f"{values['fps']} fps",
            f"{values['ms']} ms a latent",
            f"{values['late']} late",
            f"{values['places']} places",
            f"step {values['step']}",
        ]
        if len(self._worlds) > 1:
            parts.append(f"world {values['world']} of {values['worlds']}")
        if self._recording is not None:
            parts.insert(0, "REC")
        self.status.values = values
        self.status.text = " | ".join(parts)


def unused(path: Path) -> Path:
    """The path, with a number where there is such a file already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
