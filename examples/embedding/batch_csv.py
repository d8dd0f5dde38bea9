"""A video for each row of a CSV of prompts: `python batch_csv.py prompts.csv folder`.

Columns: prompt, and any of name, seed, height, width, num_frames. A row that fails is told of and
the others go on.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import sora_engine as sora

NUMBERS = ("seed", "height", "width", "num_frames", "num_inference_steps")


def request_of(row: dict[str, str]) -> sora.VideoRequest:
    numbers = {name: int(row[name]) for name in NUMBERS if row.get(name)}
    return sora.VideoRequest(row["prompt"], **numbers)


def main(table: str, folder: str, model: str = "sprites") -> list[Path]:
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    written, jobs = [], []
    with sora.Engine.from_pretrained(model) as engine:
        for i, row in enumerate(rows):
            name = row.get("name") or f"{i:04d}"
            try:
                jobs.append((name, engine.submit(request_of(row))))
            except (sora.RequestError, ValueError) as error:
                print(f"row {i + 1}: {error}", file=sys.stderr)
        for name, job in jobs:
            try:
                written.append(job.result().save(output / f"{name}.mp4"))
            except sora.SoraError as error:
                print(f"{name}: {error}", file=sys.stderr)
    return written


if __name__ == "__main__":
    main(*sys.argv[1:])
