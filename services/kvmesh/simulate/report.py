"""A report that a browser shows without a network: tables and plots as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvmesh.simulate import table
from kvmesh.simulate.plots import Line, bars, lines
from kvmesh.simulate.replay import Run

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4 }
th:first-child, td:first-child { text-align: left }
figure { margin: 1rem 0; display: inline-block } figcaption { font-weight: 600 }
svg { font: 11px system-ui, sans-serif; fill: #57606a }
.wide { overflow-x: auto } small { color: #57606a }
"""

_WORDS = (
    ("TTFT", "time to the first token, from arrival to the client"),
    ("ITL", "time between two tokens of a stream"),
    ("slowdown", "TTFT over the time on an empty worker for a prompt of that length, no cache"),
    ("goodput", "requests whose first token came within 5 times that and whose mean ITL met the "
                "target of their class; /s GPU: of these a second and GPU"),
    ("pressure", "what is predicted over its target, of the class that is worst off"),
    ("hits", "prompt tokens that were cached where the prompt began"),
)  # fmt: skip


def html(title: str, profile: str, speed: float, runs: Sequence[tuple[str, Run]]) -> str:
    """The report as one document."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>kvmesh simulate: {escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}, replayed {speed:g} times as fast on {escape(profile)}</h1>",
        "".join(f"<p>{escape(line)}</p>" for line in table.notes(runs[0][1])),
        _table(table.rows(runs)),
    ]
    if len(runs) > 1:
        parts += ["<h2>Side by side</h2>", *_compared(runs)]
    parts += ["<h2>Pools</h2>", _table(table.pool_rows(runs))]
    if len(flips := table.flip_rows(runs)) > 1:
        parts += ["<h2>Roles that changed</h2>", _table(flips)]
    parts += ["<h2>Over time</h2>", *_over_time(runs)]
    words = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in _WORDS)
    parts.append(f"<h2>Words</h2><small><dl>{words}</dl></small></html>\n")
    return "\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _compared(runs: Sequence[tuple[str, Run]]) -> list[str]:
    names = [name for name, _ in runs]
    of = [run["summary"] for _, run in runs]
    return [
        bars("mean TTFT, ms", names, [s["ttft_ms"]["mean"] for s in of]),
        bars("TTFT p99, ms", names, [s["ttft_ms"]["p99"] for s in of]),
        bars("slowdown p99", names, [s["slowdown"]["p99"] for s in of]),
        bars("ITL p99, ms", names, [s["itl_ms"]["p99"] for s in of]),
        bars("end to end, mean, s", names, [s["end_to_end_ms"]["mean"] / 1e3 for s in of]),
        bars("goodput, %", names, [100 * s["goodput_share"] for s in of]),
        bars("goodput a second and GPU", names, [s["goodput_per_gpu_s"] for s in of]),
    ]


def _over_time(runs: Sequence[tuple[str, Run]]) -> list[str]:
    figures = []
    span_s = runs[0][1]["timeline"]["span_ms"] / 1e3
    for text, key in (("mean TTFT of arrivals, ms", "ttft_ms"), ("waiting in routers", "queued")):
        drawn = [Line(name, run["timeline"][key]) for name, run in runs]
        figures.append(lines(text, span_s, drawn))
    for text, key, factor in (
        ("workers busy, %", "busy", 100.0),
        ("streams a step", "batch", 1.0),
        ("KV pool in use, %", "kv", 100.0),
    ):
        drawn = [
            Line(f"{name} {pool['role']}", [factor * value for value in pool[key]])
            for name, run in runs
            for pool in run["timeline"]["busy"]
        ]
        figures.append(lines(text, span_s, drawn))
    return figures
