"""API keys: kept as hashes, compared in constant time, each with an owner and its own bounds.

A key is drawn at random (`new_key`, 256 bits), so one SHA-256 keeps it: what slow hashes are for is
guessable passwords, and those are refused by their length.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sora_engine.errors import SoraError

MIN_CHARS = 16
PREFIX = "sk-sora-"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_NAMED = "must be 1 to 32 of a-z, 0-9, dot, dash and underscore"
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_OPTIONS = {"max_jobs": (1, 100_000), "max_priority": (-8, 8)}


class KeyFileError(SoraError, ValueError):
    """A file of API keys, or a key, that cannot be used; the message never holds a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """owner: whose it is; jobs belong to owners, so a key can be replaced. digest: its SHA-256.
    max_jobs: the most unfinished jobs of the owner. max_priority: the highest priority that it may
    ask for. None: the server's bound."""

    owner: str
    digest: bytes
    max_jobs: int | None = None
    max_priority: int | None = None


def new_key() -> str:
    """A key for a client."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """A key as a key file has it."""
    return "sha256:" + _digest(key).hex()


def line_of(owner: str, key: str) -> str:
    """A key's line in a key file; KeyFileError for a name that no owner may have."""
    if not _NAME.fullmatch(owner):
        raise KeyFileError(f"the owner {owner!r} {_NAMED}")
    return f"{owner} {hash_of(key)}"


class Keys:
    """All keys of a server."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = tuple(keys)
        self._owners = {key.owner: key for key in keys}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def key_for(self, presented: str) -> Key | None:
        """The key that a client presents, if it is one. How long that takes tells nothing."""
        digest = _digest(presented)
        found: Key | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def of_owner(self, owner: str) -> Key | None:
        """A key's bounds, by whose it is."""
        return self._owners.get(owner)

    @classmethod
    def of_one(cls, key: str) -> Keys:
        """Of a server with one key, given on the command line or in the environment."""
        _check_key(key)
        return cls([Key(owner="default", digest=_digest(key))])

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a key file: a line for each key, `OWNER sha256:HEX [max_jobs=N] [max_priority=N]`.

        Blank lines and lines after # are left out. Raises KeyFileError, which names the line.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"the key file {path} cannot be read: {_why(error)}") from error
        if path.stat().st_mode & 0o002:
            raise KeyFileError(
                f"the key file {path} can be written by anyone; chmod 600 would work"
            )
        keys = [
            _parsed(line.split(), f"{path}, line {number}")
            for number, text in enumerate(lines, 1)
            if (line := text.partition("#")[0].strip())
        ]
        if not keys:
            raise KeyFileError(
                f"the key file {path} holds no key; `sora serve --new-key OWNER` makes one"
            )
        if len({key.digest for key in keys}) < len(keys):
            raise KeyFileError(f"the key file {path} has a key twice; each needs a line of its own")
        if len({key.owner for key in keys}) < len(keys):
            raise KeyFileError(f"the key file {path} has an owner twice; each has one key")
        return cls(keys)


def _parsed(words: Sequence[str], where: str) -> Key:
    name, hashed = (*words, "")[:2]
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{where}: the owner {_NAMED}")
    match = _HASH.fullmatch(hashed)
    if match is None:
        raise KeyFileError(
            f"{where}: after the owner stands sha256: and 64 hexadecimal digits, which "
            "`sora serve --new-key OWNER` prints"
        )
    options = {}
    for word in words[2:]:
        option, _, value = word.partition("=")
        low, high = _OPTIONS.get(option, (1, 0))
        if option not in _OPTIONS or not re.fullmatch(r"-?\d{1,6}", value):
            raise KeyFileError(f"{where}: {word!r}; max_jobs=N and max_priority=N would work")
        if not low <= int(value) <= high:
            raise KeyFileError(f"{where}: {option} must be from {low} to {high}, got {value}")
        options[option] = int(value)
    return Key(owner=name, digest=bytes.fromhex(match[1]), **options)


LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def _check_key(key: str) -> None:
    if len(key) < MIN_CHARS or not key.isascii() or any(c.isspace() for c in key):
        raise KeyFileError(
            f"an API key has at least {MIN_CHARS} ASCII characters and no spaces; "
            "`sora serve --new-key OWNER` makes one"
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it is not UTF-8"
