"""What the families can do, as one table: a row each, from what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sora_engine.models.family import Family
from sora_engine.models.registry import families

HEAD = (
    "family", "folders of", "makes", "reads", "autoencoder", "known content", "windows", "ranks",
    "adapters", "ladders", "page",
)  # fmt: skip


def family_table(known: Sequence[Family] | None = None) -> list[str]:
    """Lines of a Markdown table of these families, or of all that are registered."""
    rows = [_row(family) for family in (families() if known is None else known)]
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _row(family: Family) -> tuple[str, ...]:
    can = family.capabilities
    return (
        family.name,
        _listed(family.layout.pipelines) or "files alone",
        can.makes,
        can.reads,
        _listed(family.layout.components["vae"]),
        _listed(mode.value for mode in can.known_modes),
        _listed(can.windows) or "none",
        _listed(can.ranks),
        _listed(can.adapters) or "none",
        _listed(family.ladders) or "none",
        f"[{can.page}]({can.page})",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
