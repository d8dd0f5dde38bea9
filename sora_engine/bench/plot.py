"""A result as a picture: SVG bars with their spread, readable in a light page and a dark one.

Each measurement has a bar for each rival, the median, with the quantiles 20% and 80% as a line over
it. Bars of one measurement share a scale that begins at 0. So do all measurements of one unit that
have a single bar each, such as shares of a limit. The picture is a pure function of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from sora_engine.bench.results import SUBJECT, Measurement, Result, Spread

WIDTH = 760
_LEFT, _RIGHT = 180, 190
_BAR, _GAP, _HEAD, _MARGIN = 14, 5, 26, 16
_LABEL_CHARACTERS = 29

_STYLE = """
:root { color-scheme: light dark }
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.small { font-size: 11px; fill: #57606a }
.name { font-weight: 600 }
.page { fill: #ffffff }
.ours { fill: #0a69da }
.other { fill: #8c959f }
.spread { stroke: #1f2328; stroke-width: 1.5 }
.zero { stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
 text { fill: #e6edf3 } .small { fill: #9198a1 } .page { fill: #0d1117 }
 .ours { fill: #4493f8 } .other { fill: #6e7681 }
 .spread { stroke: #e6edf3 } .zero { stroke: #3d444d }
}
"""


def plot(result: Result) -> str:
    """The SVG text of a result's measurements, in their order."""
    scales = _shared_scales(result)
    lines: list[str] = []
    y = _MARGIN + 16
    title = f"sora bench: {result.profile}"
    lines.append(_text(_MARGIN, y, title, "title"))
    lines.append(_text(_MARGIN, y + 18, _where(result), "small"))
    y += 36
    for measurement in result.measurements:
        y += _HEAD - 8
        hint = f"{measurement.unit}, {measurement.better} is better"
        lines.append(_text(_MARGIN, y, measurement.name, "name"))
        lines.append(_text(WIDTH - _MARGIN, y, hint, "small", anchor="end"))
        y += 8
        top = y
        for line in _bars(measurement, scales.get(measurement.name), y):
            lines.append(line)
        y += len(measurement.samples) * (_BAR + _GAP)
        lines.append(
            f'<line class="zero" x1="{_LEFT}" y1="{top - 2}" x2="{_LEFT}" y2="{y - _GAP + 2}"/>'
        )
    height = y + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" aria-label="{_attribute(title)}">',
            f"<style>{_STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _bars(measurement: Measurement, scale: float | None, y: int) -> Iterator[str]:
    spreads = {name: measurement.spread(name) for name in measurement.samples}
    full = scale or max(max(spread.high, spread.median) for spread in spreads.values())
    room = WIDTH - _LEFT - _RIGHT
    names = sorted(spreads, key=lambda name: name != SUBJECT)
    for name in names:
        spread = spreads[name]
        kind = "ours" if name == SUBJECT else "other"
        middle = y + _BAR / 2
        median, low, high = (
            _LEFT + room * max(value, 0.0) / full if full > 0 else _LEFT
            for value in (spread.median, spread.low, spread.high)
        )
        label = name if len(name) <= _LABEL_CHARACTERS else name[: _LABEL_CHARACTERS - 1] + "…"
        yield _text(_LEFT - 6, middle + 4, label, "small", anchor="end")
        yield (
            f'<rect class="{kind}" x="{_LEFT}" y="{y}" width="{max(median - _LEFT, 1):.1f}" '
            f'height="{_BAR}" rx="2"><title>{escape(_told(name, spread, measurement.unit))}'
            "</title></rect>"
        )
        if spread.rounds > 1:
            yield (
                f'<line class="spread" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>'
            )
        value = _number(spread.median)
        if name != SUBJECT and SUBJECT in spreads:
            times = Spread.of(measurement.ratios(name)).median
            value += f"  (sora {_number(times)}x as good)"
        yield _text(max(median, high) + 6, middle + 4, value, "small")
        y += _BAR + _GAP


def _shared_scales(result: Result) -> dict[str, float]:
    """The scale of each measurement of one bar: that of the largest of its unit."""
    alone = [m for m in result.measurements if len(m.samples) == 1]
    most: dict[str, float] = {}
    for m in alone:
        (name,) = m.samples
        spread = m.spread(name)
        # A share of ranks or of a limit has its whole as its scale.
        least = 1.0 if m.unit.startswith("of ") else 0.0
        most[m.unit] = max(most.get(m.unit, least), spread.high, spread.median)
    return {m.name: most[m.unit] for m in alone}


def _where(result: Result) -> str:
    machine = result.machine
    place = machine.get("gpu") or f"{machine.get('cpu')}, threads: {machine.get('threads')}"
    torch = result.versions.get("torch", "?")
    return f"{place}; torch {torch}; commit {result.commit}; {result.created[:10]}"


def _told(name: str, spread: Spread, unit: str) -> str:
    return (
        f"{name}: {_number(spread.median)} {unit}, 20% to 80%: {_number(spread.low)} to "
        f"{_number(spread.high)}, {spread.rounds} rounds"
    )


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})
