"""`sora verify` and `sora certificate`: where a file comes from, and what signs results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sora_engine.cli.app import OnceCommand, UsageError, app, say
from sora_engine.errors import SoraError

if TYPE_CHECKING:
    from sora_engine.io.verification import Verdict
    from sora_engine.io.watermark import Watermark

EXIT_CODES = {"trusted": 0, "invalid": 1, "absent": 3, "unknown": 4}


@app.command(cls=OnceCommand)
def verify(
    file: Annotated[str, typer.Argument(help="An mp4, png, webp, gif or jpg file, or another.")],
    trust: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEM",
            help="Certificates of an authority whose signers are trusted; repeat it. By default "
            "the one that `sora certificate` made.",
        ),
    ] = None,
    payload: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Of the watermark that is looked for, such as 00ff."),
    ] = None,
) -> None:
    """Say who signed a file, how it was made, and whether it was altered since.

    Exit code 0: signed by one who is trusted, and unaltered; 1: altered, or its signature is no
    good; 3: not signed; 4: unaltered, but by an unknown signer. The watermark has no say in it.
    """
    from sora_engine.io.certificates import ROOT, default_folder
    from sora_engine.io.verification import verify as read

    if trust is None:
        try:
            own = default_folder() / ROOT
            trust = [str(own)] if own.exists() else []
        except SoraError:
            trust = []
    mark = _watermark(payload)
    try:
        verdict = read(file, trust)
    except SoraError as error:
        raise UsageError(str(error)) from error
    for line in _lines(verdict):
        say(line)
    say(_mark_line(file, mark))
    raise typer.Exit(EXIT_CODES[verdict.state])


def _watermark(payload: str | None) -> Watermark:
    from sora_engine.io.watermark import Watermark

    if payload is None:
        return Watermark()
    if not re.fullmatch("[0-9a-fA-F]{1,4}", payload):
        raise UsageError(f"--payload: {payload!r} is not of one to four hex digits, such as 00ff")
    return Watermark(int(payload, 16))


def _mark_line(file: str, mark: Watermark) -> str:
    from sora_engine.io.video_reader import read_video

    try:
        found = mark.read(read_video(file, max_frames=64)[0])
    except SoraError as error:
        return f"watermark: it cannot be looked for: {error}"
    if not found.marked:
        return "watermark: none was found"
    return (
        f"watermark: {found.payload}, {found.agreeing} of 16 bits as expected; at most one of "
        f"{1 / found.chance:,.0f} unmarked clips looks so"
    )


def _lines(verdict: Verdict) -> Iterator[str]:
    name = verdict.path
    if verdict.state == "absent":
        yield f"{name}: it is not signed"
        return
    who = verdict.signer or "a certificate without a name"
    if verdict.state == "trusted":
        yield f"{name}: signed by {who}, and unaltered since"
    elif verdict.state == "unknown":
        yield (
            f"{name}: unaltered since it was signed as {who}, but anyone can sign so: nobody whom "
            "you trust vouches for it (--trust names who does)"
        )
    elif verdict.altered:
        yield f"{name}: ALTERED since it was signed as {who}"
    else:
        yield f"{name}: its signature is no good"
    for problem in verdict.problems:
        yield f"  {problem}"
    if verdict.software is not None:
        yield f"made with: {verdict.software}"
    if verdict.source_type is not None:
        yield f"source type: {verdict.source_type}"
    told = {key: value for key, value in verdict.generation.items() if key != "sources"}
    if told:
        yield "settings: " + ", ".join(f"{key} {value}" for key, value in told.items())
    for one in verdict.ingredients:
        signed = "not signed" if one.signer is None else f"signed by {one.signer}"
        yield f"made from: {one.title} ({one.relationship}), {signed}"
        for problem in one.problems:
            yield f"  {problem}"


@app.command(cls=OnceCommand)
def certificate(
    name: Annotated[
        str, typer.Option(help="Whom results name as their signer: you, or your service.")
    ] = "sora_engine user",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A folder; by default where --sign looks.")
    ] = None,
) -> None:
    """Make a certificate that signs results, and an authority that vouches for it.

    Nobody trusts that authority but who is given its root.pem.
    """
    from sora_engine.io.certificates import (
        CERTIFICATE,
        KEY,
        ROOT,
        default_folder,
        make_certificates,
    )

    try:
        folder = default_folder() if output is None else Path(output)
        made = make_certificates(folder, name)
    except SoraError as error:
        raise UsageError(str(error)) from error
    say(f"{made / CERTIFICATE} and {made / KEY}: sign as {name!r}")
    say(f"{made / ROOT}: give it to those who are to trust you, for `sora verify --trust`")
    say(f"{made / 'root.key'}: whoever has it signs in your name; keep it")
