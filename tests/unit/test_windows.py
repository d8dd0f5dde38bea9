"""Windows cover every frame, blend to what they were cut from, and do not depend on order."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_engine.denoise.windows import Window, blend, chain_of, plan_windows, window_weights
from sora_engine.errors import RequestError
from sora_engine.request import GenerationDefaults, SparsePlan, WindowPlan
from sora_engine.request.windows import WEIGHTS, default_overlap, default_plan


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
        assert window.length == (total + wraps if plan.holds(total) else plan.length)
        indices = window.indices()
        assert len(set(indices.tolist())) == min(window.length, total)
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
        weights = window_weights(plan, window, wraps=wraps)
        assert len(weights) == window.length
        assert (weights[: window.lead] == 0).all()
        assert weights[window.lead :].min() > 0
    parts = [window.of(canvas, 1) for window in windows]
    torch.testing.assert_close(blend(parts, windows, plan, wraps=wraps), canvas)


def causal(frames: torch.Tensor) -> torch.Tensor:
    """A model that tells each frame by the one before it, and the first as a video's beginning."""
    before = torch.cat([frames[:, :1] * 0 + 50, frames[:, :-1]], dim=1)
    return 0.5 * before + frames


@given(plans(), st.integers(1, 40), st.booleans(), st.integers(0, 9))
def test_what_is_blended_has_no_window_s_beginning_in_it(plan, total, wraps, step):
    """Windows of a causal model make what it makes of the whole video; of a circle, in a loop."""
    if plan.overlap == 0:
        plan = WindowPlan(plan.length + 1, 1, plan.weights, plan.schedule)
    canvas = torch.randn(2, total, 1, 3, generator=torch.Generator().manual_seed(total))
    windows = plan_windows(plan, total, wraps=wraps, step=step)
    made = blend([causal(w.of(canvas, 1)) for w in windows], windows, plan, wraps=wraps)
    expected = 0.5 * canvas.roll(1, dims=1) + canvas if wraps else causal(canvas)
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("weights", ["pyramid", "overlap"])
@pytest.mark.parametrize(("length", "overlap"), [(5, 2), (9, 3), (21, 5)])
def test_what_windows_disagree_on_is_spread_over_the_overlap(weights, length, overlap):
    """Of a model that tells each frame's place in its window, a join falls in equal steps, and a
    loop's seam is a join like all others."""
    plan = WindowPlan(length, overlap, weights)
    total = 4 * plan.stride
    places = torch.arange(length, dtype=torch.float32).view(1, -1, 1, 1)
    windows = plan_windows(plan, total, wraps=True, step=0)
    made = blend([places] * len(windows), windows, plan, wraps=True)[0, :, 0, 0]
    torch.testing.assert_close(made.roll(plan.stride), made)
    changes = made - made.roll(1)
    falls = sorted(changes[: plan.stride].tolist())[:overlap]
    torch.testing.assert_close(
        torch.tensor(falls), torch.full((overlap,), 1 - plan.stride / overlap)
    )


def test_blend_is_the_weighted_mean_and_order_changes_no_bit():
    plan = WindowPlan(5, 3)
    windows = plan_windows(plan, 11, wraps=False, step=0)
    parts = [torch.full((1, 5, 1, 1), float(i)) for i in range(len(windows))]
    blended = blend(parts, windows, plan, wraps=False)
    # Frames 2 to 4 lie in windows 0 (weights 3, 2, 1) and 1 (its lead, and weights 1 and 2); frame
    # 4 in window 2 too, as its lead.
    torch.testing.assert_close(blended[0, 2:5, 0, 0], torch.tensor([0, 1 / 3, 2 / 3]))
    order = list(range(len(windows)))
    random.Random(0).shuffle(order)
    shuffled = blend([parts[i] for i in order], [windows[i] for i in order], plan, wraps=False)
    assert torch.equal(shuffled, blended)


def test_a_loop_of_one_window_starts_elsewhere_at_every_step():
    starts = [plan_windows(None, 8, wraps=True, step=i)[0].start for i in range(8)]
    assert len(set(starts)) > 4
    assert plan_windows(None, 8, wraps=False, step=3) == [Window(0, 8, 8)]


def test_a_loop_of_one_window_goes_once_round_behind_its_lead():
    (window,) = plan_windows(None, 8, wraps=True, step=1)
    assert window.indices().tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 4]
    assert window_weights(None, window, wraps=True).tolist() == [0, *[1] * 8]
    (only,) = plan_windows(None, 1, wraps=True, step=1)
    assert only.indices().tolist() == [0, 0]


@pytest.mark.parametrize(("length", "overlap"), [(1, 0), (2, 1), (5, 2), (9, 2), (21, 5)])
def test_overlap_by_default(length, overlap):
    assert default_overlap(length) == overlap


def test_what_a_checkpoint_asks_for_counts_under_its_own_schedule():
    def asking(**more):
        sizes = {"height": 64, "width": 64, "num_frames": 17, "fps": 8}
        return GenerationDefaults(**sizes, num_inference_steps=4, guidance_scale=1, **more)

    chained = asking(max_window=5, window_schedule="chained", window_overlap=3, window_anchors=2)
    assert default_plan(chained, "chained") == WindowPlan(5, 3, schedule="chained", anchors=2)
    assert default_plan(chained, "static") == WindowPlan(5, 2)
    assert default_plan(asking(max_window=9), "static") == WindowPlan(9, 2)
    assert default_plan(asking(max_window=9, window_overlap=4), "static") == WindowPlan(9, 4)
    assert default_plan(asking(), "static") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "at least 1 latent frame, got 0"),
        ((4, 4), "from 0 to 3 latent frames"),
        ((4, 1, "round"), "got 'round'"),
        ((4, 1, "flat", "random"), "got 'random'"),
        ((4, 1, "flat", "chained"), "at least 2 latent frames.*got overlap 1"),
        ((4, 2, "flat", "chained", True, 4), "anchors must be from 0 to 3 latent frames.*got 4"),
        ((4, 2, "flat", "chained", True, -1), "anchors must be from 0 to 3 .*got -1"),
        ((4, 2, "flat", "static", True, 1), "got 1 with schedule 'static'; 0 anchors or"),
        ((5.5, 2), "window length must be an integer, got 5.5"),
        (("5", 2), "window length must be an integer, got '5'"),
        ((True, 0), "window length must be an integer, got True"),
        ((5, None), "window overlap must be an integer, got None"),
        ((5, 2, "flat", "static", "no"), "free_noise must be True or False, got 'no'"),
    ],
)
def test_bad_plans(arguments, message):
    with pytest.raises(RequestError, match=message):
        WindowPlan(*arguments)


def test_numbers_of_numpy_become_plain_ones():
    """A plan goes into files as JSON, which has no others."""
    plan = WindowPlan(np.int64(5), torch.tensor(2), anchors=np.int8(1), schedule="chained")
    assert json.loads(json.dumps(asdict(plan))) == asdict(
        WindowPlan(5, 2, "pyramid", "chained", True, 1)
    )
    sparse = SparsePlan(np.int32(3), np.uint8(2))
    assert json.loads(json.dumps(asdict(sparse))) == {"reach": 3, "num_keys": 2}
    for bad in (1.5, "3", None, True):
        with pytest.raises(RequestError, match="reach must be an integer, got"):
            SparsePlan(bad)


@given(
    st.integers(3, 9), st.integers(2, 8), st.integers(1, 60), st.booleans(), st.sets(st.integers(0))
)
def test_a_chain_makes_every_frame_and_leads_out_of_what_is_known(
    length, overlap, total, wraps, known_at
):
    """Every window but those that hold known frames (or the first) follows a neighbour of its."""
    plan = WindowPlan(length, min(overlap, length - 1), schedule="chained")
    known = torch.zeros(total, dtype=torch.bool)
    known[[i % total for i in known_at]] = True
    chain = chain_of(plan, total, known, wraps=wraps)
    if plan.holds(total):
        assert chain == ()
        return
    assert sorted(chain, key=lambda w: w.start) == sorted(
        plan_windows(plan, total, wraps=wraps, step=0), key=lambda w: w.start
    )
    made = torch.zeros(total, dtype=torch.bool)
    for i, window in enumerate(chain):
        indices = window.indices()
        if i and not known[indices].any():
            assert made[indices].any()
        made[indices[window.lead :]] = True
    assert made.all()


def test_a_chain_s_order():
    plan = WindowPlan(4, 2, schedule="chained")
    known = torch.zeros(10, dtype=torch.bool)

    def starts(**options):
        return [window.start for window in chain_of(plan, 10, known, wraps=False, **options)]

    assert starts() == [0, 2, 4, 6]
    known[9] = True  # extend backward
    assert starts() == [6, 4, 2, 0]
    known[1] = True  # connect: from both ends
    assert starts() == [0, 6, 2, 4]
    assert chain_of(WindowPlan(4, 2), 9, None, wraps=False) == ()
