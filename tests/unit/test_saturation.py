"""The saturation point, from made-up times of a pass."""

from __future__ import annotations

import pytest

from sora_engine.runtime.saturation import find_saturation


def passes(fixed_s: float, token_s: float, slow: int | None = None):
    """Seconds of a pass over so many tokens; the measurement numbered `slow` takes three times."""
    asked = []

    def seconds(tokens: int) -> float:
        asked.append(tokens)
        return (fixed_s + token_s * tokens) * (3 if len(asked) - 1 == slow else 1)

    return seconds


@pytest.mark.parametrize(
    ("fixed_s", "token_s", "point"),
    [
        (6e-3, 80e-6, 512),  # doubling gains a tenth up to 4.5 * 6000 / 80 = 337 tokens
        (1e-3, 100e-6, 64),  # 45 tokens: the smallest batch is beyond it
        (3.0, 1e-6, 64),  # so long that nothing is to be shared
        (1e-2, 1e-9, 4096),  # never: as many as are allowed
    ],
)
def test_the_point_is_where_doubling_gains_less_than_a_tenth(fixed_s, token_s, point):
    assert find_saturation(passes(fixed_s, token_s), 4096) == point


@pytest.mark.parametrize("slow", range(5))
def test_a_slow_moment_does_not_end_it(slow):
    assert find_saturation(passes(6e-3, 80e-6, slow), 4096) >= 512


def test_no_more_than_is_allowed():
    assert find_saturation(passes(6e-3, 80e-6), 200) == 128
    assert find_saturation(passes(6e-3, 80e-6), 20) == 20
