"""Markdown tables from results, and the README's kept equal to them."""

from __future__ import annotations

import re
from pathlib import Path

from sora_engine.bench.ran import ran
from sora_engine.bench.results import SUBJECT, Measurement, Result, ResultError, Spread, counted

MARKED = re.compile(
    r"(?P<open><!-- (?P<kind>bench|medians): (?P<file>[\w.-]+\.json)(?: (?P<names>[^\n]*?))? -->\n)"
    r".*?(?P<close><!-- /(?P=kind) -->)",
    re.DOTALL,
)


RAN = re.compile(r"(?P<open><!-- ran -->\n).*?(?P<close><!-- /ran -->)", re.DOTALL)


def table(result: Result, names: str = "") -> str:
    """A row for each rival of each measurement whose name the pattern `names` is found in, and a
    line that says what it ran on. Raises ResultError where there is none."""
    lines = ["| what | sora_engine, median | beside it | times better (20% to 80%) |"]
    lines.append("|---|---|---|---|")
    for measurement in result.measurements:
        if re.search(names, measurement.name):
            lines += _rows(measurement)
    if len(lines) == 2:
        raise ResultError(f"no measurement of {result.profile!r} is named like {names!r}")
    return _with_machine(lines, result)


def medians(result: Result, names: str = "") -> str:
    """A column for each measurement whose name the pattern `names` is found in and a row for each
    side of them, and a line that says what it ran on. Raises ResultError where there is none."""
    chosen = [each for each in result.measurements if re.search(names, each.name)]
    if not chosen:
        raise ResultError(f"no measurement of {result.profile!r} is named like {names!r}")
    lines = [f"| median | {' | '.join(f'{each.name}, {each.unit}' for each in chosen)} |"]
    lines.append("|---" * (len(chosen) + 1) + "|")
    for side in dict.fromkeys(side for each in chosen for side in each.samples):
        found = (
            f"{each.spread(side).median:.3g}" if side in each.samples else "-" for each in chosen
        )
        lines.append(f"| {side} | {' | '.join(found)} |")
    return _with_machine(lines, result)


def _with_machine(lines: list[str], result: Result) -> str:
    where = result.machine
    threads = f"{counted(where['threads'], 'thread')} of {counted(where['cores'], 'core')}"
    device = where["gpu"] or f"{where['cpu']}, {threads}, {where['memory_gib']:g} GiB"
    packages = ", ".join(
        f"{name} {result.versions[name]}"
        for name in ("torch", "diffusers")
        if name in result.versions
    )
    day = result.created.partition("T")[0]
    lines = [*lines, "", f"{device}; {packages}; commit {result.commit}, {day}."]
    return "\n".join(lines) + "\n"


def _rows(measurement: Measurement) -> list[str]:
    if SUBJECT not in measurement.samples:
        return []
    ours = f"{measurement.spread(SUBJECT).median:.3g} {measurement.unit}"
    rows = []
    for rival in measurement.rivals:
        theirs = f"{rival}: {measurement.spread(rival).median:.3g} {measurement.unit}"
        ratio = Spread.of(measurement.ratios(rival))
        spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if ratio.rounds > 1 else ""
        rows.append(f"| {measurement.name} | {ours} | {theirs} | {ratio.median:.2f}{spread} |")
    return rows or [f"| {measurement.name} | {ours} | | |"]


def fill(text: str, folder: Path) -> str:
    """`text` with what stands between its marks made anew from the results in `folder`.

    A place is marked `<!-- bench: FILE.json -->` (or `FILE.json PATTERN`, for some of its names)
    and `<!-- /bench -->`, each on a line of its own, or `medians` in place of `bench`; that of what
    has run where `<!-- ran -->` and
    `<!-- /ran -->`. Raises ResultError for a file that is missing or not a result.
    """
    text = RAN.sub(lambda m: m["open"] + ran(folder) + m["close"], text)
    if len(re.findall("<!-- (?:bench|medians):", text)) != len(MARKED.findall(text)):
        raise ResultError("a mark `<!-- bench: FILE.json -->` has no `<!-- /bench -->` behind it")

    def made(mark: re.Match[str]) -> str:
        make = table if mark["kind"] == "bench" else medians
        result = Result.read(folder / mark["file"])
        return mark["open"] + make(result, mark["names"] or "") + mark["close"]

    return MARKED.sub(made, text)
