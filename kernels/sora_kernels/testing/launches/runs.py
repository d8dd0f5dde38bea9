"""Runs of the production calls: what they launch, and how many variants they need."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

from sora_kernels.testing.launches.card import pretend
from sora_kernels.testing.launches.driver import Record
from sora_kernels.testing.launches.production import (
    BATCHES,
    MODELS,
    SMALL,
    Batch,
    Call,
    Model,
    adapters,
    autoencoder,
    block,
    exact,
    factorised,
    mixed_requests,
    quantised,
    strided,
)

TEMPORAL = Batch("temporal", ((21, 30, 52), (1, 20, 20), (70, 6, 10)))
WINDOWED = Batch("windowed", ((5, 30, 52), (3, 17, 40)))
GLUON = {90: "gluon", 100: "blackwell"}
"""The backend of packed attention that is in Gluon, by architecture."""


@dataclass
class Report:
    """What a run launched, and what was wrong: `faults` by case and call."""

    record: Record
    calls: int = 0
    faults: list[str] = field(default_factory=list)


def groups(arch: int) -> Iterator[tuple[str, Callable[[int], Iterator[Call]]]]:
    """Named groups of calls, each for the card of an index."""
    for model in (*MODELS, SMALL):
        for batch in BATCHES:
            yield f"{model.name}/{batch.name}", partial(block, model, batch)
            yield f"{model.name}/{batch.name}/exact", partial(exact, model, batch)
            yield f"{model.name}/{batch.name}/adapters", partial(adapters, model, batch)
            yield f"{model.name}/{batch.name}/quantised", partial(quantised, model, batch)
        yield f"{model.name}/strided", partial(strided, model)
        name = GLUON.get(arch)
        if name is not None and model is not SMALL:
            for batch in BATCHES:
                yield f"{model.name}/{batch.name}/{name}", partial(_by_gluon, model, batch, name)
            yield f"{model.name}/strided/{name}", partial(strided, model, backend=name)
    for model in (MODELS[0], SMALL):
        for batch in (TEMPORAL, WINDOWED):
            yield f"{model.name}/{batch.name}", partial(factorised, model, batch)
    for name, pixels in (("480p", 480 * 832), ("720p", 720 * 1280), ("1080p", 1088 * 1920)):
        yield f"autoencoder/{name}", partial(autoencoder, pixels)


def _by_gluon(model: Model, batch: Batch, backend: str, index: int) -> Iterator[Call]:
    """The calls of attention alone."""
    return (call for call in block(model, batch, index, backend) if "attention" in call[0])


def run(arch: int, pattern: str = "", *, index: int = 0, devices: int = 1) -> Report:
    """Launch the calls whose `group: name` matches, on the card of an index, of so many cards."""
    with pretend(arch, devices=devices) as record:
        report = Report(record)
        for group, calls in groups(arch):
            for name, call in calls(index):
                if not re.search(pattern, f"{group}: {name}"):
                    continue
                report.calls += 1
                try:
                    call()
                except Exception as error:
                    text = " ".join(str(error).split())[:600]
                    report.faults.append(f"{group}: {name}: {type(error).__name__}: {text}")
    return report


def new_variants(
    arch: int, model: Model, requests: int, *, seed: int = 0
) -> list[list[tuple[str, str]]]:
    """For each of so many mixed requests the variants of kernels that no request before it needed.

    A variant is a kernel's name and what Triton specialised it for. None is compiled.
    """
    from triton import knobs

    seen: dict[tuple[str, str], None] = {}

    def note(*, key: Any, fn: Any, **others: Any) -> bool:
        seen.setdefault((fn.name, str(key)))
        return True  # neither compiled nor launched

    found = []
    with pretend(arch), mock.patch.object(knobs.runtime, "jit_cache_hook", note):
        for request in mixed_requests(model, requests, seed):
            before = len(seen)
            for _, call in request:
                call()
            found.append(list(seen)[before:])
    return found
