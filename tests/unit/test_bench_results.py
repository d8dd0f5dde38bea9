"""Result files, their comparison, and the README's tables made from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sora_engine.bench.compare import Verdict, compare
from sora_engine.bench.results import Measurement, Result, ResultError, Spread
from sora_engine.bench.tables import fill, table
from sora_engine.cli import main

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "a", "cores": 2, "threads": 2, "memory_gib": 8.0, "gpu": None}


def result(*measurements: Measurement, **machine: object) -> Result:
    return Result(
        "cpu",
        measurements,
        {**MACHINE, **machine},
        {"torch": "2.13.0", "diffusers": "0.42.1"},
        "abc",
        "2026-01-02T03:04:05+00:00",
    )


def steps(ours: list[float], theirs: list[float] | None = None, name: str = "step") -> Measurement:
    rivals = {} if theirs is None else {"diffusers": theirs}
    return Measurement(name, "s", {"sora": ours, **rivals}, figures={"tokens": 7.0})


def test_ratios_say_how_many_times_better():
    pairs = steps([1.0, 2.0, 4.0], [3.0, 4.0, 4.0])
    assert pairs.ratios("diffusers") == [3.0, 2.0, 1.0]
    rates = Measurement("r", "videos/s", pairs.samples, better="higher")
    assert rates.ratios("diffusers") == [1 / 3, 0.5, 1.0]
    unpaired = Measurement("u", "s", {"sora": [2.0], "diffusers": [1.0, 5.0, 9.0]}, paired=False)
    assert unpaired.ratios("diffusers") == [2.5]


def test_spread_is_of_fifths():
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0])
    assert (spread.median, spread.low, spread.high, spread.rounds) == (2.5, 1.0, 4.0, 6)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_a_file_comes_back_as_it_was(tmp_path):
    wanted = result(steps([1.0, 2.0], [3.0, 4.5]), steps([0.25], name="alone"))
    wanted.write(tmp_path / "new" / "r.json")
    assert Result.read(tmp_path / "new" / "r.json") == wanted
    saved = json.loads((tmp_path / "new" / "r.json").read_text())
    assert saved["measurements"][0]["times_better"]["diffusers"]["median"] == 2.625
    assert not list((tmp_path / "new").glob("*.partial"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda saved: saved.update(format=99), "format 99"),
        (lambda saved: saved.pop("machine"), "no 'machine'"),
        (lambda saved: saved["measurements"][0].pop("unit"), "no 'unit'"),
        (lambda saved: saved["measurements"][0]["samples"].update(sora=[]), "samples"),
        (lambda saved: saved["measurements"][0]["samples"].update(sora=[1.0]), "samples"),
    ],
)
def test_files_of_others_are_refused(tmp_path, damage, says):
    path = tmp_path / "r.json"
    result(steps([1.0, 2.0], [3.0, 4.0])).write(path)
    saved = json.loads(path.read_text())
    damage(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(ResultError, match=says):
        Result.read(path)
    path.write_text("{")
    with pytest.raises(ResultError, match="is not a result"):
        Result.read(path)


def verdicts(before: Result, after: Result) -> list[Verdict]:
    return [finding.verdict for finding in compare(before, after)]


def test_worse_by_more_than_the_noise_is_a_regression():
    steady = result(steps([1.0, 1.001, 0.999, 1.0, 1.0]))
    slower = result(steps([1.05, 1.051, 1.049, 1.05, 1.05]))
    assert verdicts(steady, slower) == [Verdict.REGRESSION]
    assert verdicts(slower, steady) == [Verdict.IMPROVEMENT]
    # The same 5% within samples that vary by 10% mean nothing, nor does 2% of steady ones.
    noisy = [1.0, 1.1, 0.9, 1.2, 0.8]
    assert verdicts(result(steps(noisy)), result(steps([x * 1.05 for x in noisy]))) == [
        Verdict.SAME
    ]
    assert verdicts(steady, result(steps([1.02] * 5))) == [Verdict.SAME]


def test_higher_may_be_better():
    before, after = (
        result(Measurement("r", "videos/s", {"sora": [rate] * 5}, better="higher"))
        for rate in (10.0, 8.0)
    )
    assert verdicts(before, after) == [Verdict.REGRESSION]
    assert verdicts(after, before) == [Verdict.IMPROVEMENT]


def test_a_slow_hour_drops_out_of_paired_ratios():
    before = result(steps([1.0] * 5, [1.2] * 5))
    slow_hour = result(steps([2.0] * 5, [2.4] * 5), cpu="another")
    assert verdicts(before, slow_hour) == [Verdict.SAME]
    only_ours = result(steps([2.0] * 5, [1.2] * 5))
    assert verdicts(before, only_ours) == [Verdict.REGRESSION]


def test_what_cannot_be_compared_is_said():
    before = result(steps([1.0] * 5), steps([1.0], name="gone"))
    after = result(steps([9.0] * 5), steps([1.0], name="new"), cpu="another")
    assert verdicts(before, after) == [Verdict.SKIPPED] * 3
    with pytest.raises(ResultError, match="no measurement in common"):
        compare(result(steps([1.0])), result(steps([1.0], name="other")))


def test_the_command_line_fails_on_a_regression(tmp_path, capsys):
    fast, slow = str(tmp_path / "fast.json"), str(tmp_path / "slow.json")
    result(steps([1.0] * 5)).write(fast)
    result(steps([1.5] * 5)).write(slow)
    assert main(["bench", "--compare", fast, slow]) == 1
    assert "REGRESSION   step: 1 -> 1.5 s, 0.667x" in capsys.readouterr().out
    assert main(["bench", "--compare", slow, fast]) == 0
    assert main(["bench", "--compare", slow, str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_a_table_has_a_row_for_each_rival(tmp_path):
    made = table(result(steps([1.0, 1.0], [3.0, 4.0]), steps([0.25], name="alone")))
    assert "| step | 1 s | diffusers: 3.5 s | 3.50 (3.20 to 3.80) |" in made
    assert "| alone | 0.25 s | | |" in made
    assert "a, 2 threads of 2 cores, 8 GiB; torch 2.13.0, diffusers 0.42.1; commit abc" in made


def test_what_has_run_where(tmp_path):
    result(steps([1.0], [2.0])).write(tmp_path / "a.json")
    result(steps([1.0]), gpu="NVIDIA X").write(tmp_path / "b.json")
    run = {"cpu": "b", "threads": 4, "torch": "2.0", "commit": "0123456789abcdef"}
    run |= {"results": [1, 2], "utc": "2026-03-04T05:06:07Z"}
    (tmp_path / "c.json").write_text(json.dumps([{**run, "torch": "1.0"}, run]))
    (tmp_path / "d.jsonl").write_text("")
    figures = [("commit", "f00"), ("device", "H"), ("torch", "2.1"), ("triton", "3.6.0")]
    lines = [{"what": what, "figure": figure} for what, figure in figures]
    lines += [{"end": "whole"}, {"end": "killed after 5 s"}, {"end": "whole"}]
    again = [{"what": "commit", "figure": "f11"}, {"end": "whole"}]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + again))
    page = "before\n<!-- ran -->\nold\n<!-- /ran -->\nafter"
    made = fill(page, tmp_path)
    assert made.splitlines() == [
        "before",
        "<!-- ran -->",
        "| results | what | machine | software | commit, day |",
        "|---|---|---|---|---|",
        "| a.json | profile cpu, 1 measurement | a, 2 threads, no GPU "
        "| torch 2.13.0, diffusers 0.42.1 | abc, 2026-01-02 |",
        "| b.json | profile cpu, 1 measurement | NVIDIA X "
        "| torch 2.13.0, diffusers 0.42.1 | abc, 2026-01-02 |",
        "| c.json | 2 measurements | b, 4 threads, no GPU | torch 2.0 | 0123456789ab, 2026-03-04 |",
        "| d.jsonl | the half hour on a GPU | no GPU yet |  |  |",
        "| e.jsonl | 2 stages whole, 1 not | H | torch 2.1, triton 3.6.0 | f00 |",
        "| e.jsonl | 1 stage whole | ? |  | f11 |",
        "<!-- /ran -->",
        "after",
    ]
    assert fill(made, tmp_path) == made
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ResultError, match=r"c\.json is not JSON"):
        fill(page, tmp_path)


def test_marks_are_filled_and_the_rest_is_left(tmp_path):
    result(steps([1.0])).write(tmp_path / "r.json")
    page = "before\n<!-- bench: r.json -->\nold\n<!-- /bench -->\nafter\n"
    made = fill(page, tmp_path)
    assert made.startswith("before\n<!-- bench: r.json -->\n| what |")
    assert made.endswith("2026-01-02.\n<!-- /bench -->\nafter\n")
    assert fill(made, tmp_path) == made
    with pytest.raises(ResultError, match="has no"):
        fill("<!-- bench: r.json -->\n", tmp_path)
    with pytest.raises(ResultError, match=r"none\.json"):
        fill(page.replace("r.json", "none.json"), tmp_path)


def test_a_pattern_picks_rows(tmp_path):
    result(steps([1.0]), steps([2.0], name="other")).write(tmp_path / "r.json")
    made = fill("<!-- bench: r.json oth|no -->\n<!-- /bench -->", tmp_path)
    assert "| other | 2 s" in made
    assert "| step" not in made
    with pytest.raises(ResultError, match="named like 'strange'"):
        fill("<!-- bench: r.json strange -->\n<!-- /bench -->", tmp_path)


def test_medians_are_a_column_for_each_measurement(tmp_path):
    result(steps([1.0, 3.0, 2.0], [5.0, 4.0, 6.0]), steps([0.25], name="other")).write(
        tmp_path / "r.json"
    )
    page = "<!-- medians: r.json -->\n<!-- /medians -->\n"
    made = fill(page, tmp_path)
    assert made.splitlines()[1:5] == [
        "| median | step, s | other, s |",
        "|---|---|---|",
        "| sora | 2 | 0.25 |",
        "| diffusers | 5 | - |",
    ]
    assert "commit abc, 2026-01-02." in made
    assert fill(made, tmp_path) == made
    assert "| sora | 0.25 |" in fill(page.replace("json", "json oth"), tmp_path)
    with pytest.raises(ResultError, match="named like 'strange'"):
        fill(page.replace("json", "json strange"), tmp_path)
    with pytest.raises(ResultError, match="has no"):
        fill("<!-- medians: r.json -->\n", tmp_path)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/benchmarks.md",
        "docs/parallel.md",
        "docs/quantised.md",
        "docs/serving.md",
    ],
)
def test_the_tables_are_what_the_results_say(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- bench: " in text
    assert fill(text, ROOT / "benchmarks" / "results") == text


def test_the_autoencoders_table_is_what_its_results_say():
    text = (ROOT / "docs" / "vae.md").read_text(encoding="utf-8")
    records = json.loads((ROOT / "benchmarks" / "results" / "vae.json").read_text())
    timed = memory = 0
    for found in (entry for record in records for entry in record["results"]):
        if "wall_ratio" in found:
            shape = found["name"].removeprefix("decode ").partition(" ")[0]
            wall, cpu = found["wall_ratio"], found["cpu_ratio"]
            timed += 1
            assert (
                f"| {shape} | {found['diffusers_s']:.2f} s | {found['ours_s']:.2f} s | "
                f"{wall['median']:.2f} ({min(wall['all']):.2f} to {max(wall['all']):.2f}) | "
                f"{cpu['median']:.2f} |"
            ) in text
        else:
            sides = (found["peak_bytes"][side].values() for side in ("diffusers", "ours"))
            theirs, ours = (", ".join(f"{n / 2**20:.1f}" for n in side) for side in sides)
            memory += 1
            assert f"| {theirs} | {ours} |" in text
    assert timed == 2
    assert memory == 8
