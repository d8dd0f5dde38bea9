"""The first half hour on a GPU: three parts of at most eight minutes, each usable by itself.

    python benchmarks/gpu_day.py --part 1            # numerics and kernels: needs torch and triton
    python benchmarks/gpu_day.py --part 2            # the engine: needs the package's dependencies
    python benchmarks/gpu_day.py --part 3            # beside diffusers
    python benchmarks/gpu_day.py --dry-run           # every stage at toy sizes on a CPU
    python benchmarks/gpu_day.py --report docs/gpu.md

A stage is a process of its own with its own limit: one that hangs is killed, one that crashes takes
no other with it, and a poisoned device context ends with it. Each figure is a JSON line in
`--output` as soon as it is there. Numerics come first, what may hang last. `--report` writes the
tables between the marks of a page, with "not run yet" where no line is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "gpu.jsonl"
PART_S = 480.0
MARKS = "<!-- gpu: {} -->", "<!-- /gpu -->"


@dataclass(frozen=True)
class Stage:
    """One thing that is tried. run: `module:function`, which yields figures (`gpu.timing.figure`).
    needs: packages without which it is left out."""

    name: str
    part: int
    limit_s: float
    run: str
    needs: tuple[str, ...] = ()


STAGES = (
    Stage("rates", 1, 20, "gpu.kernels:rates"),
    Stage("compile", 1, 70, "gpu.kernels:compile_all"),
    Stage("numerics", 1, 90, "gpu.kernels:numerics"),
    Stage("attention", 1, 75, "gpu.kernels:attention"),
    Stage("fused ops", 1, 45, "gpu.kernels:fused"),
    Stage("Gluon, small", 1, 30, "gpu.kernels:gluon_small"),
    Stage("Gluon, speed", 1, 45, "gpu.kernels:gluon_speed"),
    Stage("racecheck", 1, 60, "gpu.kernels:racecheck"),
    Stage("CUDA sources", 1, 45, "gpu.kernels:cuda_sources"),
    Stage("sprites", 2, 50, "gpu.engine:sprites", ("av", "transformers")),
    Stage("GPU tests", 2, 120, "gpu.engine:gpu_tests", ("pytest", "hypothesis", "av")),
    Stage("step, Wan 1.3B 480p", 2, 45, "gpu.engine:step_small_model", ("av",)),
    Stage("step, Wan 14B 720p", 2, 60, "gpu.engine:step_large_model", ("av",)),
    Stage("sixteen small", 2, 40, "gpu.engine:sixteen_small", ("av",)),
    Stage("small passes", 2, 25, "gpu.engine:small_passes", ("av",)),
    Stage("company", 2, 30, "gpu.engine:company", ("av",)),
    Stage("memory plan", 2, 20, "gpu.engine:memory_plan", ("av",)),
    Stage("decode", 2, 90, "gpu.engine:decode", ("av",)),
    Stage("rival, Wan 1.3B 480p", 3, 130, "gpu.rivals:wan_1_3b", ("diffusers",)),
    Stage("rival, Wan 14B 480p", 3, 110, "gpu.rivals:wan_14b_480p", ("diffusers",)),
    Stage("rival, Wan 14B 720p", 3, 150, "gpu.rivals:wan_14b_720p", ("diffusers",)),
    Stage("rival, Wan 2.2 5B 704p", 3, 90, "gpu.rivals:wan_5b", ("diffusers",)),
)


def run_stage(
    stage: Stage, output: Path, environment: dict[str, str], limit_s: float
) -> str | None:
    """Run a stage in its own process; why it ended, or None where it is whole."""
    missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"left out: no {', '.join(missing)} here"
    # -u: a line is on its way when it is printed.
    command = [sys.executable, "-u", str(HERE / "gpu_day.py"), "--stage", stage.run]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    errors: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_keep, args=(process.stdout, stage, output)),
        threading.Thread(target=lambda lines: errors.extend(lines), args=(process.stderr,)),
    ]
    for reader in readers:
        reader.start()
    why = None
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        why = f"killed after {limit_s:g} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started, too
    process.wait()
    for reader in readers:
        reader.join(5.0)
    if why is None and process.returncode != 0:
        last = next((line.strip() for line in reversed(errors) if line.strip()), "no word")
        why = f"exit code {process.returncode}: {last[:300]}"
    return why


def _keep(lines: Iterable[str], stage: Stage, output: Path) -> None:
    for line in lines:
        try:
            figure = json.loads(line)
        except ValueError:  # other programs print too
            continue
        if isinstance(figure, dict):
            keep(output, {"part": stage.part, "stage": stage.name, **figure})


def keep(output: Path, line: dict[str, Any]) -> None:
    """Append a line to the file, and show it."""
    text = json.dumps(line)
    print(text, flush=True)
    with output.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def run(stages: Iterable[Stage], output: Path, dry_run: bool) -> int:
    """Run stages in order, each part within its time; how many did not end well."""
    environment = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["SORA_BENCH_DEVICE"] = "cpu" if dry_run else "cuda"
    environment["GPU_DAY_DRY_RUN"] = "1" if dry_run else ""
    began: dict[int, float] = {}
    failed = 0
    for stage in stages:
        started = time.monotonic()
        since = began.setdefault(stage.part, started)
        if not dry_run and started - since + min(stage.limit_s, 30.0) > PART_S:
            why: str | None = f"left out: the {PART_S:g} s of part {stage.part} are over"
        else:
            why = run_stage(stage, output, environment, stage.limit_s * (4 if dry_run else 1))
        failed += why is not None and not why.startswith("left out: no ")
        seconds = round(time.monotonic() - started, 1)
        end = {"end": why or "whole", "seconds": seconds}
        keep(output, {"part": stage.part, "stage": stage.name, **end})
    return failed


def figures_of(stage: str) -> Iterator[dict[str, Any]]:
    """In the stage's own process: what it finds."""
    module, _, function = stage.partition(":")
    sys.path[:0] = [str(HERE), str(HERE / "kernels"), str(ROOT)]
    yield from getattr(importlib.import_module(module), function)()


def report(page: str, lines: list[dict[str, Any]]) -> str:
    """The page with the tables of all parts renewed."""
    for part in sorted({stage.part for stage in STAGES}):
        begin, end = MARKS[0].format(f"part {part}"), MARKS[1]
        table = "\n".join(table_of(part, lines))
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        page = pattern.sub(lambda _, new=f"{begin}\n{table}\n{end}": new, page)
    return page


def table_of(part: int, lines: list[dict[str, Any]]) -> Iterator[str]:
    """Rows for each stage of a part: its figures, or that it has not run."""
    yield "| stage | what | figure |"
    yield "|---|---|---|"
    for stage in STAGES:
        if stage.part != part:
            continue
        own = [line for line in lines if line["stage"] == stage.name]
        ends = [line["end"] for line in own if "end" in line]
        if not own:
            yield f"| {stage.name} | | not run yet |"
        for line in own:
            if "end" not in line:
                yield f"| {stage.name} | {line['what']} | {line['figure']} |"
        if ends and ends[-1] != "whole":
            yield f"| {stage.name} | | {ends[-1]} |"


def admit(output: Path) -> int:
    """Write the backends that the last run found right and faster; say which."""
    sys.path[:0] = [str(HERE), str(ROOT / "kernels")]
    from gpu.admission import admissions

    from sora_kernels.admission import FILE, write

    kept = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    entries = list(admissions(list(map(json.loads, kept))))
    write(entries)
    for entry in entries:
        print(f"{entry.op}: auto takes {entry.backend} on sm_{entry.architecture}, "
              f"{entry.gain} times as fast at the least")  # fmt: skip
    print(f"{FILE.name}: {len(entries)} backends, from {output}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", maxsplit=1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="one part; all by default")
    parser.add_argument("--only", default="", metavar="REGEX", help="stages by name")
    parser.add_argument("--output", type=Path, help=f"{RESULTS.relative_to(ROOT)} by default")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="renew a page's tables")
    parser.add_argument(
        "--admit",
        action="store_true",
        help="write which backends auto takes on the card that was measured",
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        for figure in figures_of(options.stage):
            print(json.dumps(figure), flush=True)
        return 0
    output = options.output or (ROOT / "gpu-dry-run.jsonl" if options.dry_run else RESULTS)
    if options.report:
        kept = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
        page = options.report.read_text(encoding="utf-8")
        options.report.write_text(report(page, list(map(json.loads, kept))), encoding="utf-8")
        return 0
    if options.admit:
        return admit(output)
    chosen = [
        stage
        for stage in STAGES
        if options.part in (None, stage.part) and re.search(options.only, stage.name)
    ]
    if not chosen:
        parser.error(f"no stage is named like {options.only!r}; there are "
                     + ", ".join(stage.name for stage in STAGES))  # fmt: skip
    return 1 if run(chosen, output, options.dry_run) else 0


if __name__ == "__main__":
    raise SystemExit(main())
