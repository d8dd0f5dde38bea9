"""`sora inspect`: what files of weights are."""

from __future__ import annotations

from typing import Annotated

import typer

from sora_engine.cli.app import UsageError, app, say
from sora_engine.errors import SoraError


@app.command()
def inspect(
    files: Annotated[list[str], typer.Argument(help="Files of weights.", metavar="FILE...")],
) -> None:
    """Say what files of weights are, from their headers alone."""
    from sora_engine.models.inspection import inspect_file

    for file in files:
        try:
            report = inspect_file(file)
        except SoraError as error:
            raise UsageError(str(error)) from error
        for line in report.lines():
            say(line)
