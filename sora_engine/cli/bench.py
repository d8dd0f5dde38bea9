"""`sora bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sora_engine.cli.app import OnceCommand, UsageError, app, say


@app.command(cls=OnceCommand)
def bench(
    profile: Annotated[
        str, typer.Option(help="cpu (under 5 minutes), cpu-long or h200 (under 9).")
    ] = "cpu",
    only: Annotated[
        str,
        typer.Option(
            help="Groups of the profile: ops,block,end-to-end,serving,http,session,memory."
        ),
    ] = "",
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="JSON of the result; of --plot, the picture (.svg)."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of both sides.")] = None,
    tiny: Annotated[bool, typer.Option(help="A dry run at tiny sizes.")] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two results, the older first: exit code 1 where something got worse."),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="RESULT", help="Draw a result as a picture, beside it or at -o."),
    ] = None,
    tune: Annotated[
        bool, typer.Option(help="Measure the kernels' launch tables on this GPU.")
    ] = False,
) -> None:
    """Measure this machine, compare two results, or draw one."""
    if compare is not None:
        raise typer.Exit(_compare(*compare))
    if plot is not None:
        return _plot(plot, output)
    if tune:
        raise typer.Exit(_tune())
    from sora_engine.bench.results import ResultError

    if output is not None and not output.endswith(".json"):
        raise UsageError(f"--output: {output} must end in .json")
    say("loading torch")
    import torch

    from sora_engine.bench.profiles import run

    if threads is not None:
        torch.set_num_threads(threads)
    groups = [name.strip() for name in only.split(",") if name.strip()]
    try:
        result = run(profile, only=groups, tiny=tiny, say=say)
    except ResultError as error:
        raise UsageError(str(error)) from error
    if output is not None:
        result.write(output)
        say(f"{output}: {len(result.measurements)} measurements, commit {result.commit}")


def _compare(before: str, after: str) -> int:
    from sora_engine.bench.compare import Verdict, compare
    from sora_engine.bench.results import Result, ResultError

    try:
        findings = compare(Result.read(before), Result.read(after))
    except ResultError as error:
        raise UsageError(str(error)) from error
    for finding in findings:
        say(str(finding))
    worse = sum(finding.verdict is Verdict.REGRESSION for finding in findings)
    say(f"{worse} regressions among {len(findings)} comparisons")
    return 1 if worse else 0


def _plot(result: str, output: str | None) -> None:
    from sora_engine.bench.plot import plot
    from sora_engine.bench.results import Result, ResultError
    from sora_engine.io.atomic import write_atomically

    path = Path(result).with_suffix(".svg") if output is None else Path(output)
    if path.suffix != ".svg":
        raise UsageError(f"--output: {path} must end in .svg, as --plot draws that")
    try:
        write_atomically(path, plot(Result.read(result)).encode())
    except ResultError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"--output: {path} cannot be written: {error}") from error
    say(f"{path}: drawn from {result}")


def _tune() -> int:
    from importlib import import_module

    try:
        tune = import_module("sora_kernels.tune")
    except ImportError as error:
        raise UsageError(f"--tune: this installation has no sora_kernels.tune ({error})") from error
    return tune.main([]) or 0
