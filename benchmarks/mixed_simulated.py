"""The runs of `mixed_trace.py` in the simulator: the same arrivals, workers and policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slo_sweep import quantile
from trace_rows import Arrival, json_lines

from kvmesh.simulate.profiles import load_profile
from kvmesh.simulate.replay import FIFO, Cluster, Policy, TraceFile, replay

TARGETS_MS = {"interactive": (1_000.0, 50.0), "standard": (5_000.0, 100.0)}
"""First token, and between tokens."""
CHUNK = 1_024
NOISE = {"speed": 0.0, "jitter": 0.02, "stall": 0.0}
"""Of sim workers: equal ones, whose steps take what they are to take."""


def workers_of(roles: Sequence[str], speed: float, pool_tokens: int) -> Cluster:
    """The sim engine's workers: an H100 with an 8B model, so many times as fast."""
    profile = load_profile("h100-8b")
    steps = {name: value / speed for name, value in profile["step"].items()}
    more = {"saturating_chunk": CHUNK, "layer_preemption": True, "pool_tokens": pool_tokens}
    count = {role: roles.count(role) for role in ("both", "prefill", "decode")}
    return Cluster({**profile, "step": steps, **more}, **count)


def simulate(
    cluster: Cluster, policy: str, first_come: bool, arrivals: Sequence[Arrival],
    block_tokens: int, warm_up: float,
) -> Mapping[str, Any]:  # fmt: skip
    """One run, in the figures of the load client. `warm_up`: share that does not count."""
    chosen = Policy(policy, queue=FIFO if first_come else {})
    trace = TraceFile(json_lines(arrivals), {"format": "simple", "block_tokens": block_tokens})
    run = replay(trace, cluster, chosen, rows=True, warm_up=warm_up, noise=NOISE)
    classes = []
    for name, (ttft_ms, itl_ms) in TARGETS_MS.items():
        rows = [row for row in run["rows"] if arrivals[row["request"]].request_class == name]
        served = [row for row in rows if row["first_ms"] is not None and row["end_ms"] is not None]
        first = [row["first_ms"] - row["arrival_ms"] for row in served]
        between = [(row["end_ms"] - row["first_ms"]) / max(1, row["output"] - 1) for row in served]
        late = sum(ms > ttft_ms for ms in first)
        good = sum(a <= ttft_ms and b <= itl_ms for a, b in zip(first, between, strict=True))
        classes.append(
            {
                "class": name,
                "requests": len(rows),
                "good": good,
                "late_first_token": late,
                "slow_tokens": len(served) - late - good,
                "failed": len(rows) - len(served),
                "first_token_ms": distribution(first),
                "itl_ms": distribution(between),
            }
        )
    # No client is in it, and none can be late.
    return {"classes": classes, "late_ms": {"max": 0.0}, "own_cpu": 0.0, "first_error": ""}


def distribution(values: Sequence[float]) -> Mapping[str, float]:
    """Count and quantiles."""
    if not values:
        return {"count": 0}
    return {"count": len(values), "p50": quantile(values, 0.5), "p90": quantile(values, 0.9)}
