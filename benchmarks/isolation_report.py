"""Tables, plots and raw data of `isolation.py`."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import alternating
from isolation_load import Answer, Phase

ENOUGH_FOR_P99 = 300
STEPS_OF_COMPANY = 5
"""Steps after its second token that say what a step took then."""


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which a part lies; NaN of none."""
    return alternating.quantile(values, part) if values else float("nan")


@dataclass
class Measured:
    """All phases of one arrangement, pooled."""

    key: str
    title: str
    alone: list[Phase] = field(default_factory=list)
    storm: list[Phase] = field(default_factory=list)

    @property
    def phases(self) -> list[Phase]:
        """In order of time."""
        return sorted(self.alone + self.storm, key=lambda phase: phase.began_s)

    @property
    def flips(self) -> int | None:
        """How many a planner made; None: there was none."""
        counted = [len(phase.flips) for phase in self.phases if phase.flips is not None]
        return sum(counted) if counted else None

    @property
    def roles(self) -> str:
        """At the ends of phases, by how many ended so."""
        ends = Counter("+".join(phase.roles.values()) for phase in self.phases)
        return ", ".join(f"{roles} x{count}" for roles, count in ends.items() if roles)

    @property
    def documents(self) -> list[Answer]:
        """Those answered to the end."""
        return [one for phase in self.storm for one in phase.read]

    @property
    def documents_per_s(self) -> float:
        """Over all storms, each up to the end of its last document."""
        spent = sum(max((one.ended or 0.0 for one in p.read), default=p.took_s) for p in self.storm)
        return len(self.documents) / spent if spent else float("nan")

    def tokens_per_s(self) -> float:
        """Computed and made, in the storms."""
        took = sum(phase.took_s for phase in self.storm)
        return sum(p.tokens_per_s * p.took_s for p in self.storm) / took if took else float("nan")


def ttft(phases: Sequence[Phase]) -> list[float]:
    """Of chat, ms."""
    return [turn.ttft_ms for phase in phases for turn in phase.answered]


def itl(phases: Sequence[Phase]) -> list[float]:
    """All gaps of chat, ms; the first one of a turn, too."""
    return [gap for phase in phases for turn in phase.answered for gap in turn.gaps_ms]


def second(phases: Sequence[Phase]) -> list[float]:
    """Gaps of chat from first to second token, ms."""
    return [turn.gaps_ms[0] for phase in phases for turn in phase.answered if turn.gaps_ms]


def second_in_company(phases: Sequence[Phase]) -> list[float]:
    """The same in decode steps of that company: over the median of the turn's next gaps."""
    steps = []
    for phase in phases:
        for turn in phase.answered:
            gap, *then = turn.gaps_ms[: 1 + STEPS_OF_COMPANY] or [0.0]
            if then:
                steps.append(gap / statistics.median(then))
    return steps


def _cells(values: Sequence[float]) -> list[float | None]:
    p99 = quantile(values, 0.99) if len(values) >= ENOUGH_FOR_P99 else None
    return [quantile(values, 0.5), quantile(values, 0.95), p99]


CHAT_HEAD = (
    "", "phase", "turns", "TTFT p50", "p95", "tokens", "ITL p50", "p95", "p99",
    "2nd p50", "p95", "failed", "extra",
)  # fmt: skip


def chat_rows(measured: Measured) -> list[list[object]]:
    """Of chat, times in ms: a row alone and a row in the storm."""
    rows: list[list[object]] = []
    for name, phases in (("alone", measured.alone), ("storm", measured.storm)):
        first, gaps, then = ttft(phases), itl(phases), second(phases)
        failed = sum(turn.ended is None for phase in phases for turn in phase.turns)
        rows.append(
            [measured.key, name, len(first), *_cells(first)[:2], len(gaps), *_cells(gaps),
             *_cells(then)[:2], failed, sum(phase.extra_conversations for phase in phases)]
        )  # fmt: skip
    return rows


COMPANY_HEAD = ("", "answers", "alone gaps", "p50", "p95", "storm gaps", "p50", "p95")


def company_rows(measured: Measured) -> list[list[object]]:
    """Of chat, ms, by the number of chats and documents that were being answered at the time:
    a step of more streams takes longer, storm or not."""
    rows: list[list[object]] = []
    alone, storm = _by_company(measured.alone), _by_company(measured.storm)
    for count in sorted(alone.keys() | storm.keys()):
        row: list[object] = [measured.key, count]
        for gaps in (alone.get(count, []), storm.get(count, [])):
            row += [len(gaps), *(_cells(gaps)[:2] if gaps else (None, None))]
        rows.append(row)
    return rows


def _by_company(phases: Sequence[Phase]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for phase in phases:
        spans = [(one.tokens[0], one.tokens[-1]) for one in phase.turns + phase.documents
                 if one.tokens]  # fmt: skip
        for turn in phase.answered:
            for begin, gap in zip(turn.tokens, turn.gaps_ms, strict=False):
                count = sum(first <= begin < last for first, last in spans)
                found.setdefault(count, []).append(gap)
    return found


DOCUMENT_HEAD = (
    "", "arrangement", "documents", "TTFT p50 s", "slowest s", "a minute", "share of R",
    "tokens/s", "repeated", "others %", "flips", "roles at the ends of phases",
)  # fmt: skip


def document_row(measured: Measured, rate_alone: float) -> list[object]:
    """Of documents in the storms."""
    read = measured.documents
    return [
        measured.key, measured.title, len(read),
        quantile(document_ttft(measured), 0.5),
        max(document_s(measured), default=None),
        60 * measured.documents_per_s, measured.documents_per_s / rate_alone,
        measured.tokens_per_s(), sum(phase.repeats for phase in measured.phases),
        100 * max((phase.others_share for phase in measured.phases), default=0.0),
        measured.flips, measured.roles,
    ]  # fmt: skip


@dataclass(frozen=True)
class Ratios:
    """Of one arrangement: the storm over alone, and what the issue names."""

    itl_p95: float
    itl_p99: float
    second_steps: float
    """p95 of the gap from first to second token, in decode steps (ITL p50 alone), ..."""
    second_company_steps: float
    """... and in the steps that the same stream makes next."""
    ttft_p95: float
    ttft_p95_s: float
    share_of_rate: float
    slowest: float
    """The slowest document over one alone."""

    @classmethod
    def of(cls, measured: Measured, rate_alone: float, document_alone_s: float) -> Ratios:
        """From pooled phases."""

        def ratio(of: Any, part: float) -> float:
            storm, alone = of(measured.storm), of(measured.alone)
            if part > 0.95 and min(len(storm), len(alone)) < ENOUGH_FOR_P99:
                return float("nan")
            return quantile(storm, part) / quantile(alone, part)

        slowest = max(document_s(measured), default=float("nan"))
        return cls(
            ratio(itl, 0.95),
            ratio(itl, 0.99),
            quantile(second(measured.storm), 0.95) / quantile(itl(measured.alone), 0.5),
            quantile(second_in_company(measured.storm), 0.95),
            ratio(ttft, 0.95),
            quantile(ttft(measured.storm), 0.95) / 1e3,
            measured.documents_per_s / rate_alone,
            slowest / document_alone_s,
        )


def document_ttft(measured: Measured) -> list[float]:
    """Of documents, s."""
    return [one.ttft_ms / 1e3 for one in measured.documents]


def document_s(measured: Measured) -> list[float]:
    """How long documents took, those that were cut off too."""
    return [took for phase in measured.storm for took in phase.document_s]


def winners(all_measured: Sequence[Measured]) -> list[list[object]]:
    """Which arrangement is best by each column, in the storm; of a p99, of those that have one."""

    def itl_p99(one: Measured) -> float:
        gaps = itl(one.storm)
        return quantile(gaps, 0.99) if len(gaps) >= ENOUGH_FOR_P99 else float("nan")

    columns: list[tuple[str, Callable[[Measured], float], bool]] = [
        ("chat TTFT p95, ms", lambda one: quantile(ttft(one.storm), 0.95), False),
        ("chat ITL p50, ms", lambda one: quantile(itl(one.storm), 0.5), False),
        ("chat ITL p95, ms", lambda one: quantile(itl(one.storm), 0.95), False),
        ("chat ITL p99, ms", itl_p99, False),
        ("second token p95, ms", lambda one: quantile(second(one.storm), 0.95), False),
        ("document TTFT p50, s", lambda one: quantile(document_ttft(one), 0.5), False),
        ("slowest document, s", lambda one: max(document_s(one), default=float("nan")), False),
        ("documents a minute", lambda one: 60 * one.documents_per_s, True),
        ("tokens/s", Measured.tokens_per_s, True),
    ]
    rows: list[list[object]] = []
    for name, of, more in columns:
        known = [one for one in all_measured if of(one) == of(one)]
        if known:
            best = (max if more else min)(known, key=of)
            rows.append([name, f"({best.key})", of(best)])
    return rows


def _points(measured: Measured) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(time s, gap ms) of chat, and begin and end of the storms."""
    start = measured.phases[0].began_s
    points, storms = [], []
    for phase in measured.phases:
        offset = phase.began_s - start
        if phase.documents_in_flight:
            storms.append((offset, offset + phase.took_s))
        for turn in phase.answered:
            points += [(offset + at, gap) for at, gap in zip(turn.tokens[1:], turn.gaps_ms,
                                                             strict=True)]  # fmt: skip
    return points, storms


def write_png(path: Path, all_measured: Sequence[Measured]) -> bool:
    """Chat ITL over time, storms shaded. False: matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(
        len(all_measured), 1, squeeze=False, sharey=True, figsize=(11, 2.4 * len(all_measured))
    )
    for (plot,), measured in zip(axes, all_measured, strict=True):
        points, storms = _points(measured)
        for begin, end in storms:
            plot.axvspan(begin, end, color="#d55e00", alpha=0.15, linewidth=0)
        times, gaps = zip(*points, strict=True) if points else ((), ())
        plot.scatter(times, gaps, s=3, color="#0072b2", linewidths=0)
        plot.set_yscale("log")
        plot.set_ylabel("ms")
        plot.set_title(f"({measured.key}) {measured.title}", fontsize=9, loc="left")
        plot.grid(visible=True, which="both", alpha=0.2)
    axes[-1][0].set_xlabel("seconds; shaded: documents in flight")
    figure.suptitle("Chat: time between two tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1000, 190, 60, 24
_DECADES = (10, 100, 1_000, 10_000, 100_000)

_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:1040px}svg{width:100%}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:2px 9px;text-align:right}"
    "tr:nth-child(even){background:#f3f3f3}text{font:11px sans-serif}"
)


def _svg(measured: Measured) -> str:
    from math import log10

    points, storms = _points(measured)
    end = max([at for at, _ in points] + [until for _, until in storms] + [1.0])

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * at / end

    def y(ms: float) -> float:
        share = log10(max(_DECADES[0], ms) / _DECADES[0]) / log10(_DECADES[-1] / _DECADES[0])
        return (_HEIGHT - _BOTTOM) * (1 - min(1.0, share))

    parts = [
        f"<rect x='{x(a):.1f}' width='{x(b) - x(a):.1f}' y='0' height='{_HEIGHT - _BOTTOM}' "
        "fill='#d55e00' opacity='.15'/>"
        for a, b in storms
    ]
    for ms in _DECADES:
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - 10}' y1='{y(ms):.1f}' y2='{y(ms):.1f}' "
            f"stroke='#ccc'/><text x='{_LEFT - 5}' y='{y(ms) + 10:.1f}' "
            f"text-anchor='end'>{ms:,} ms</text>"
        )
    parts += [
        f"<text x='{x(end * n / 6):.0f}' y='{_HEIGHT - 8}'>{end * n / 6:.0f} s</text>"
        for n in range(6)
    ]
    dots = "".join(f"M{x(at):.1f} {y(gap):.1f}h1.6" for at, gap in points)
    parts.append(f"<path d='{dots}' stroke='#0072b2' stroke-width='1.6'/>")
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}'>{''.join(parts)}</svg>"


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of text and numbers."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "-" if value is None else escape(str(value))

    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def write_html(
    path: Path, note: str, all_measured: Sequence[Measured],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[object]]]],
) -> None:  # fmt: skip
    """One page with everything in it, no script, nothing loaded."""
    parts = [f"<h1>Chat beside long documents</h1><p>{escape(note)}</p>"]
    for caption, (head, rows) in tables.items():
        parts.append(f"<h2>{escape(caption)}</h2>{html_table(head, rows)}")
    parts.append("<h2>Time between two tokens of chat; shaded: documents in flight</h2>")
    for measured in all_measured:
        parts.append(f"<h3>({measured.key}) {escape(measured.title)}</h3>{_svg(measured)}")
    path.write_text(
        f"<!doctype html><meta charset='utf-8'><title>isolation</title><style>{_STYLE}</style>"
        + "".join(parts)
    )


def write_raw(path: Path, note: str, all_measured: Mapping[str, Measured], **more: object) -> None:
    """Every token's time, as JSON."""
    raw = {
        name: {"title": one.title, "phases": [phase.plain() for phase in one.phases]}
        for name, one in all_measured.items()
    }
    path.write_text(json.dumps({"note": note, **more, "arrangements": raw}) + "\n")
