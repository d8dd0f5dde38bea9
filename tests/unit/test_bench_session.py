"""`sora bench --only session`: what its figures are of, and that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sora_engine.bench import session
from sora_engine.bench.results import SUBJECT
from sora_engine.cli import main
from sora_engine.models.registry import BUNDLED
from sora_engine.request import Action, ActionSpace
from tests.unit.world_folder import save_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"), session={"fps": 40})


def test_a_rate_is_of_what_was_shown_until_the_next_tick(monkeypatch) -> None:
    monkeypatch.setattr(session, "STRETCH_S", 1.0)
    at_s = [10 + 0.25 * i for i in range(9)]  # four frames each quarter second
    assert session.rates(at_s, [4] * 9) == [16.0, 16.0]
    late = [*at_s[:5], *(t + 1.0 for t in at_s[5:])]  # a second passed without any
    assert session.rates(late, [4] * 9) == [16.0, 4 / 1.25]
    assert session.rates([1.0, 1.5], [4, 4]) == [8.0]  # shorter than a stretch


def test_an_input_is_counted_from_the_key_stroke(monkeypatch) -> None:
    monkeypatch.setattr(session, "GAPS_S", (60.0, 60.0))  # the strokes are the test's own
    hands = session.Hands(ActionSpace(("a",)), 60.0, seed=0)
    assert hands() == Action()
    assert hands.struck_at is None
    hands._keys.tap("a")
    struck = hands._keys.changed_at
    assert hands() == Action("a")
    assert hands.struck_at == struck
    assert hands() == Action()
    assert hands.struck_at is None
    hands.close()


def test_it_measures_a_world(world: Path, monkeypatch) -> None:
    monkeypatch.setattr(session, "GAPS_S", (0.1, 0.2))
    found = session.session(model=world, seconds=1.5, players=(1, 3), steps=6, long_steps=20)
    held, latent, seen, one, three, memory = found
    assert [m.unit for m in found] == ["frames/s", "s", "s", "frames/s", "frames/s", "MiB"]
    assert 0 < held.spread(SUBJECT).median < 45
    assert (held.figures["asked"], latent.figures["frames"]) == (40.0, 4)
    assert latent.spread(SUBJECT).median > 0
    # An input waits for the latent frame that is under way, and is then made.
    assert seen.figures["inputs"] == len(seen.samples[SUBJECT]) > 2
    assert min(seen.samples[SUBJECT]) >= min(latent.samples[SUBJECT])
    assert (len(one.samples[SUBJECT]), len(three.samples[SUBJECT])) == (1, 3)
    assert three.figures["most in a pack"] in (2, 3)
    assert one.figures["most in a pack"] == 1
    assert 0 < max(memory.samples[SUBJECT]) < memory.figures["planned"]
    assert len(memory.samples[SUBJECT]) == 10


@pytest.mark.skipif(
    not BUNDLED[session.WORLD].is_dir(), reason="the bundled world is not in this checkout"
)
def test_the_group_runs_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tiny", "--only", "session"]) == 0
    assert "session: held over 10 steps" in capsys.readouterr().out
