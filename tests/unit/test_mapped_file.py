"""Bytes out of a file, at once or behind: as the file has them, or an error; none is left open."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sora_engine.errors import CheckpointError
from sora_engine.io import mapped_file
from sora_engine.io.mapped_file import Copies, MappedFile, room

SIZES = (1, 300, (1 << 18) + 7, (1 << 20) + 1, 0, (4 << 20) + 3, 1 << 19)


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "weights"
    made.write_bytes(os.urandom(sum(SIZES)))
    return made


def spans():
    start = 0
    for size in SIZES:
        yield start, size
        start += size


def read_all(path, kept=True):
    """Tensors of all sizes in turn; those of a kept kind share pages."""
    file = MappedFile(path)
    try:
        made = []
        for start, size in spans():
            target = room((size,), torch.uint8, kept=kept)
            file.fill(start, target)
            made.append(target)
        return made, file
    except BaseException:
        file.close()
        raise


def check(made, path):
    data = path.read_bytes()
    for (start, size), tensor in zip(spans(), made, strict=True):
        assert bytes(tensor.numpy()) == data[start : start + size]


def open_files(path):
    found = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [f for f in found if os.path.lexists(f) and os.readlink(f) == str(path)]


@pytest.mark.parametrize("shared", [1 << 19, 32 << 20])
@pytest.mark.parametrize("kept", [False, True])
def test_what_is_copied_behind_is_there_at_the_end(path, monkeypatch, shared, kept):
    monkeypatch.setattr(mapped_file, "SHARED_BYTES", shared)
    with Copies() as copies, copies.behind():
        made, file = read_all(path, kept=kept)
    file.close()
    check(made, path)
    made[2].zero_()  # and no other tensor has any of its bytes
    rest = MappedFile(path)
    made[2] = rest.view(301, 301 + SIZES[2]).clone()
    rest.close()
    check(made, path)


def test_at_once_it_is_there_at_once(path):
    made, file = read_all(path)
    check(made, path)
    file.close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_a_file_that_becomes_shorter_is_an_error_and_nothing_is_left(path):
    file = MappedFile(path)
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="nothing is left at byte 1000"):
        file.fill(900, torch.empty(300, dtype=torch.uint8))
    file.close()
    assert not open_files(path)
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_becomes_shorter_while_others_copy_behind(path):
    file, copies = MappedFile(path), Copies()
    os.truncate(path, 1000)
    with copies.behind():
        file.fill(sum(SIZES) - (1 << 20), room((1 << 20,), torch.uint8))
    with pytest.raises(CheckpointError, match="truncated"):
        copies.__exit__(None, None, None)
    file.close()


def test_two_loads_at_once_do_not_meet(path):
    def load(_):
        with Copies() as copies, copies.behind():
            made, file = read_all(path)
        file.close()
        check(made, path)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(load, range(6)))
