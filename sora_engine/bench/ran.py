"""What has run where: a row for each file of results, with its machine, software and commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sora_engine.bench.results import Result, ResultError, counted

PACKAGES = ("torch", "triton", "diffusers", "onnxruntime")


def ran(folder: Path) -> str:
    """The table of a folder of results.

    `*.json` are results of profiles, or lists of runs of one benchmark, of which the last counts;
    `*.jsonl` the lines of a GPU's day. Raises ResultError for anything else.
    """
    lines = ["| results | what | machine | software | commit, day |", "|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.json*")):
        made = _day(path) if path.suffix == ".jsonl" else _profile(path)
        lines += ["| " + " | ".join(cells) + " |" for cells in made]
    return "\n".join(lines) + "\n"


def _profile(path: Path) -> Iterator[tuple[str, ...]]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from error
    if isinstance(saved, list):
        run = saved[-1]
        what, machine, versions = counted(len(run["results"]), "measurement"), run, run
        commit, created = run["commit"][:12], run["utc"]
    else:
        result = Result.read(path)
        what = f"profile {result.profile}, {counted(len(result.measurements), 'measurement')}"
        machine, versions = dict(result.machine), dict(result.versions)
        commit, created = result.commit, result.created
    yield path.name, what, _machine(machine), _software(versions), _when(commit, created)


def _machine(machine: dict[str, Any]) -> str:
    gpu = machine.get("gpu")
    if gpu:
        return str(gpu)
    return f"{machine['cpu']}, {counted(machine['threads'], 'thread')}, no GPU"


def _software(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)


def _when(commit: str, created: str) -> str:
    return f"{commit}, {created.partition('T')[0]}"


def _day(path: Path) -> Iterator[tuple[str, ...]]:
    """A row for each run; a run begins where its commit is named."""
    text = path.read_text(encoding="utf-8")
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    starts = [i for i, line in enumerate(lines) if line.get("what") == "commit"]
    if not starts:
        yield path.name, "the half hour on a GPU", "no GPU yet", "", ""
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=False):
        run = lines[start:end]
        said = {line["what"]: str(line["figure"]) for line in run if "what" in line}
        ends = [line["end"] for line in run if "end" in line]
        whole = ends.count("whole")
        what = f"{counted(whole, 'stage')} whole" + (
            f", {len(ends) - whole} not" if whole < len(ends) else ""
        )
        yield path.name, what, said.get("device", "?"), _software(said), said["commit"]
