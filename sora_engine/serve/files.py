"""The data folder: one server has it, and each file in it is there whole or not at all.

lock                            held while a server runs
jobs.sqlite                     the rows (`store`)
uploads/<sha256>                what clients sent
videos/<id>/                    video.mp4 or image.png, and receipt.json; thumbnail.webp and
                                spritesheet.webp once somebody asks for them
saved/<id>.safetensors          a job between two steps
saved/<id>.at                   how far it is, for the next start after a kill (`trail`)
tmp/                            emptied at the start
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

from sora_engine.errors import ServeError

_CHUNK = 1 << 20


class Files:
    """The data folder of one server. Raises ServeError where it is another's, or no folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uploads, self.videos = self.root / "uploads", self.root / "videos"
        self.saved, self.tmp = self.root / "saved", self.root / "tmp"
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ServeError(f"the data folder {self.root}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ServeError(
                f"the data folder {self.root} is in use by another server; stop it, or name "
                "another folder"
            ) from error
        try:
            shutil.rmtree(self.tmp, ignore_errors=True)
            for folder in (self.uploads, self.videos, self.saved, self.tmp):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            self.close()
            raise ServeError(f"the data folder {self.root}: {error.strerror}") from error

    def close(self) -> None:
        """Another server may have the folder."""
        os.close(self._lock)

    @property
    def rows(self) -> Path:
        """The file of the rows."""
        return self.root / "jobs.sqlite"

    def video(self, name: str) -> Path:
        """The folder of a job's results."""
        return self.videos / name

    def savepoint(self, name: str) -> Path:
        """Where a job's state is kept between two steps."""
        return self.saved / f"{name}.safetensors"

    def mark(self, name: str) -> int:
        """What tells one savepoint of a job from the next; 0 where there is none."""
        try:
            return self.savepoint(name).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def trail(self, name: str) -> Path:
        """Where it is noted how far a job is (`trail`)."""
        return self.saved / f"{name}.at"

    def spool(self, name: str) -> Path:
        """Where frames of a job wait that memory has no room for."""
        return self.tmp / f"{name}.frames"

    def upload(self, sha256: str) -> Path:
        """What a client sent, by its hash."""
        return self.uploads / sha256

    def free_bytes(self) -> int:
        """What the disk has left for this user."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def begin(self, name: str) -> Path:
        """An empty folder in which a job's results are made."""
        folder = self.tmp / name
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        return folder

    def place(self, name: str, flushed: Collection[str] = ()) -> None:
        """Move a job's finished results to where they are found; raises OSError. flushed: names of
        those files whose writers have done so."""
        folder, target = self.tmp / name, self.video(name)
        for file in folder.iterdir():
            if file.name not in flushed:
                _flush(file)
        _flush(folder)
        if target.exists():
            shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
        _flush(self.videos)

    def is_placed(self, name: str) -> bool:
        """Whether a job's results are there, whole."""
        return (self.video(name) / "receipt.json").is_file()

    def remove(self, name: str, *, results: bool = True) -> None:
        """Remove a job's savepoint and what is under way of it, and its results."""
        self.savepoint(name).unlink(missing_ok=True)
        self.trail(name).unlink(missing_ok=True)
        self.spool(name).unlink(missing_ok=True)
        if (self.tmp / name).exists():
            shutil.rmtree(self.tmp / name, ignore_errors=True)
        if results and self.video(name).exists():
            # Out of sight at once, however long it takes.
            aside = self.tmp / f"{name}.{secrets.token_hex(4)}"
            os.replace(self.video(name), aside)
            shutil.rmtree(aside, ignore_errors=True)

    def keep_upload(self, source: BinaryIO, check: Callable[[Path], object] | None = None) -> str:
        """Keep a client's file under its hash, which is returned; raises OSError, and what `check`
        raises of it. Nobody finds it under its hash before it was checked, nor after a kill."""
        temporary = self.tmp / f"upload.{secrets.token_hex(8)}"
        digest = hashlib.sha256()
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            if check is not None:
                check(temporary)
            os.replace(temporary, self.upload(digest.hexdigest()))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush(self.uploads)
        return digest.hexdigest()

    def keep_file(self, path: Path) -> str:
        """Keep a file that never changes, such as a result, as an upload; its hash is returned.
        Raises OSError."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        target = self.upload(sha256)
        if not target.exists():
            try:
                os.link(path, target)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                with path.open("rb") as file:
                    return self.keep_upload(file)
            _flush(self.uploads)
        os.utime(target)
        return sha256

    def sweep_jobs(self, completed: Collection[str], going_on: Collection[str]) -> int:
        """Remove all results but those of completed jobs, and all savepoints but those of jobs that
        go on; tells how many there were. For the start: a job that comes while this runs would lose
        its own."""
        found = 0
        for folder in self.videos.iterdir():
            if folder.name not in completed:
                self.remove(folder.name)
                found += 1
        for file in self.saved.iterdir():
            if file.name.partition(".")[0] not in going_on:
                file.unlink(missing_ok=True)
                found += 1
        return found

    def stale_uploads(self, before: float) -> list[str]:
        """The hashes of uploads that were last given before this time."""
        return [file.name for file in self.uploads.iterdir() if _modified(file) < before]

    def remove_uploads(self, names: Collection[str], before: float) -> None:
        """Remove these, but for those that were given again meanwhile."""
        for name in names:
            if _modified(self.upload(name)) < before:
                self.upload(name).unlink(missing_ok=True)


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return 0


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
