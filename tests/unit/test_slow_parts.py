"""Parts of the slow set: each slow test in exactly one, and all of about the same length."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slow_parts import SECONDS, loads, parse_part, part_of

ROOT = Path(__file__).parents[2]
PARTS = int(re.search(r"^PARTS=(\d+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)[1])
MOST_S = 8 * 60

# All collections in one process, which imports the tests once.
COLLECT = """
import contextlib, json, sys
import pytest

class Names:
    def pytest_collection_finish(self, session):
        self.of_run = [item.nodeid for item in session.items]

found = []
for options in json.loads(sys.argv[1]):
    names = Names()
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(["--collect-only", "-q", *options], plugins=[names])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), code
    found.append(names.of_run)
print(json.dumps(found))
"""


def collected(*runs: list[str]) -> list[list[str]]:
    """The names of the tests that pytest would run, for each list of options."""
    without_workers = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps(runs)],
        cwd=ROOT,
        env=without_workers,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_slow_test_is_in_exactly_one_part_of_those_that_ci_runs() -> None:
    files = [str(p) for p in ROOT.glob("tests/*/test_*.py") if "mark.slow" in p.read_text()]
    options = [["--slow-part", f"{part}/{PARTS}"] for part in range(1, PARTS + 1)]
    whole, quick, *parts = collected(*([*files, *of] for of in (["-m", "slow"], [], *options)))
    assert len(whole) > 300
    assert not set(whole) & set(quick)
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert min(map(len, parts)) > 0
    # What was measured is still there.
    assert set(SECONDS) <= {name.split("::")[0] for name in whole}


@pytest.mark.parametrize("parts", [1, 2, PARTS, 100])
def test_a_file_that_was_not_measured_has_its_part_too(parts: int) -> None:
    found = {part_of(f"tests/unit/test_new_{i}.py", parts) for i in range(20 * parts)}
    assert found <= set(range(1, parts + 1))
    assert len(found) > parts // 2


def test_no_part_is_longer_than_ci_has_time_for() -> None:
    seconds = [sum(part.values()) for part in loads(PARTS)]
    assert sum(seconds) == pytest.approx(sum(SECONDS.values()))
    assert max(seconds) < MOST_S, seconds


@pytest.mark.parametrize("text", ["0/6", "7/6", "2", "2/", "a/b", "-1/6", "1/6/7", ""])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="it is PART/PARTS"):
        parse_part(text)


def test_parts_are_named_by_number() -> None:
    assert parse_part("2/6") == (2, 6)
