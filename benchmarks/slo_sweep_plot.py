"""The plot of `slo_sweep.py`: share of the requests within their targets over the rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kvmesh.simulate.plots import COLOURS

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 320, 54, 40, 12
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:50em}svg{width:100%}"
    "text{font:11px sans-serif;fill:#57606a}"
)


@dataclass(frozen=True)
class Curve:
    """An arrangement over the rate."""

    name: str
    points: Sequence[tuple[float, float]]
    """(requests/s, share within their targets)."""
    knee: float
    """Highest rate at which enough were, requests/s; 0: none."""


def svg(curves: Sequence[Curve], served: float) -> str:
    """All curves of a workload; the knees are marked where they cross `served`."""
    most = max([rate for curve in curves for rate, _ in curve.points] + [1e-9])

    def x(rate: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * rate / most

    def y(share: float) -> float:
        return _TOP + (_HEIGHT - _BOTTOM - _TOP) * (1 - share)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0, served):
        dash = " stroke-dasharray='4 3'" if share == served else ""
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - 12}' y1='{y(share):.1f}' y2='{y(share):.1f}' "
            f"stroke='{'#57606a' if dash else '#d8dee4'}'{dash}/>"
            f"<text x='{_LEFT - 6}' y='{y(share) + 4:.1f}' text-anchor='end'>{share:.0%}</text>"
        )
    for tick in range(6):
        rate = most * tick / 5
        parts.append(
            f"<text x='{x(rate):.1f}' y='{_HEIGHT - 22}' text-anchor='middle'>{rate:.3g}</text>"
        )
    middle = (_LEFT + _WIDTH) / 2
    parts.append(f"<text x='{middle}' y='{_HEIGHT - 6}' text-anchor='middle'>requests/s</text>")
    for at, curve in enumerate(curves):
        colour = COLOURS[at % len(COLOURS)]
        line = " ".join(f"{x(rate):.1f},{y(share):.1f}" for rate, share in curve.points)
        parts.append(f"<polyline fill='none' stroke='{colour}' stroke-width='2' points='{line}'/>")
        if curve.knee:
            parts.append(
                f"<circle cx='{x(curve.knee):.1f}' cy='{y(served):.1f}' r='5' fill='{colour}'>"
                f"<title>{escape(curve.name)}: {curve.knee:.3g} requests/s</title></circle>"
            )
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{''.join(parts)}</svg>"


def legend(curves: Sequence[Curve]) -> str:
    """Names by their colours, with their knees."""
    return " &nbsp; ".join(
        f"<span style='color:{COLOURS[at % len(COLOURS)]}'>&#9632;</span> "
        f"{escape(curve.name)}, knee {curve.knee:.3g}/s"
        for at, curve in enumerate(curves)
    )


def write_html(
    path: Path, note: str, plots: Sequence[tuple[str, Sequence[Curve]]], served: float
) -> None:
    """One page with everything in it, no script, nothing loaded."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>Requests within their targets</title><style>{_STYLE}</style>",
        f"<h1>Requests within their targets, over the rate</h1><p>{escape(note)}</p>",
        f"<p>Dots are the knees: the highest rate at which {served:.0%} are.</p>",
    ]
    for title, curves in plots:
        parts += [f"<h2>{escape(title)}</h2>", svg(curves, served), f"<p>{legend(curves)}</p>"]
    path.write_text("\n".join(parts) + "</html>\n", encoding="utf-8")
