"""`sora families`: the kinds of checkpoints that there are, and what each can do."""

from __future__ import annotations

from sora_engine.cli.app import app


@app.command()
def families() -> None:
    """List the families of models by what they can do, as a table."""
    from sora_engine.models.overview import family_table

    for line in family_table():
        print(line)
