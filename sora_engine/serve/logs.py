"""Log lines of a service: as JSON where it is asked for, and never with a prompt or a key."""

from __future__ import annotations

import json
import logging
import time

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class JsonLines(logging.Formatter):
    """One line of JSON for each record, with what its `extra` gave."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in record.__dict__.items() if name not in _OWN},
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


class NoPrompts(logging.Filter):
    """The engine says of a text where it was cut, and of a job why it failed: both may have the
    caller's words in them. The answer to the caller has them too."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("sora_engine.runtime.") and record.args:
            said = str(record.msg)
            if said == "%s":
                record.msg, record.args = "the engine said a word about a request", ()
            elif said.startswith("a job failed"):
                record.msg, record.args = "a job failed", ()
        return True


def set_up(as_json: bool) -> None:
    """Lines of all of the process to standard error."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.addFilter(NoPrompts())
    handler.setFormatter(JsonLines() if as_json else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
