"""Runs as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.simulate.replay import Run

_HEAD = (
    "", "TTFT MS p50", "p90", "p99", "mean", "ITL MS p50", "p90", "p99", "E2E S",
    "SLOWDOWN p99", "GOODPUT", "/s", "/s GPU", "HITS", "QUEUE mean", "max",
)  # fmt: skip


def rows(runs: Sequence[tuple[str, Run]]) -> list[tuple[str, ...]]:
    """One row a run, the first row is the head."""
    table: list[tuple[str, ...]] = [_HEAD]
    for name, run in runs:
        s = run["summary"]
        ttft, itl = s["ttft_ms"], s["itl_ms"]
        table.append(
            (
                name,
                *(f"{ttft[key]:,.0f}" for key in ("p50", "p90", "p99", "mean")),
                *(f"{itl[key]:.1f}" for key in ("p50", "p90", "p99")),
                f"{s['end_to_end_ms']['mean'] / 1e3:.2f}",
                f"{s['slowdown']['p99']:.1f}",
                f"{s['goodput_share']:.1%}",
                f"{s['goodput_per_s']:.2f}",
                f"{s['goodput_per_gpu_s']:.3f}" if s["goodput_per_gpu_s"] else "-",
                f"{s['hit_rate']:.1%}",
                f"{s['queued_mean']:.1f}",
                f"{s['queued_most']}",
            )
        )
    return table


def pool_rows(runs: Sequence[tuple[str, Run]]) -> list[tuple[str, ...]]:
    """How pools were used, one row each."""
    table: list[tuple[str, ...]] = [("", "POOL", "WORKERS", "BUSY", "STREAMS A STEP", "KV IN USE")]
    for name, run in runs:
        for pool in run["summary"]["pools"]:
            table.append(
                (
                    name,
                    pool["role"],
                    str(pool["workers"]),
                    f"{pool['busy']:.0%}",
                    f"{pool['batch']:.1f}",
                    f"{pool['kv']:.0%}",
                )
            )
    return table


def flip_rows(runs: Sequence[tuple[str, Run]]) -> list[tuple[str, ...]]:
    """Workers that changed their role, one row each."""
    table: list[tuple[str, ...]] = [
        ("", "AT S", "WORKER", "FROM", "TO", "PREFILL PRESSURE", "DECODE PRESSURE")
    ]
    for name, run in runs:
        for flip in run.get("flips", ()):
            table.append(
                (
                    name,
                    f"{flip['at_ms'] / 1e3:,.0f}",
                    str(flip["worker"]),
                    flip["from"],
                    flip["to"],
                    f"{flip['prefill_pressure']:.2f}",
                    f"{flip['decode_pressure']:.2f}",
                )
            )
    return table


def notes(run: Run) -> list[str]:
    """What is said once, under the tables."""
    s = run["summary"]
    bounds, prediction = s["bounds"], s["prediction"]
    lines = [
        f"{s['counted']:,} of {s['requests']:,} requests count, "
        f"{s['arrivals_per_s']:.2f} a second; the others warm caches.",
        f"With workers of mean speed no placement gets below a mean TTFT of "
        f"{bounds['no_wait_ms']:,.0f} ms (no waiting, every hit); pooled bound "
        f"{bounds['pooled_ms']:,.0f} ms (one queue, every worker computes prompts).",
        f"First tokens came within {prediction['median']:.0%} (median) and {prediction['p95']:.0%} "
        f"(95 %) of what was predicted at placement.",
    ]
    odd = {key: s[key] for key in ("rejected", "unfinished", "returned", "refused") if s[key]}
    if odd:
        lines.append(", ".join(f"{key}: {count:,}" for key, count in odd.items()))
    return lines
