"""The script of a GPU's first half hour: what hangs is killed, what crashes is told."""

from __future__ import annotations

import json
import runpy
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = """
import os, subprocess, sys, time

def right():
    print("a word that is no figure")
    yield {"what": "one", "figure": "1 ms"}
    yield {"what": "two", "figure": "2 ms"}

def hangs():
    yield {"what": "before", "figure": "3 ms"}
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(600)

def raises():
    yield {"what": "so far", "figure": "4 ms"}
    raise RuntimeError("an illegal memory access")

def dies():
    os.kill(os.getpid(), 11)
    yield {}
"""


def test_the_estimate_on_the_page_follows_from_the_tables(monkeypatch):
    """All but what the host takes, which another machine does in another time."""
    estimate = runpy.run_path(str(ROOT / "benchmarks" / "gpu" / "estimate.py"))
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    begin, end = "<!-- estimate -->", "<!-- /estimate -->"
    shown = page.partition(begin)[2].partition(end)[0].strip().splitlines()
    made = list(estimate["rows"](13, 0.0))
    assert len(shown) == len(made) == 6
    for row, due in zip(shown, made, strict=True):
        cells, expected = (line.split(" | ") for line in (row, due))
        assert cells[:5] == expected[:5]
    # By hand: 14B at 720p, two branches of 75,600 tokens, 40 heads of 128, 512 keys of a text.
    case = estimate["CASES"][0]
    products = 2 * 2 * 75_600 * (6 * 5120**2 + 2 * 5120 * 13_824) / 790e12
    assert estimate["product_seconds"](case) == pytest.approx(products)
    kernel = estimate["Kernel"]("two at a time", 2)
    attention = 4 * 128 * 2 * 75_600 * (75_600 + 512) * 40 / 790e12
    assert estimate["attention_seconds"](case, kernel) == pytest.approx(attention)
    alone = estimate["attention_seconds"](case, estimate["Kernel"]("one", 1))
    assert alone / attention == pytest.approx(1 + (1 / 16 + 3.5 / 128) / (4 * 128 / 4096))


@pytest.fixture(scope="module")
def day():
    return runpy.run_path(str(ROOT / "benchmarks" / "gpu_day.py"))


@pytest.fixture
def lines(day, tmp_path, monkeypatch):
    (tmp_path / "stages.py").write_text(STAGES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("right", "hangs", "raises", "dies")
    stages = [day["Stage"](name, 1, 5.0, f"stages:{name}") for name in names]
    stages.append(day["Stage"]("lacks", 1, 5.0, "stages:right", ("no_such_package",)))
    stages.append(day["Stage"]("right again", 1, 20.0, "stages:right"))
    monkeypatch.setitem(day["run"].__globals__, "STAGES", tuple(stages))
    began = time.monotonic()
    assert day["run"](stages, tmp_path / "lines", dry_run=False) == 3
    assert time.monotonic() - began < 60
    return [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]


def test_a_stage_that_hangs_is_killed_and_the_rest_goes_on(day, lines):
    figures = [(line["stage"], line["what"]) for line in lines if "what" in line]
    assert figures == [
        ("right", "one"), ("right", "two"), ("hangs", "before"), ("raises", "so far"),
        ("right again", "one"), ("right again", "two"),
    ]  # fmt: skip
    ends = {line["stage"]: line["end"] for line in lines if "end" in line}
    assert ends == {
        "right": "whole",
        "hangs": "killed after 5 s",
        "raises": "exit code 1: RuntimeError: an illegal memory access",
        "dies": "exit code -11: no word",
        "lacks": "left out: no no_such_package here",
        "right again": "whole",
    }
    assert not [
        path for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"time.sleep(600)" in path.read_bytes()
    ]  # fmt: skip
    page = f"before\n{day['MARKS'][0].format('part 1')}\nold\n{day['MARKS'][1]}\nafter"
    table = day["report"](page, lines).split("\n")
    assert table[0] == "before"
    assert table[-1] == "after"
    assert "old" not in table
    assert "| right | two | 2 ms |" in table
    assert "| hangs | | killed after 5 s |" in table
    empty = day["report"](page, [])
    assert empty.count("not run yet") == 6


@pytest.mark.slow
def test_every_stage_passes_at_toy_sizes_on_a_cpu(day, tmp_path):
    output = tmp_path / "lines"
    assert day["run"](day["STAGES"], output, dry_run=True) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    ends = {line["stage"]: line["end"] for line in lines if "end" in line}
    assert set(ends.values()) == {"whole"}
    assert len(ends) == len(day["STAGES"])
    wrong = [line for line in lines if "WRONG" in str(line.get("figure"))]
    assert not wrong
