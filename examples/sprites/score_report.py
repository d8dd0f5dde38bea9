"""The scores as a page of Markdown: docs/scores.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from size_table import NAMES, SIDES

WANTED_SHARE = 0.8
"""Of the true clips' score, in what a task is held to."""

# What each task is held to beside the four facts, under which name the table shows it.
MEASURES = {
    "continues": "goes on from what is known",
    "layout": "layout kept",
    "kept": "known frames over 30 dB",
}


HEAD = """# Scores of the tasks

By `examples/sprites/score_tasks.py`: what the reader finds in clips that the engine makes, over
what it finds in true ones (`made / true`, shares of clips). A task is held to 80% of the true
clips' share."""


def report(scores: dict[str, Any], sheets: Sequence[str] = ()) -> str:
    """Tables of what has been scored so far, and pictures: sheets by their paths from the page."""
    parts = [HEAD, task_table(dict(_lines(scores)))]
    parts += [f"{name.capitalize()}: {text}." for name, text in remarks(scores)]
    if "minute" in scores:
        parts += ["## A minute", minute_table(scores["minute"])]
    if "memory" in scores:
        parts.append(memory_line(scores["memory"]))
    if "sizes" in scores:
        parts += ["## Sizes", size_table(scores["sizes"])]
    if sheets:
        parts.append(
            "## Sheets\n\nWhere a task is given a clip, that one stands above what is made."
        )
        parts += [f"{path.split('/')[-1].removesuffix('.png')}\n\n![]({path})" for path in sheets]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lines(scores: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tasks, and each strength of `edit`, that have a table of facts."""
    for task, score in scores.items():
        if "clips" in score:
            yield task, score
        elif task == "edit":
            yield from ((f"edit, {how}", each) for how, each in score.items())


def task_table(lines: dict[str, Any]) -> str:
    """A line a task: what the reader has right, of what is made / of true clips."""
    if not lines:
        return ""
    columns = [*NAMES, *(m for m in MEASURES if any(m in line for line in lines.values()))]
    rows = [["task", *(MEASURES.get(c, c) for c in columns), "least share of true", "clips"]]
    for task, line in lines.items():
        held = {c: line[c]["share"] for c in columns if c in line and line[c]["share"] is not None}
        least = min(held, key=held.__getitem__)
        verdict = f"{percent(held[least])} ({least})"
        cells = [cell(line[c]) if c in line else "" for c in columns]
        if "kept_db" in line:
            at = columns.index("kept") if "kept" in columns else -1
            cells[at] += f", mean {line['kept_db']:.1f} dB"
        rows.append([task.replace("_", ", "), *cells, verdict, str(line["clips"])])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def cell(fact: dict[str, float]) -> str:
    return f"{percent(fact['made'])} / {percent(fact['true'])}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def remarks(scores: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a line of the table has no column for."""
    if "loop" in scores:
        s = scores["loop"]
        yield (
            "loop",
            f"the seam's change over that of the frames round about is {s['seam_ratio']} on "
            f"average (median {s['seam_ratio_median']}; true clips {s['true_seam_ratio']}); under "
            f"1.2 in {percent(s['seams_under_1.2'])} of loops (true clips: "
            f"{percent(s['true_seams_under_1.2'])}). At the borders of its other latents it is "
            f"{s['other_borders_ratio']}, and under 1.2 at {percent(s['other_borders_under_1.2'])}",
        )
    if "shots" in scores:
        other = scores["shots"]["other shot's prompt"]
        told = ", ".join(f"{name} {percent(other[name])}" for name in NAMES)
        yield "shots", f"against the other shot's prompt the same clips score {told}"
    if "upscale" in scores:
        s = scores["upscale"]
        yield (
            "upscale",
            f"{s['db']:.1f} dB from the true clip; plain enlarging {s['enlarged_db']:.1f} dB",
        )


def minute_table(score: dict[str, Any]) -> str:
    """By stretch of 10 seconds."""
    by_stretch = {
        "motion as asked": score["motion by stretch"],
        **{
            f"{name} as at first{which}": score[f"{name} as in the first stretch{untold}"]
            for which, untold in (("", ""), (", where no word tells it", ", untold"))
            for name in ("colour", "shape", "size")
        },
    }
    spans = [f"{10 * i}-{10 * i + 10} s" for i in range(len(score["motion by stretch"]))]
    rows = [["", *spans]]
    rows += [[name, *map(percent, values)] for name, values in by_stretch.items()]
    table = markdown(rows)
    borders = score["change at window borders over elsewhere"]
    latents = score["change at window borders over other latents' borders"]
    ground, sprite = (score[f"{what} drift, levels of 255"] for what in ("background", "sprite"))
    return (
        f"{score['videos']} videos of {score['frames']} frames; their 4-second clips have the "
        f"motion right in {percent(score['motion of 4 s clips'])}.\n\n{table}\n\n"
        f"Change at window borders over elsewhere: {borders} (over other latents' borders: "
        f"{latents}). Drift from the first 10 seconds to the last: background {ground}, sprite "
        f"{sprite} levels of 255 at most."
    )


def memory_line(score: dict[str, Any]) -> str:
    lengths = [name for name in score if name.endswith(" s")]
    peaks = ", ".join(f"{name}: {score[name]['peak_mib']} MiB" for name in lengths)
    return f"Peak memory, {peaks}; {score['allowed_mib']} MiB would be 10% and the canvas more."


def size_table(score: dict[str, Any]) -> str:
    """Heights down, widths across."""
    rows = [["height \\ width", *map(str, SIDES)]]
    for height in SIDES:
        cells = [score[f"{width}x{height}"] for width in SIDES]
        rows.append([str(height), *(" ".join(f"{100 * c[k]:.0f}" for k in NAMES) for c in cells)])
    table = markdown(rows)
    return f"{', '.join(NAMES)} in %, {score['clips a size']} clips a size:\n\n{table}"
