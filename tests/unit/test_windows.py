"""Windows cover every frame, blend to what they were cut from, and do not depend on order."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_engine.errors import RequestError
from sora_engine.windows import WEIGHTS, Window, WindowPlan, blend, plan_windows, window_weights


@st.composite
def plans(draw):
    length = draw(st.integers(1, 12))
    overlap = draw(st.integers(0, length - 1))
    return WindowPlan(
        length,
        overlap,
        draw(st.sampled_from(WEIGHTS)),
        draw(st.sampled_from(("static", "moving"))),
    )


@given(plans(), st.integers(1, 60), st.booleans(), st.integers(0, 40))
def test_windows_cover_every_frame_and_neighbours_overlap(plan, total, wraps, step):
    windows = plan_windows(plan, total, wraps=wraps, step=step)
    covered = torch.zeros(total, dtype=torch.int64)
    for window in windows:
        assert window.length == min(plan.length, total)
        indices = window.indices()
        assert len(set(indices.tolist())) == window.length
        covered[indices] += 1
    assert covered.min() >= 1
    if total > plan.length and not wraps:
        assert windows[0].start == 0
        assert windows[-1].start == total - plan.length
        for a, b in itertools.pairwise(windows):
            assert a.start + a.length - b.start >= plan.overlap


@given(plans(), st.integers(1, 40), st.booleans(), st.integers(0, 9))
def test_a_blend_of_what_all_windows_agree_on_is_that(plan, total, wraps, step):
    canvas = torch.randn(2, total, 1, 3, generator=torch.Generator().manual_seed(total))
    windows = plan_windows(plan, total, wraps=wraps, step=step)
    for window in windows:
        assert window_weights(plan, window, wraps=wraps).min() > 0
    parts = [window.of(canvas, 1) for window in windows]
    torch.testing.assert_close(blend(parts, windows, plan, wraps=wraps), canvas)


def test_blend_is_the_weighted_mean_and_order_changes_no_bit():
    plan = WindowPlan(4, 2)
    windows = plan_windows(plan, 10, wraps=False, step=0)
    parts = [torch.full((1, 4, 1, 1), float(i)) for i in range(len(windows))]
    blended = blend(parts, windows, plan, wraps=False)
    # Frames 2 and 3 lie in windows 0 (weights 2, 1) and 1 (weights 1, 2).
    torch.testing.assert_close(blended[0, 2:4, 0, 0], torch.tensor([1 / 3, 2 / 3]))
    order = list(range(len(windows)))
    random.Random(0).shuffle(order)
    shuffled = blend([parts[i] for i in order], [windows[i] for i in order], plan, wraps=False)
    assert torch.equal(shuffled, blended)


def test_a_loop_of_one_window_starts_elsewhere_at_every_step():
    starts = [plan_windows(None, 8, wraps=True, step=i)[0].start for i in range(8)]
    assert len(set(starts)) > 4
    assert plan_windows(None, 8, wraps=False, step=3) == [Window(0, 8, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "at least 1 latent frame, got 0"),
        ((4, 4), "from 0 to 3 latent frames"),
        ((4, 1, "round"), "got 'round'"),
        ((4, 1, "flat", "random"), "got 'random'"),
    ],
)
def test_bad_plans(arguments, message):
    with pytest.raises(RequestError, match=message):
        WindowPlan(*arguments)
