"""Whether a run of pytest is for a GPU."""

from __future__ import annotations

from _pytest.mark.expression import Expression


def asks_for_gpu(markers: str) -> bool:
    """Whether an expression of markers (`-m`) picks the tests that need a GPU, and not those
    without a marker too."""
    if not markers:
        return False
    expression = Expression.compile(markers)
    return expression.evaluate(lambda name, **_: name == "gpu") and not expression.evaluate(
        lambda name, **_: False
    )
