"""Line charts as inline SVG: drawn with the colours and fonts of the page around them, so that they follow light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ghostgrad.report.numbers import shown, value

_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 14, 44


def ticks(top: float) -> list[float]:
    """Round numbers from 0 to ``top``, four to six of them.

    >>> ticks(1.83), ticks(0.0)
    ([0.0, 0.5, 1.0, 1.5], [0.0, 1.0])
    """
    if top <= 0.0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top))
    step = next(part * power for part in (0.2, 0.5, 1.0, 2.0) if top / (part * power) <= 5.5)
    return [number * step for number in range(int(top / step + 1e-9) + 1)]


def line_chart(curve: Mapping[str, Any], *, title: str, diagonal: bool = False) -> str:
    """The curve as an SVG element; points that are not finite are left out.

    Args:
        curve: ``x``, ``y`` and their labels, as in the document.
        title: read aloud by screen readers.
        diagonal: draw the line of guessing as well.
    """
    points = [(value(x), value(y)) for x, y in zip(curve["x"], curve["y"], strict=False)]
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    x_top = max((x for x, _ in points), default=0.0) or 1.0
    y_top = 1.0 if diagonal else max((y for _, y in points), default=0.0) or 1.0
    x_marks, y_marks = ticks(x_top), ticks(y_top)
    y_top = max(y_top, y_marks[-1])

    def place(x: float, y: float) -> str:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(x / x_top, 1.0)
        down = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1.0 - min(y / y_top, 1.0))
        return f"{across:.1f},{down:.1f}"

    parts = [_mark(place(0, y), place(x_top, y), shown(float(f"{y:.6g}")), below=False) for y in y_marks]
    parts += [_mark(place(x, 0), place(x, y_top), shown(float(f"{x:.6g}")), below=True) for x in x_marks]
    parts += [_line("guess", [place(0, 1), place(1, 0)])] if diagonal else []
    parts += (
        [_line("curve", [place(x, y) for x, y in points])] if points else ['<text x="230" y="140">not finite</text>']
    )
    parts.append(
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}">{html.escape(curve["x_label"])}</text>'
    )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="label" transform="rotate(-90 13 {middle})" x="13" y="{middle}">{html.escape(curve["y_label"])}</text>'
    )
    name = html.escape(title)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>{"".join(parts)}</svg>'


def _line(kind: str, points: Sequence[str]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(points)}"/>'


def _mark(start: str, end: str, text: str, *, below: bool) -> str:
    x, y = start.split(",")
    at = (
        f'class="tick middle" x="{x}" y="{float(y) + 18:.1f}"'
        if below
        else f'class="tick" x="{float(x) - 8:.1f}" y="{float(y) + 4:.1f}"'
    )
    grid = "" if below else _line("grid", [start, end])
    return f"{grid}<text {at}>{text}</text>"
