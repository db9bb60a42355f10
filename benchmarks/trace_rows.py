"""Requests of the traces: when they came, how long they were, and which prefixes are equal."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

SYSTEM_PROMPTS = 16
SYSTEM_TOKENS = 1_024
FOLLOW_UP = 0.5
OPEN_SESSIONS = 256


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at_ms: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    request_class: str = "standard"

    @property
    def line(self) -> Mapping[str, Any]:
        """As the simulator and the load client read it."""
        return {
            "arrival_ms": round(self.at_ms, 3),
            "prompt_tokens": self.prompt,
            "output_tokens": self.output,
            "blocks": self.blocks,
            "class": self.request_class,
        }


def json_lines(arrivals: Iterable[Arrival]) -> str:
    """A file of arrivals."""
    return "\n".join(json.dumps(one.line) for one in arrivals) + "\n"


def azure(text: str) -> list[Arrival]:
    """Rows of TIMESTAMP, ContextTokens, GeneratedTokens."""
    rows = [line.split(",") for line in text.splitlines()[1:] if line.strip()]
    first = seconds(rows[0][0])
    found = [Arrival(1e3 * (seconds(at) - first), int(n), int(m)) for at, n, m in rows]
    return sorted(found, key=lambda one: one.at_ms)


def seconds(stamp: str) -> float:
    """Seconds since the month began, of `2023-11-16 18:17:03.9799600`."""
    date, _, clock = stamp.partition(" ")
    hours, minutes, rest = clock.split(":")
    return float(date.split("-")[2]) * 86_400 + int(hours) * 3600 + int(minutes) * 60 + float(rest)


def mooncake(text: str, seed: int = 1) -> list[Arrival]:
    """Arrivals are told in ticks of some 3 s: they are spread over their tick."""
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    ticks = sorted({row["timestamp"] for row in rows})
    ends = dict(zip(ticks, [*ticks[1:], ticks[-1] + 3000], strict=True))
    rng = random.Random(seed)
    found = [
        Arrival(
            rng.uniform(row["timestamp"], ends[row["timestamp"]]),
            row["input_length"],
            row["output_length"],
            tuple(row["hash_ids"]),
        )
        for row in rows
    ]
    return sorted(found, key=lambda one: one.at_ms)


def with_prefixes(arrivals: Sequence[Arrival], block_tokens: int, seed: str) -> list[Arrival]:
    """Made-up prefixes, as the simulator makes them (docs/simulator.md, Traces): shared system
    prompts by a Zipf law, and half of the requests go on with an open session that is shorter."""
    rng = random.Random(seed)
    systems = [
        [rng.getrandbits(48) for _ in range(rng.randint(0, SYSTEM_TOKENS) // block_tokens)]
        for _ in range(SYSTEM_PROMPTS)
    ]
    weights = [1 / rank for rank in range(1, SYSTEM_PROMPTS + 1)]
    sessions: list[tuple[int, ...]] = []
    found = []
    for number, one in enumerate(arrivals):
        full = one.prompt // block_tokens
        shorter = [at for at, blocks in enumerate(sessions) if len(blocks) < full]
        goes_on = rng.random() < FOLLOW_UP and bool(shorter)
        at = rng.choice(shorter) if goes_on else number % OPEN_SESSIONS
        known = sessions[at] if goes_on else rng.choices(systems, weights)[0][:full]
        own = (rng.getrandbits(48) for _ in range(full - len(known)))
        blocks = (*known, *own)
        if at < len(sessions):
            sessions[at] = blocks
        else:
            sessions.append(blocks)
        found.append(replace(one, blocks=blocks))
    return found


def at_rate(arrivals: Sequence[Arrival], rate: float, count: int) -> list[Arrival]:
    """The first of them, in as much time as makes this rate."""
    if count >= len(arrivals):
        raise SystemExit(
            f"{count:,} arrivals are asked for, the traces have {len(arrivals):,}: fewer --requests"
        )
    scale = 1e3 * count / rate / arrivals[count].at_ms
    return [replace(one, at_ms=one.at_ms * scale) for one in arrivals[:count]]
