"""`sora doctor`."""

from __future__ import annotations

from sora_engine.cli.app import app, say


@app.command()
def doctor() -> None:
    """Print what was found: CPU, GPU, torch, Triton, csrc, FFmpeg, optional packages."""
    from sora_engine.cli.report import report

    for name, finding in report():
        say(f"{name:<18} {finding}")
