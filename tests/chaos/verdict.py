"""What a run comes to: bad streams, false accusations, and how long streams stood still."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from checker import attempts_of, first_wrong, first_wrong_of_attempts
from faults import Fault
from mesh import PATIENT, STEP_MS
from player import Played
from traffic import Stream

STALLED_S = 5.0
"""A stream that waits for longer than this is stalled."""
AFTER_S = 0.5
"""A router may still tell of a loss so long after its view was whole again."""
KEPT = 200
"""Bad streams of which more than the count is kept."""
Gap = tuple[float, float]
"""From when to when a stream stood still, by time.monotonic."""
FROZEN = frozenset({"Frozen", "Stuck", "Unreachable", "Mute", "Deaf", "HalfOpen", "Vanished"})
"""Faults that only silence tells of, and that stop a worker altogether."""


@dataclass
class Verdict:
    """Counts over all streams of a run."""

    attempt_tokens: bool
    streams: int = 0
    tokens: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Streams by what is wrong with them: lost, repeated, missing, wrong, stalled."""
    bad_streams: int = 0
    moved: int = 0
    """Streams of more than one attempt at their last router."""
    recomputed_tokens: int = 0
    details: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    """Long gaps of all streams."""
    first_token_s: float = 0.0

    def take(self, stream: Stream, routers_lost: int) -> None:
        """Judges a stream. `routers_lost`: how many routers died, or stood still, while it ran."""
        self.streams += 1
        self.tokens += len(stream.output)
        self.moved += stream.attempts > 1
        self.recomputed_tokens += stream.recomputed_tokens
        self.gaps += stream.gaps
        self.first_token_s = max(self.first_token_s, stream.first_token_s)
        wrong = (
            first_wrong_of_attempts(stream.prompt, stream.output, routers_lost)
            if self.attempt_tokens
            else first_wrong(stream.prompt, stream.output)
        )
        problems = +stream.problems
        if wrong is not None:
            problems["wrong"] += 1
        if stream.longest_wait_s > STALLED_S:
            problems["stalled"] += 1
        if problems:
            self.bad_streams += 1
            self.bad.update(problems.keys())
            if len(self.details) < KEPT:
                self.details.append(_describe(stream, problems, wrong))


class Explained:
    """Gaps, each with the faults that were there for half of it."""

    def __init__(self, gaps: Iterable[Gap], played: Iterable[Played]) -> None:
        by_time = sorted(played, key=lambda one: one.injected)
        injected = [one.injected for one in by_time]
        longest_s = max((one.whole - one.injected for one in by_time), default=0.0)

        def near(gap: Gap) -> list[Fault]:
            begin, end = gap
            some = by_time[bisect_left(injected, begin - longest_s) : bisect_right(injected, end)]
            return [one.fault for one in some if one.overlap_s(begin, end) >= (end - begin) / 2]

        # An hour of a busy machine has a hundred thousand: each is looked at once.
        longest_first = sorted(gaps, key=_length_s, reverse=True)
        self._gaps = [(gap, near(gap)) for gap in longest_first]

    def longest(self, explains: Callable[[Fault], bool]) -> Gap | None:
        """The longest that such faults explain, and no others. None: there is no such gap."""
        return next((gap for gap, near in self._gaps if near and all(map(explains, near))), None)

    def longest_unexplained(self) -> Gap | None:
        """The longest that no fault explains. None: there is no such gap."""
        return next((gap for gap, near in self._gaps if not near), None)

    def longest_of_all(self) -> Gap | None:
        """The longest. None: there is none."""
        return next((gap for gap, _ in self._gaps), None)


def _length_s(gap: Gap) -> float:
    begin, end = gap
    return end - begin


def _seconds(gap: Gap | None) -> float | None:
    return None if gap is None else _length_s(gap)


def _describe(stream: Stream, problems: Counter[str], wrong: int | None) -> str:
    where = ""
    if wrong is not None:
        around = range(max(0, wrong - 2), min(len(stream.output), wrong + 3))
        found = {at: attempts_of(stream.prompt, stream.output, at) for at in around}
        where = f", wrong from index {wrong} (owners and attempts that fit: {found})"
    return (
        f"{', '.join(problems)}: {len(stream.output)} of {stream.asked} tokens{where}, longest "
        f"wait {stream.longest_wait_s:.2f} s, first token {stream.first_token_s:.2f} s, began "
        f"{stream.began:.2f}, {stream.attempts} attempts. {stream.why}"
    )


def losses(
    logs: Mapping[str, Iterable[Mapping[str, object]]],
) -> Iterable[tuple[str, float, str, str]]:
    """Workers that a router gave up: (router, time.time of it, worker, why).

    One that falls silent is told of by its session's state, whether it had streams or not; one
    whose session broke, by the streams that it cost.
    """
    for router, lines in logs.items():
        for line in lines:
            if line.get("event") == "worker_lost":
                why = line.get("why")
            elif line.get("message") == "worker lost" and line.get("loss") != "Silent":
                why = line.get("loss")
            else:
                continue
            at = datetime.fromisoformat(str(line["timestamp"])).timestamp()
            yield router, at, str(line["worker"]), str(why)


def falsely_lost(
    logs: Mapping[str, Iterable[Mapping[str, object]]], played: Sequence[Played]
) -> list[str]:
    """Losses that a router told of and that no fault in force explains."""
    # Logs have wall-clock times.
    offset = time.time() - time.monotonic()
    false = []
    for router, told, worker, why in losses(logs):
        at = told - offset
        if not any(
            worker in one.fault.may_lose and one.overlap_s(at - AFTER_S, at) >= 0 for one in played
        ):
            false.append(f"{router} at {at:.2f}: {worker} lost ({why})")
    return false


def figures(verdict: Verdict, played: Sequence[Played], false: Sequence[str]) -> dict[str, object]:
    """The figures that a run stands for, and what is needed to understand them.

    None where no gap was seen of which a figure would tell.
    """

    explained = Explained(verdict.gaps, played)

    def longest(explains: Callable[[Fault], bool]) -> float | None:
        return _seconds(explained.longest(explains))

    def began(explains: Callable[[Fault], bool]) -> float | None:
        gap = explained.longest(explains)
        return None if gap is None else gap[0]

    def drain_gap_steps(*, handed_over: bool) -> float | None:
        gap_s = longest(
            lambda fault: fault.kind == "Drained" and (fault.host in PATIENT) == handed_over
        )
        return None if gap_s is None else gap_s * 1000 / STEP_MS

    return {
        "bad_streams": verdict.bad_streams,
        "faults": len(played),
        "streams": verdict.streams,
        "longest_gap_s": _seconds(explained.longest_of_all()),
        "longest_unexplained_gap_s": _seconds(explained.longest_unexplained()),
        "longest_gap_kill_s": longest(lambda fault: fault.kind == "Killed"),
        "longest_gap_freeze_s": longest(lambda fault: fault.kind in FROZEN),
        "drain_gap_steps": drain_gap_steps(handed_over=True),
        "give_back_gap_steps": drain_gap_steps(handed_over=False),
        "lost": verdict.bad["lost"],
        "repeated": verdict.bad["repeated"],
        "missing": verdict.bad["missing"],
        "wrong": verdict.bad["wrong"],
        "stalled": verdict.bad["stalled"],
        "falsely_quarantined": verdict.bad["quarantined"],
        "falsely_lost": len(false),
        "tokens": verdict.tokens,
        "moved_streams": verdict.moved,
        "recomputed_tokens": verdict.recomputed_tokens,
        "longest_first_token_s": verdict.first_token_s,
        "packets_dropped": sum(one.dropped for one in played),
        "by_kind": {
            kind: {
                "faults": sum(one.fault.kind == kind for one in played),
                "dropped": sum(one.dropped for one in played if one.fault.kind == kind),
                "longest_gap_s": longest(lambda fault, kind=kind: fault.kind == kind),
                # Of time.monotonic: what the logs tell of it is found by that.
                "longest_gap_began": began(lambda fault, kind=kind: fault.kind == kind),
                "longest_until_whole_s": max(
                    one.whole - one.healed for one in played if one.fault.kind == kind
                ),
            }
            for kind in sorted({one.fault.kind for one in played})
        },
        "details": [*verdict.details, *false],
    }
