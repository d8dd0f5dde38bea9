"""What is walked through on the shadow device, and the committed table of waits and copies.

python -m tests.shadow_cases                 # measure anew; write the table and docs/gpu.md
python -m tests.shadow_cases --before FILE   # measure into FILE alone, for another commit
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sora_engine.models.video_model import VideoModel
from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import KINDS, REQUESTS, Sizes, Walk, build, load, suits, walk
from sora_engine.testing.state import Shadow

FILE = Path(__file__).parent / "unit" / "shadow_waits.json"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- shadow: waits -->", "<!-- /shadow -->"

CASES = {
    "t2v": (
        "plain",
        "long",
        "windows",
        "moving loop",
        "sparse",
        "extend",
        "resample",
        "ddpm",
        "edit",
    ),
    "ti2v-5b": ("plain", "known", "inpaint", "windows", "chained"),
    "i2v": ("plain",),
    "flf2v": ("plain",),
    "a14b-i2v": ("plain",),
    "vace": ("extend",),
}
"""The requests of the table, by kind. The slow test walks through all others too."""
DECODED = ("plain", "long", "extend")
"""The requests of the table that are decoded too: it is the same for all."""

Figures = dict[str, dict[str, int]]
"""Waits and copies of each phase of a request."""


class Models:
    """Tiny models on the shadow device, each loaded once: tensors outlive one shadow's time."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._loaded: dict[tuple[str, str], VideoModel] = {}
        self.loads: dict[str, dict[str, int]] = {}
        """What loading each kind came to: a copy for each tensor."""

    def of(self, kind: str, shadow: Shadow, device: str = "cuda") -> VideoModel:
        """The model of a kind, on a device of the shadow whose time it is."""
        if (kind, device) not in self._loaded:
            folder = self._place / kind
            model = load(folder if folder.exists() else build(kind, folder), shadow, device)
            self.loads[kind] = shadow.trace.phases["load"].figures()
            walk(model, Sizes(model).request(2), shadow)  # lays out the decoder's weights
            self._loaded[kind, device] = model
        return self._loaded[kind, device]

    def get_ready(self, kind: str, device: str = "cuda") -> None:
        """Load a kind, for what comes after."""
        with shadow_device(2) as shadow, torch.cuda.device(device):
            self.of(kind, shadow, device)


def measured(models: Models, kind: str) -> Iterator[tuple[str, Walk | None, Figures]]:
    """What loading a kind came to, and each of its cases: "kind: request" and the figures."""
    with shadow_device() as shadow:
        model = models.of(kind, shadow)
        yield f"{kind}: load", None, {"load": models.loads[kind]}
        for task in CASES[kind]:
            assert suits(task, model)
            made = walk(model, REQUESTS[task](Sizes(model)), shadow, decode=task in DECODED)
            figures = {name: tally.figures() for name, tally in made.summary().items()}
            yield f"{kind}: {task}", made, figures


def all_measured() -> dict[str, Figures]:
    """The figures of all kinds."""
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        return {case: figures for kind in KINDS for case, _, figures in measured(models, kind)}


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
    "decode, a latent frame by CUDA graph": ("t2v: long", "frame"),
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
    """As JSON, each phase on a line."""
    text = re.sub(r"\{\s+(\"wait\"[^}]*?)\s+\}", r"{\1}", json.dumps(values, indent=1))
    text = re.sub(r",\n\s+(\"to )", r", \1", text)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if asked.before is not None:
        write(asked.before, all_measured())
        return
    values = {**committed(), "now": all_measured()}
    write(FILE, values)
    PAGE.write_text(page_with(list(rows(values))), encoding="utf-8")


if __name__ == "__main__":
    main()
