"""Parts of the slow set, for runs that have time for one of them: `--slow-part 2/6`.

A part is made of whole files, so that tests that share a fixture stay together. The longest file
goes first, each into the part that is shortest so far: within 4/3 of the best there is (R. L.
Graham, "Bounds on multiprocessing timing anomalies", 1969).
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

TABLE = Path(__file__).with_name("slow_seconds.json")
SECONDS: dict[str, float] = json.loads(TABLE.read_text(encoding="utf-8"))
"""What the slow tests of a file take. A file that is not in it still has its part."""


def parse_part(text: str) -> tuple[int, int]:
    """`2/6` as (2, 6). `ValueError` for what is no part."""
    match = re.fullmatch(r"(\d{1,3})/(\d{1,3})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r}: it is PART/PARTS, such as 1/6 or 6/6")
    return int(match[1]), int(match[2])


def loads(parts: int) -> list[dict[str, float]]:
    """Seconds by file, for each part: of the files that were measured."""
    made: list[dict[str, float]] = [{} for _ in range(parts)]
    for file, seconds in sorted(SECONDS.items(), key=lambda entry: (-entry[1], entry[0])):
        min(made, key=lambda part: sum(part.values()))[file] = seconds
    return made


def part_of(file: str, parts: int) -> int:
    """The one part, from 1 on, to which a file's slow tests belong, whatever else is collected."""
    for part, files in enumerate(loads(parts), start=1):
        if file in files:
            return part
    return zlib.crc32(file.encode()) % parts + 1


def measured(report: Path) -> dict[str, float]:
    """Seconds by file, setting up included, out of what `pytest --junitxml` wrote."""
    seconds: dict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        seconds[case.attrib["classname"].replace(".", "/") + ".py"] += float(case.attrib["time"])
    return {file: round(seconds[file], 1) for file in sorted(seconds)}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(measured(Path(sys.argv[1])), indent=2) + "\n", encoding="utf-8")
