"""The bundled world: it is small, and does as it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

import sora_engine as sora
from examples.meadow import reader, score, world
from sora_engine.models.registry import BUNDLED

FOLDER = BUNDLED["meadow"]


@pytest.fixture(scope="module")
def engine():
    with sora.Engine.from_pretrained("meadow") as engine:
        yield engine


def test_it_is_small() -> None:
    files = [path for path in Path(FOLDER).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    assert (FOLDER / "MODEL_CARD.md") in files


def test_it_does_as_it_is_told(engine) -> None:
    """Two sessions of 30 steps, read back from pixels. Moves are right in more than 99 of 100."""
    options = {"num_inference_steps": 2}
    moves = back = None
    for number in (3, 4):
        tally, shown = score.play(engine, number, 30, given=True, by="places", options=options)
        assert shown.shape == (31, 64, 64, 3)
        moves = tally.moves if moves is None else moves.__iadd__(tally.moves)
        back = tally.back["all"] if back is None else back.__iadd__(tally.back["all"])
    assert moves.right >= 0.95 * moves.of > 40
    assert back.right >= 0.7 * back.of > 10


def test_the_world_that_a_prompt_names(engine) -> None:
    """The ground of the first frame has the colour of the caption, in each of the three."""
    for ground, colours in world.GROUNDS.items():
        look = world.Look(ground)
        request = sora.SessionRequest(look.caption(), seed=1)
        with engine.open_session(request) as session:
            (frame,) = session.frames
        assert reader.look_of(frame).ground == ground, (ground, colours)


def test_without_recall_it_forgets(engine) -> None:
    """A control: what comes back into view is right less often."""

    def back(recall: int) -> float:
        right = of = 0
        for number in (5, 6):
            options = {"num_inference_steps": 2, "recall": recall}
            tally, _ = score.play(engine, number, 40, given=True, by="places", options=options)
            right, of = right + tally.back["all"].right, of + tally.back["all"].of
        assert of > 20
        return right / of

    assert back(3) > 1.5 * back(0)
