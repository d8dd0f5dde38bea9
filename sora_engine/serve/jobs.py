"""What the parts that begin and end jobs ask of the desk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sora_engine.runtime.engine import Engine
    from sora_engine.serve.clock import Clock
    from sora_engine.serve.files import Files
    from sora_engine.serve.live import Live
    from sora_engine.serve.marks import Marks
    from sora_engine.serve.pace import Pace
    from sora_engine.serve.settings import Settings
    from sora_engine.serve.store import Store
    from sora_engine.serve.translate import Translator


class Jobs(Protocol):
    """`Desk`, for those whom it uses."""

    @property
    def engine(self) -> Engine: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def store(self) -> Store: ...
    @property
    def files(self) -> Files: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def pace(self) -> Pace: ...
    @property
    def translator(self) -> Translator: ...
    @property
    def marks(self) -> Marks: ...

    @property
    def closed(self) -> bool: ...

    def tell(self, live: Live) -> None: ...
    def gone(self, live: Live) -> None: ...
    def left_engine(self, live: Live) -> None: ...
    def again(self, live: Live, *, pause: bool = False) -> None: ...
