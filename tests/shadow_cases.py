"""What is walked through on the shadow device, and the committed table of waits and copies.

python -m tests.shadow_cases                 # measure anew; write the table and docs/gpu.md
python -m tests.shadow_cases --before FILE   # measure into FILE alone, for another commit
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import KINDS, REQUESTS, Sizes, build, load, suits, walk

FILE = Path(__file__).parent / "unit" / "shadow_waits.json"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- shadow: waits -->", "<!-- /shadow -->"

CASES = {
    "t2v": ("plain", "windows", "moving loop", "sparse", "extend", "resample", "ddpm", "edit"),
    "ti2v-5b": ("plain", "known", "inpaint", "windows", "chained"),
    "i2v": ("plain",),
    "flf2v": ("plain",),
    "a14b-i2v": ("plain",),
    "vace": ("extend",),
}
"""The requests of the table, by kind. The slow test walks through all others too."""

Figures = dict[str, dict[str, int]]
"""Waits and copies of each phase of a request."""


def measured(kinds: Sequence[str] = KINDS) -> dict[str, Figures]:
    """The figures of all cases, by "kind: request", and of loading each kind."""
    table: dict[str, Figures] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder, shadow_device() as shadow:
            model = load(build(kind, Path(folder)), shadow)
            # What loading copies is one copy for each tensor: the weights' number.
            table[f"{kind}: load"] = {"load": shadow.trace.phases["load"].figures()}
            for task in CASES[kind]:
                assert suits(task, model)
                summary = walk(model, REQUESTS[task](Sizes(model)), shadow).summary()
                table[f"{kind}: {task}"] = {name: t.figures() for name, t in summary.items()}
    return table


def committed() -> dict[str, dict[str, Figures]]:
    """`now` and `before`, which is the commit that `before_commit` names."""
    values: dict[str, dict[str, Figures]] = json.loads(FILE.read_text(encoding="utf-8"))
    return values


ROWS = {
    "plain step": ("t2v: plain", "step"),
    "first step": ("t2v: plain", "first step"),
    "encode": ("t2v: plain", "encode"),
    "step, 4 windows": ("t2v: windows", "step"),
    "step, 4 windows that move round a loop": ("t2v: moving loop", "step"),
    "step, sparse": ("t2v: sparse", "step"),
    "step, `ddpm`": ("t2v: ddpm", "step"),
    "step taken twice (`resample=2`)": ("t2v: resample", "step"),
    "step, known frame (5B)": ("ti2v-5b: known", "step"),
    "step, known half of each frame (5B)": ("ti2v-5b: inpaint", "step"),
    "step, chained windows (5B)": ("ti2v-5b: chained", "step"),
    "encode, known frame (5B)": ("ti2v-5b: known", "encode"),
    "decode, a latent frame": ("t2v: plain", "frame"),
    "load (5B)": ("ti2v-5b: load", "load"),
}
"""The rows of the page's table."""


def rows(values: Mapping[str, Mapping[str, Figures]]) -> Iterator[str]:
    """The page's table, in Markdown."""
    yield "| phase | waits before | copies before | waits | copies |"
    yield "|---|---|---|---|---|"
    for name, (case, phase) in ROWS.items():
        cells = []
        for when in ("before", "now"):
            figures = values[when].get(case, {}).get(phase)
            if figures is None:
                cells += ["-", "-"]
            else:
                cells += [str(figures["wait"]), str(figures["to device"] + figures["to host"])]
        yield f"| {' | '.join([name, *cells])} |"


def page_with(table: Sequence[str]) -> str:
    """docs/gpu.md with this table between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + "\n" + "\n".join(table) + "\n" + END + tail


def write(path: Path, values: object) -> None:
    """JSON with a case a line."""
    text = json.dumps(values, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if asked.before is not None:
        write(asked.before, measured())
        return
    values = {**committed(), "now": measured()}
    write(FILE, values)
    PAGE.write_text(page_with(list(rows(values))), encoding="utf-8")


if __name__ == "__main__":
    main()
