"""One server's life: what is made at its start, who has it, and what ends with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request

from sora_engine.serve.clock import Clock
from sora_engine.serve.desk import Desk
from sora_engine.serve.failures import ApiError
from sora_engine.serve.fetching import Fetcher
from sora_engine.serve.files import Files
from sora_engine.serve.keeping import Keeper, last_seen
from sora_engine.serve.keys import Keys
from sora_engine.serve.neighbours import Neighbours
from sora_engine.serve.settings import Settings
from sora_engine.serve.store import Store

if TYPE_CHECKING:
    from sora_engine.runtime.engine import Engine

logger = logging.getLogger(__name__)

THREADS = 64
"""For what takes a while of requests; most of them wait for a disk or another process."""
STATE = "x-sora-state"
"""The header by which a proxy sees that a server could not answer yet."""
OWNER = "local"
"""Who has the jobs of a server without keys."""


class Service:
    """The parts of a server. Its folder is locked from `start` to `stop`."""

    def __init__(self, engine: Engine | Callable[[], Engine], settings: Settings) -> None:
        self.settings = settings
        self.draining = False
        self.failed: BaseException | None = None
        """Why the engine could not be made."""
        self.verify: Callable[[Path], object] = first_frame
        """Checks a file that a client sent, and raises MediaError."""
        self.fetcher = Fetcher(settings.max_upload) if settings.allow_urls else None
        """Asks addresses that clients name; None where they name none."""
        self.keys: Keys | None = None
        """Who may ask, and for how much."""
        self.on_failure: list[Callable[[ApiError], None]] = []
        """Called with each answer that is no result."""
        self.on_stopping: list[Callable[[], None]] = []
        """Called in the loop when the server is about to close its connections."""
        self.on_desk: list[Callable[[Desk], None]] = []
        """Called with the desk once there is one."""
        self._given = engine
        self._engine: Engine | None = None
        self._own = False
        self._desk: Desk | None = None
        self._files: Files | None = None
        self._store: Store | None = None
        self.neighbours = Neighbours(settings.data_dir.expanduser(), shared=settings.shared)
        self._keeper: Keeper | None = None
        self._loading: asyncio.Task[None] | None = None

    @property
    def desk(self) -> Desk:
        """The desk; ApiError 503 while there is none."""
        if self._desk is None:
            raise ApiError(
                503,
                "loading",
                "the model is being loaded",
                headers={"Retry-After": "5", STATE: "loading"},
            )
        return self._desk

    @property
    def has_desk(self) -> bool:
        """Whether the model is loaded."""
        return self._desk is not None

    @property
    def files(self) -> Files:
        """The data folder."""
        assert self._files is not None, "the service was started"
        return self._files

    @property
    def dead(self) -> bool:
        """Whether the engine will do no more work."""
        return self._engine is not None and self._engine.error is not None

    @property
    def state(self) -> str:
        """`ready`, or why no job is taken: `loading`, `draining`, `dead` or `disk_full`."""
        if self.dead:
            return "dead"
        if self._desk is None:
            return "loading"
        if self.draining or self._desk.draining:
            return "draining"
        return "disk_full" if self._desk.is_full() else "ready"

    def most_jobs(self, owner: str) -> int:
        """How many jobs of an owner may be under way."""
        key = None if self.keys is None else self.keys.of_owner(owner)
        own = None if key is None else key.max_jobs
        return self.settings.max_jobs_per_key if own is None else own

    def most_priority(self, owner: str) -> int:
        """The highest priority that an owner may ask for."""
        key = None if self.keys is None else self.keys.of_owner(owner)
        own = None if key is None else key.max_priority
        return self.settings.max_priority if own is None else own

    @property
    def hidden(self) -> dict[str, str]:
        """What no answer contains, and what stands in its place."""
        if self._files is None:
            return {}
        root = self._files.root
        return {f"{root}/uploads/": "upload_", str(root): "DATA"}

    async def start(self) -> None:
        """Lock the folder and read the rows; the engine is made beside that. Raises ServeError."""
        # asyncio's own pool has six threads on two processors: as many uploads that are being
        # decoded would have everybody else wait.
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="sora-serve")
        asyncio.get_running_loop().set_default_executor(pool)
        await self.open()
        if callable(self._given):
            self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        else:
            await asyncio.to_thread(self._begin, self._given)

    async def open(self) -> None:
        """Lock the folder and read the rows, unless it was done before; raises ServeError."""
        if self._files is None:
            await asyncio.to_thread(self._open)

    def _open(self) -> None:
        self._files = Files(self.settings.data_dir)
        try:
            self._store = Store(self._files.rows)
        except BaseException:
            self._files.close()
            raise

    def _load(self) -> None:
        assert callable(self._given)
        try:
            engine = self._given()
            self._own = True
            self._begin(engine)
        except BaseException as error:
            self.failed = error

    def _begin(self, engine: Engine) -> None:
        assert self._store is not None
        assert self._files is not None
        self._engine = engine
        for name, path in self.settings.loras.items():
            engine.load_lora(path, name)
        clock = Clock(last_seen(self._store.noted))
        desk = Desk(engine, self.settings, self._store, self._files, clock)
        desk.most_jobs = self.most_jobs
        self._keeper = Keeper(self._store, self._files, self.settings, clock)
        self._keeper.start()
        for told in self.on_desk:
            told(desk)
        self._desk = desk
        if engine.hooks.check_request is None and engine.hooks.check_frames is None:
            logger.info("no hooks: prompts and frames are not checked")

    async def drain(self) -> None:
        """Take no more jobs, and wait for those at work, as long as the settings say."""
        self.draining = True
        if self._desk is not None:
            await asyncio.to_thread(self._desk.drain, self.settings.drain_timeout_s)

    async def stop(self) -> None:
        """End all that `start` began."""
        if self._loading is not None:
            with suppress(asyncio.CancelledError):
                await self._loading
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        if self._desk is not None:
            self._desk.close()
        if self._keeper is not None:
            self._keeper.close()
        if self._own and self._engine is not None:
            self._engine.close()
        if self._store is not None:
            self._store.close()
        if self._files is not None:
            self._files.close()


def first_frame(path: Path) -> None:
    """That a file is a picture or a clip, by decoding its first frame; MediaError."""
    from sora_engine.io.video_reader import read_video

    read_video(path, max_frames=1)


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service


def desk_of(request: Request) -> Desk:
    """Its desk; ApiError 503 while there is none."""
    return service_of(request).desk


def owner_of(request: Request) -> str:
    """Whose jobs a request sees: those of its key."""
    return str(getattr(request.state, "owner", OWNER))
