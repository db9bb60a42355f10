"""Plots as SVG: lines over time, and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Told apart also by those who see few colours (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c00")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 520, 240, 58, 34, 10
_LETTER, _ROW = 6.5, 20
"""Width of a letter as a rule, and height of a bar that lies, in pixels."""
_DASHES = ("", "5 3", "1 3")
"""Tell apart lines that have the same colour."""


@dataclass(frozen=True)
class Line:
    """A line of a plot."""

    name: str
    values: Sequence[float]


def lines(caption: str, span_s: float, drawn: Sequence[Line]) -> str:
    """Values over time; each stands for `span_s` seconds."""
    top = _round_up(max((value for line in drawn for value in line.values), default=0.0))
    count = max((len(line.values) for line in drawn), default=1)
    parts = _frame(top)
    for tick in range(5):
        x = _LEFT + (_WIDTH - _LEFT - 10) * tick / 4
        seconds = span_s * count * tick / 4
        parts.append(
            f"<text x='{x:.0f}' y='{_HEIGHT - 16}' text-anchor='middle'>{seconds:,.0f} s</text>"
        )
    for at, line in enumerate(drawn):
        points = " ".join(
            f"{_LEFT + (_WIDTH - _LEFT - 10) * (i + 0.5) / count:.1f},{_y(value, top):.1f}"
            for i, value in enumerate(line.values)
        )
        parts.append(f"<polyline fill='none' {_stroke(at)} points='{points}'/>")
    return _figure(caption, parts, [line.name for line in drawn])


def bars(caption: str, names: Sequence[str], values: Sequence[float]) -> str:
    """One bar a name, its value at its end; where names are too long to stand side by side, bars
    lie below each other."""
    top = _round_up(max(values, default=0.0))
    step = (_WIDTH - _LEFT - 10) / max(1, len(values))
    if max(map(len, names), default=0) * _LETTER > step:
        return _lying(caption, names, values, top)
    parts = _frame(top)
    for at, (name, value) in enumerate(zip(names, values, strict=True)):
        x, y = _LEFT + step * (at + 0.15), _y(value, top)
        middle = x + step * 0.35
        parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{step * 0.7:.1f}' "
            f"height='{_HEIGHT - _BOTTOM - y:.1f}' fill='{COLOURS[at % len(COLOURS)]}'/>"
            f"<text x='{middle:.1f}' y='{y - 3:.1f}' text-anchor='middle'>{_short(value)}</text>"
            f"<text x='{middle:.1f}' y='{_HEIGHT - 18}' text-anchor='middle'>{escape(name)}</text>"
        )
    return _figure(caption, parts, [])


def _lying(caption: str, names: Sequence[str], values: Sequence[float], top: float) -> str:
    left = min(_WIDTH / 2, max(map(len, names)) * _LETTER + 8)
    room = _WIDTH - left - 60
    parts = []
    for at, (name, value) in enumerate(zip(names, values, strict=True)):
        y, width = at * _ROW, max(0.0, min(1.0, value / top)) * room
        parts.append(
            f"<text x='{left - 6:.0f}' y='{y + 14}' text-anchor='end'>{escape(name)}</text>"
            f"<rect x='{left:.0f}' y='{y + 2}' width='{width:.1f}' height='{_ROW - 5}' "
            f"fill='{COLOURS[at % len(COLOURS)]}'/>"
            f"<text x='{left + width + 4:.1f}' y='{y + 14}'>{_short(value)}</text>"
        )
    return _figure(caption, parts, [], height=len(names) * _ROW + 4)


def _stroke(at: int) -> str:
    colour = COLOURS[at % len(COLOURS)]
    dash = _DASHES[at // len(COLOURS) % len(_DASHES)]
    return f"stroke='{colour}' stroke-width='1.5'" + (f" stroke-dasharray='{dash}'" if dash else "")


def _frame(top: float) -> list[str]:
    parts = []
    for tick in range(5):
        value = top * tick / 4
        y = _y(value, top)
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - 10}' y1='{y:.1f}' y2='{y:.1f}' stroke='#d8dee4'/>"
            f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{_short(value)}</text>"
        )
    return parts


def _figure(
    caption: str, parts: Sequence[str], legend: Sequence[str], height: int = _HEIGHT
) -> str:
    # Drawn as the line itself: by its colour alone the ninth would be the first.
    keys = "".join(
        f"<svg width='26' height='8' viewBox='0 0 26 8'><line x1='0' x2='26' y1='4' y2='4' "
        f"{_stroke(at)}/></svg> {escape(name)} &nbsp;"
        for at, name in enumerate(legend)
    )
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f"<svg width='{_WIDTH}' height='{height}' viewBox='0 0 {_WIDTH} {height}' role='img' "
        f"aria-label='{escape(caption, quote=True)}'>{''.join(parts)}</svg>"
        f"<br><small>{keys}</small></figure>"
    )


def _y(value: float, top: float) -> float:
    room = _HEIGHT - _BOTTOM - _TOP
    return _TOP + room * (1 - min(1.0, value / top))


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if not value > 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    if value >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.3g}"
