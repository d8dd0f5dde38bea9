"""`sora ladders`: the few-step ladders that there are."""

from __future__ import annotations

from sora_engine.cli.app import app


@app.command()
def ladders() -> None:
    """List the levels of few-step models, for --ladder."""
    from sora_engine.models.registry import families
    from sora_engine.request.ladders import LADDERS

    families()
    width = max(map(len, LADDERS))
    for name, ladder in LADDERS.items():
        levels = " ".join(f"{sigma:.4g}" for sigma in ladder.sigmas)
        print(f"{name:{width}}  {len(ladder.sigmas)} steps by {ladder.solver}: {levels}")
        print(f"{'':{width}}  {ladder.of}")
