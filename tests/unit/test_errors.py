"""Errors that cross processes: pickled, or as a rank tells them, they keep all that they say."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from sora_engine import errors
from sora_engine.errors import SoraError, error_from_fields

MADE = [
    errors.RequestError("height must be a multiple of 16"),
    errors.MemoryLimitError("12 bytes of 10", needed=12, limit=10),
    errors.CheckpointError("no such file", path="a/b.safetensors", tensor="proj.weight"),
    errors.CheckpointError("a model is one path"),
    errors.RankFailedError(3, "was killed by SIGKILL"),
    errors.DeadlineExceededError("the job was queued when its deadline of 1 s passed"),
    errors.QueueFullError("8 jobs are queued", retry_after_s=2.5),
    errors.SessionLimitError("8 sessions are open", retry_after_s=2.5),
    errors.SessionLostError("the device failed", log=[[{"press": ["right"]}, 3]]),
    errors.NonFiniteError("denoising: step 3", stage="denoising", step=3),
]


def every_class() -> list[type[SoraError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in found if issubclass(kind, SoraError)]


def same(a: SoraError, b: SoraError) -> bool:
    return (type(a), str(a), vars(a)) == (type(b), str(b), vars(b))


def takes_more(kind: type[SoraError]) -> bool:
    """Whether its constructor, of its own or of an error above it, takes more than a message."""
    return any("__init__" in vars(k) for k in kind.__mro__ if issubclass(k, SoraError))


def test_no_class_is_left_out() -> None:
    assert {kind for kind in every_class() if takes_more(kind)} <= {type(error) for error in MADE}
    assert len(every_class()) > 15


@pytest.mark.parametrize(
    "error", [*MADE, *(kind("why") for kind in every_class() if not takes_more(kind))], ids=repr
)
def test_message_and_attributes_survive(error: SoraError) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert same(pickle.loads(pickle.dumps(error, protocol)), error)
    assert same(copy.copy(error), error)
    assert same(copy.deepcopy(error), error)
    told = json.loads(json.dumps(error.to_fields()))
    assert same(error_from_fields(told), error)


def test_paths_stay_paths_and_notes_stay() -> None:
    error = MADE[2]
    error.add_note("while loading the second expert")
    for other in (pickle.loads(pickle.dumps(error)), error_from_fields(error.to_fields())):
        assert other.path == Path("a/b.safetensors")
        assert other.__notes__ == ["while loading the second expert"]


def test_a_class_of_another_version_is_a_failed_job() -> None:
    error = error_from_fields({"error": "LaterError", "why": "something new", "attributes": {}})
    assert isinstance(error, errors.JobFailedError)
    assert str(error) == "something new"
    # A name that is no error is not made into one.
    assert isinstance(error_from_fields({"error": "Path", "why": "x"}), errors.JobFailedError)


def _raise(index: int) -> None:
    raise MADE[index]


def test_a_pool_of_processes_raises_them_here() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for i, error in enumerate(MADE):
            with pytest.raises(type(error)) as told:
                pool.submit(_raise, i).result(300)
            assert str(told.value) == str(error)
            assert {k: v for k, v in vars(told.value).items() if k != "__notes__"} == {
                k: v for k, v in vars(error).items() if k != "__notes__"
            }
