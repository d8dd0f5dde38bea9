"""The rows of jobs: SQLite, one change at a time, each committed before it is told.

WAL with `synchronous=FULL`: what was acknowledged survives `kill -9` and a power cut. A job's state
goes from one to the next by compare-and-set, so of two that race (a job that completes while it is
deleted) one alone wins.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sora_engine.errors import ServeError

T = TypeVar("T")

VERSION = 1
ACTIVE = frozenset({"queued", "running"})
DONE = frozenset({"completed", "failed", "cancelled"})

_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    created REAL NOT NULL,
    completed REAL,
    attempts INTEGER NOT NULL,
    body TEXT NOT NULL,
    facts TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_by_time ON jobs (owner, kind, created, number);
CREATE INDEX IF NOT EXISTS jobs_in ON jobs (state);
CREATE TABLE IF NOT EXISTS idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    body TEXT NOT NULL,
    job TEXT NOT NULL,
    created REAL NOT NULL,
    PRIMARY KEY (owner, key)
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_COLUMNS = "number, id, owner, kind, state, created, completed, attempts, body, facts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One job.

    kind: `video` or `image`. state: `queued`, `running`, `completed`, `failed`, `cancelled`,
    `deleting` or `expired`. body: the request as it is stored (`translate`). facts: what the answer
    tells of it. attempts: how often the server was lost under it without its getting any further.
    Times are seconds since 1970.
    """

    id: str
    owner: str
    kind: str = "video"
    state: str = "queued"
    created: float
    completed: float | None = None
    attempts: int = 0
    body: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    number: int = 0


class Taken(Exception):  # noqa: N818 - it is an answer, and no error
    """An idempotency key is there already. `same`: with the same body."""

    def __init__(self, job: str, same: bool) -> None:
        super().__init__(job)
        self.job, self.same = job, same


class Mismatch(Exception):  # noqa: N818
    """An idempotency key came with another body than the first time."""


class Store:
    """The rows in one file. Safe to use from any thread; every call waits for its commit."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; ServeError, which names it, for one that is no such store."""
        self.path = path
        self._reading, self._writing = threading.Lock(), threading.Lock()
        try:
            self._write = self._open()
            self._read = sqlite3.connect(path, check_same_thread=False, timeout=5.0)
        except sqlite3.Error as error:
            raise ServeError(
                f"{path} cannot be used ({error}): a server that is running has it locked, or it "
                "is damaged; nothing was changed. A backup in its place, or another data folder, "
                "would work"
            ) from error

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=5.0
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        found = connection.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(f"its check says {found}")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise sqlite3.DatabaseError(f"it is of version {version}, and this reads {VERSION}")
        connection.executescript(_TABLES)
        connection.execute(f"PRAGMA user_version={VERSION}")
        return connection

    def close(self) -> None:
        """What was called before is done."""
        with self._writing:
            self._write.close()
        self._read.close()

    def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in one transaction. In the caller's thread: handing it to another and back
        would take the interpreter twice from the engine."""
        with self._writing:
            self._write.execute("BEGIN IMMEDIATE")
            try:
                result = work(self._write)
                self._write.execute("COMMIT")
            except BaseException:
                if self._write.in_transaction:
                    self._write.execute("ROLLBACK")
                raise
            return result

    def add(self, row: Row, idempotency: tuple[str, str] | None = None) -> Row:
        """A new row, with its number. idempotency: a key and the hash of its body: Taken, and no
        row, where the key is there."""

        def work(db: sqlite3.Connection) -> Row:
            if idempotency is not None:
                key, body = idempotency
                found = db.execute(
                    "SELECT body, job FROM idempotency WHERE owner=? AND key=?", (row.owner, key)
                ).fetchone()
                if found is not None:
                    raise Taken(found[1], found[0] == body)
                db.execute(
                    "INSERT INTO idempotency VALUES (?,?,?,?,?)",
                    (row.owner, key, body, row.id, row.created),
                )
            made = db.execute(
                "INSERT INTO jobs (id, owner, kind, state, created, attempts, body, facts)"
                " VALUES (?,?,?,?,?,?,?,?)",
                (
                    *(row.id, row.owner, row.kind, row.state, row.created, row.attempts),
                    *(json.dumps(row.body), json.dumps(row.facts)),
                ),
            )
            return replace(row, number=int(made.lastrowid or 0))

        return self.transact(work)

    def given(self, owner: str, key: str, body: str) -> Row | None:
        """The job that an idempotency key has made, or None; `Mismatch` for another body."""
        with self._reader() as db:
            found = db.execute(
                "SELECT body, job FROM idempotency WHERE owner=? AND key=?", (owner, key)
            ).fetchone()
        return None if found is None else self.given_row(Taken(found[1], found[0] == body))

    def given_row(self, taken: Taken) -> Row | None:
        """The job that has an idempotency key; `Mismatch` where it was given with another body."""
        if not taken.same:
            raise Mismatch
        return self.get(taken.job)

    def change(
        self,
        name: str,
        state: str,
        *,
        when: Collection[str],
        completed: float | None = None,
        facts: dict[str, Any] | None = None,
    ) -> str | None:
        """Bring a job to a state if it is in one of `when`; its state before, or None where it was
        in another or is not there. facts: are laid over what is known."""

        def work(db: sqlite3.Connection) -> str | None:
            row = db.execute("SELECT state, facts FROM jobs WHERE id=?", (name,)).fetchone()
            if row is None or row[0] not in when:
                return None
            told = json.dumps({**json.loads(row[1]), **(facts or {})})
            db.execute(
                "UPDATE jobs SET state=?, facts=?, completed=COALESCE(?, completed) WHERE id=?",
                (state, told, completed, name),
            )
            return str(row[0])

        return self.transact(work)

    def requeue(self, rows: Collection[Row], forget: str) -> None:
        """Bring jobs to `queued`, with the attempts and facts of these rows, and forget a fact of
        the service: all of it or nothing."""
        told = [(row.attempts, json.dumps(row.facts), row.id) for row in rows]

        def work(db: sqlite3.Connection) -> None:
            db.executemany("UPDATE jobs SET state='queued', attempts=?, facts=? WHERE id=?", told)
            db.execute("DELETE FROM facts WHERE name=?", (forget,))

        self.transact(work)

    def remove(self, name: str) -> None:
        """Forget a job, and the idempotency key that made it."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM jobs WHERE id=?", (name,))
            db.execute("DELETE FROM idempotency WHERE job=?", (name,))

        self.transact(work)

    def forget_keys(self, before: float) -> None:
        """Forget the idempotency keys that were given before a time."""
        self.transact(lambda db: db.execute("DELETE FROM idempotency WHERE created<?", (before,)))

    def note(self, name: str, value: str) -> None:
        """Keep a fact of the whole service."""
        self.transact(
            lambda db: db.execute("INSERT OR REPLACE INTO facts VALUES (?,?)", (name, value))
        )

    def noted(self, name: str) -> str | None:
        """What `note` kept."""
        with self._reader() as db:
            found = db.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def get(self, name: str) -> Row | None:
        """A job by its id."""
        with self._reader() as db:
            found = db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id=?", (name,)).fetchone()
        return None if found is None else _row(found)

    def page(
        self,
        owner: str,
        *,
        after: tuple[float, int] | None,
        limit: int,
        newest: bool,
        kind: str = "video",
    ) -> list[Row]:
        """An owner's jobs that are not deleted or expired, by when they were created and then by
        their numbers, from behind `after` on, which is such a time and number."""
        sign, order = ("<", "DESC") if newest else (">", "ASC")
        more = "" if after is None else f"AND (created, number) {sign} (?, ?) "
        with self._reader() as db:
            found = db.execute(
                f"SELECT {_COLUMNS} FROM jobs WHERE owner=? AND kind=? AND state NOT IN "
                f"('deleting', 'expired') {more}ORDER BY created {order}, number {order} LIMIT ?",
                (owner, kind, *(after or ()), limit),
            ).fetchall()
        return [_row(values) for values in found]

    def names(self, *states: str, before: float | None = None) -> list[str]:
        """The ids of jobs in these states, the oldest first. before: only those that ended, or else
        were created, before this time."""
        marks = ",".join("?" * len(states))
        old = "" if before is None else "AND COALESCE(completed, created) < ?"
        values = states if before is None else (*states, before)
        with self._reader() as db:
            found = db.execute(
                f"SELECT id FROM jobs WHERE state IN ({marks}) {old} ORDER BY number", values
            ).fetchall()
        return [str(name) for (name,) in found]

    def all(self, *states: str) -> list[Row]:
        """The jobs in these states, in the order in which they came; without states, all."""
        marks = ",".join("?" * len(states))
        only = f"WHERE state IN ({marks})" if states else ""
        with self._reader() as db:
            found = db.execute(
                f"SELECT {_COLUMNS} FROM jobs {only} ORDER BY number", states
            ).fetchall()
        return [_row(values) for values in found]

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        with self._reading:
            yield self._read


def _row(values: tuple[Any, ...]) -> Row:
    number, name, owner, kind, state, created, completed, attempts, body, facts = values
    return Row(
        number=number,
        id=name,
        owner=owner,
        kind=kind,
        state=state,
        created=created,
        completed=completed,
        attempts=attempts,
        body=json.loads(body),
        facts=json.loads(facts),
    )
