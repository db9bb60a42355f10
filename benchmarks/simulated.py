"""The arrivals of a live run, replayed by the simulator with the step times that routers learnt."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmesh import _router
from kvmesh.v1 import admin_pb2, worker_pb2

BLOCK_TOKENS = 16
# (arrival s, prompt ids, output tokens)
Request = tuple[float, Sequence[int], int]


@dataclass(frozen=True)
class Simulated:
    """First tokens of a replay, ms."""

    ttft_p50_ms: float
    ttft_p95_ms: float


def replay(
    arrivals: Sequence[Request],
    roles: Sequence[str],
    step_models: Mapping[str, worker_pb2.StepModel],
    record: worker_pb2.WorkerRecord,
    paths: Sequence[admin_pb2.PathRate],
    warm: Sequence[Request],
) -> Simulated:
    """Replays `arrivals` after `warm`, which is not counted.

    Every worker takes the mean of the step models that the router had learnt before the arrivals,
    every path the median of what it had learnt of paths; nothing else of the live run is known: no
    noise, and the router's own time is not in it.
    """
    gap_s = warm[-1][0] + 60.0
    trace = [*warm, *((at + gap_s, ids, output) for at, ids, output in arrivals)]
    names: dict[tuple[int, ...], int] = {}
    lines = [
        json.dumps(
            {
                "arrival_ms": 1e3 * at,
                "prompt_tokens": len(ids),
                "output_tokens": output,
                "class": "interactive",
                "blocks": block_names(ids, names),
            }
        )
        for at, ids, output in trace
    ]
    models = list(step_models.values())
    coefficients = {
        name: statistics.mean(getattr(model, name) for model in models)
        for name in ("a_ms", "b_ms", "c_ms", "d_ms", "e_ms")
    }
    capabilities = record.capabilities
    pool = capabilities.pool_blocks * capabilities.block_tokens
    count = Counter(roles)
    settings = {
        "profile": {
            "name": "live",
            "hardware": "this machine",
            "model": record.model.name,
            "gpus": 0,
            "step": coefficients,
            "saturating_chunk": models[0].saturating_chunk,
            "layer_preemption": True,
            "kv_bytes_per_token": capabilities.block_bytes // capabilities.block_tokens,
            "pool_tokens": pool,
            "max_batch": capabilities.max_batch,
            "context_length": record.model.context_length,
            "transfer": transfer_of(paths),
            "sources": {"step": "learnt by the router in the live run"},
        },
        **{role: count[role] for role in ("prefill", "decode", "both")},
        "warm_up": len(warm) / len(trace),
        "policy": {"name": "cost"},
        "prefix_pull": True,
        "noise": {"speed": 0.0, "jitter": 0.0, "stall": 0.0},
        "rows": True,
    }
    source = {"format": "simple", "block_tokens": BLOCK_TOKENS}
    text = _router.simulate(json.dumps({"source": source, "settings": settings}), "\n".join(lines))
    rows = json.loads(text)["rows"]
    assert len(rows) == len(arrivals)
    ttft = sorted(row["first_ms"] - row["arrival_ms"] for row in rows)
    return Simulated(statistics.median(ttft), ttft[int(0.95 * len(ttft))])


def transfer_of(paths: Sequence[admin_pb2.PathRate]) -> dict[str, float]:
    """What moving KV takes; where nothing was learnt, the router's prior within a host."""
    if not paths:
        return {"bytes_per_ms": 2.5e6, "fixed_ms": 1.0}
    return {
        name: statistics.median(getattr(path, name) for path in paths)
        for name in ("bytes_per_ms", "fixed_ms")
    }


def block_names(ids: Sequence[int], names: dict[tuple[int, ...], int]) -> list[int]:
    """A number for each block of a prompt; equal ones stand for equal prefixes up to there."""
    found, parent = [], 0
    for begin in range(0, len(ids), BLOCK_TOKENS):
        key = (parent, *ids[begin : begin + BLOCK_TOKENS])
        parent = names.setdefault(key, len(names) + 1)
        found.append(parent)
    return found
