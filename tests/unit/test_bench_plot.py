"""`sora bench --plot`: bars as long as their values say, read back from the picture."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sora_engine.bench.plot import plot
from sora_engine.bench.results import Measurement, Result

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = sorted(
    path
    for path in (ROOT / "docs" / "pictures").glob("*.svg")
    if (RESULTS / f"{path.stem}.json").exists()  # others have commands of their own
)
SVG = "{http://www.w3.org/2000/svg}"


def result(*measurements: Measurement) -> Result:
    machine = {"cpu": "a <CPU> & more", "threads": 2}
    return Result("cpu", measurements, machine, {"torch": "2"}, "abc", "2026-11-30T00:00:00")


def bars(picture: str) -> list[tuple[str, float, str]]:
    """Class, length and words of each bar."""
    root = ElementTree.fromstring(picture)
    found = [r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    return [(r.get("class") or "", float(r.get("width") or 0), r[0].text or "") for r in found]


def test_bars_of_a_measurement_are_in_proportion_and_ours_is_first() -> None:
    one = Measurement("step", "s", {"other": [4.0, 4.0], "sora": [1.0, 1.0]})
    (kind, ours, told), (other, theirs, _) = bars(plot(result(one)))
    assert (kind, other) == ("ours", "other")
    assert theirs / ours == pytest.approx(4, rel=0.01)
    assert told == "sora: 1.00 s, 20% to 80%: 1.00 to 1.00, 2 rounds"
    assert "sora 4.00x as good" in plot(result(one))


def test_shares_of_a_whole_have_the_whole_as_their_scale() -> None:
    shares = [
        Measurement(f"efficiency {n}", "of 2 ranks", {"sora": [share]}, better="higher")
        for n, share in enumerate((0.25, 0.5))
    ]
    least = Measurement("whole", "of 2 ranks", {"sora": [1.0]}, better="higher")
    (_, quarter, _), (_, half, _) = bars(plot(result(*shares)))
    (_, whole, _) = bars(plot(result(least)))[0]
    assert half / quarter == pytest.approx(2, rel=0.01)
    assert whole / half == pytest.approx(2, rel=0.01)


def test_the_spread_is_a_line_over_the_bar() -> None:
    one = Measurement("step", "s", {"sora": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    root = ElementTree.fromstring(plot(result(one)))
    (line,) = (x for x in root.iter(f"{SVG}line") if x.get("class") == "spread")
    (bar,) = (x for x in root.iter(f"{SVG}rect") if x.get("class") == "ours")
    start, width = float(bar.get("x") or 0), float(bar.get("width") or 0)
    low, high = float(line.get("x1") or 0) - start, float(line.get("x2") or 0) - start
    assert (low / width, high / width) == pytest.approx((2 / 3.5, 5 / 3.5), rel=0.01)


def test_names_are_text_and_no_markup() -> None:
    one = Measurement("<script>", "s", {"sora": [1.0], 'a"b<c>': [2.0]})
    root = ElementTree.fromstring(plot(replace(result(one), profile='"><script>')))
    assert root.get("aria-label") == 'sora bench: "><script>'
    assert not list(root.iter(f"{SVG}script"))


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_pictures_of_the_docs_are_what_the_command_draws(picture: Path) -> None:
    source = ROOT / "benchmarks" / "results" / f"{picture.stem}.json"
    assert picture.read_text() == plot(Result.read(source))


def test_the_command_draws_beside_the_result_or_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    result(Measurement("step", "s", {"sora": [1.0]})).write(path)

    def sora(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "sora_engine", "bench", "--plot", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert sora("a.json")[0] == 0
    assert (tmp_path / "a.svg").read_text() == plot(Result.read(path))
    code, told = sora("a.json", "-o", "a.pdf")
    assert code == 2
    assert re.search(r"--output: a\.pdf must end in \.svg", told)
    code, told = sora("a.svg")
    assert code == 2
    assert "a.svg is not a result of sora bench" in told
