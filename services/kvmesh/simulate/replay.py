"""What is replayed, and the call that does it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvmesh.simulate.profiles import Profile

Format = Literal["mooncake", "azure", "simple", "synthetic"]

Run = Mapping[str, Any]
"""Results: `summary`, `timeline` and, where asked for, `rows` (docs/simulator.md)."""

PERFECT: Mapping[str, Any] = {
    "speed": 0.0,
    "jitter": 0.0,
    "stall": 0.0,
    "stall_factor": 1.0,
    "reports_a_step_late": False,
    "report_ms": 0.0,
    "network_ms": 0.0,
}
"""No noise: equal workers, steps as long as predicted, reports at once."""

FIFO: Mapping[str, Any] = {"order": "arrival", "dispatch_ahead_ms": None}
"""First come, first served, and sent on at once: what most routers do."""

AT_ONCE: Mapping[str, Any] = {"order": "deadline", "dispatch_ahead_ms": None}
"""Our order, in the engines' queues alone."""


@dataclass(frozen=True)
class TraceFile:
    """Where the requests come from."""

    text: str
    """Text of the file; of a synthetic one nothing."""
    source: Mapping[str, Any]
    """Its format, as `router_rs/simulator` has it (`Source`)."""

    @classmethod
    def read(
        cls,
        path: Path,
        form: Format | None = None,
        *,
        raw: bool = False,
        prefixes: bool = True,
        block_tokens: int = 64,
        seed: int = 1,
    ) -> TraceFile:
        """Reads a file. The format follows from its name where none is given.

        `raw`: Mooncake's arrivals stay in their ticks. `prefixes`: Azure's
        requests get made-up ones.
        """
        text = path.read_text(encoding="utf-8")
        form = form or guess_format(path, text)
        if form == "mooncake":
            return cls(text, {"format": "mooncake", "raw": raw, "seed": seed})
        if form == "azure":
            made_up = {"seed": seed} if prefixes else None
            source = {"format": "azure", "block_tokens": block_tokens, "prefixes": made_up}
            return cls(text, source)
        return cls(text, {"format": "simple", "block_tokens": block_tokens})

    @classmethod
    def synthetic(cls, **settings: Any) -> TraceFile:
        """Made-up traffic (`SyntheticSettings`)."""
        return cls("", {"format": "synthetic", **settings})


def guess_format(path: Path, text: str) -> Format:
    """The format of a trace file, by its beginning."""
    if path.suffix == ".csv":
        return "azure"
    return "mooncake" if '"hash_ids"' in text[:4096] else "simple"


def numbers(text: str) -> dict[str, float]:
    """`name=value,...` as numbers by name. Raises ValueError."""
    found: dict[str, float] = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"numbers are {text!r}; allowed is name=value,...")
        found[key.strip().replace("-", "_")] = float(value)
    return found


@dataclass(frozen=True)
class Policy:
    """A policy with its numbers, and how requests wait under it."""

    name: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    queue: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the queue; empty: ours as shipped."""

    @classmethod
    def parse(cls, text: str) -> Policy:
        """`name` or `name:number=value,...`. Raises ValueError."""
        name, _, rest = text.partition(":")
        return cls(name, numbers(rest))


@dataclass(frozen=True)
class Cluster:
    """Workers and routers."""

    profile: Profile
    both: int = 0
    prefill: int = 0
    decode: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of a run (`Settings`), by name."""

    @property
    def name(self) -> str:
        """As people write it: 16, 4P12D, or 4P12D+2."""
        split = f"{self.prefill}P{self.decode}D" if self.prefill or self.decode else ""
        return "+".join(filter(None, (split, str(self.both) if self.both else "")))


def replay(
    trace: TraceFile,
    cluster: Cluster,
    policy: Policy,
    *,
    speed: float = 1.0,
    share: float = 1.0,
    **more: Any,
) -> Run:
    """Replays a trace. Raises ValueError where something cannot be used.

    `share`: of the trace, from its start. `more`: further settings of the run.
    """
    from kvmesh._router import simulate

    settings = {
        "profile": dict(cluster.profile),
        "both": cluster.both,
        "prefill": cluster.prefill,
        "decode": cluster.decode,
        "speed": speed,
        "policy": {"name": policy.name, **policy.numbers},
        **({"queue": dict(policy.queue)} if policy.queue else {}),
        **cluster.more,
        **more,
    }
    request = {"source": dict(trace.source), "share": share, "settings": settings}
    run: Run = json.loads(simulate(json.dumps(request), trace.text))
    return run


def sweep(text: str) -> Sequence[tuple[int, int]]:
    """`1P7D..7P1D` as all (prefill, decode) of the same sum. Raises ValueError."""
    ends = [_ratio(part) for part in text.split("..")]
    if len(ends) == 1:
        return ends
    if len(ends) != 2 or sum(ends[0]) != sum(ends[1]):
        raise ValueError(
            f"sweep is {text!r}; allowed is as 1P7D..7P1D, with as many workers on each side"
        )
    (first, decode), (last, _) = ends
    total, step = first + decode, 1 if last >= first else -1
    return [(prefill, total - prefill) for prefill in range(first, last + step, step)]


def _ratio(text: str) -> tuple[int, int]:
    prefill, p, rest = text.strip().upper().partition("P")
    decode, d, end = rest.partition("D")
    if not (p and d and not end and prefill.isdigit() and decode.isdigit()):
        raise ValueError(f"ratio is {text!r}; allowed is as 2P6D")
    if not int(prefill) or not int(decode):
        raise ValueError(f"ratio is {text!r}; each side has at least one worker")
    return int(prefill), int(decode)
