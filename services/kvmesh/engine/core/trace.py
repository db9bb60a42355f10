"""What one stage did and waited for, span by span, for who asked (Place.trace)."""

from __future__ import annotations

from collections import deque
from itertools import islice

from kvmesh.v1 import inference_pb2 as inference

MAX_SPANS = 512
"""Most spans of a stage: its end has to fit a frame of 64 KiB. Then neighbours join."""

_SHORTEST_PAUSE_S = 50e-6
"""The time between two steps in turn is no pause."""


class StepLog:
    """The last steps with decoding streams: what a stream's longest gap was."""

    __slots__ = ("_steps",)

    KEPT = 2_048
    """Steps; a longer stream is told of these."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=self.KEPT)

    def add(self, begun: float, ended: float, prompt_tokens: int = 0) -> None:
        """A step with decoding streams has ended; with so many tokens of prompts in it."""
        self._steps.append((begun, ended, prompt_tokens))

    def beside(self, moment: float) -> tuple[int, str]:
        """(prompt tokens, cause): what a stream waits for whose KV came at that moment."""
        for begun, ended, tokens in reversed(self._steps):
            if ended <= moment:
                break
            if begun <= moment:
                what = "prompts in the step" if tokens else "the step"
                return tokens, f"{what} that ran when its KV came"
        return 0, "steps without it"

    def longest_gap(
        self, since: float, until: float, came: float | None = None
    ) -> tuple[float, float, int, str] | None:
        """(begin, end, prompt tokens beside it, cause) of the longest time until the end of a
        step, from the end of the one before; of a stream that decodes `since` then, from there
        or from when its KV `came`. None: no step is known."""
        # A stream's steps are the newest ones.
        known = 0
        for _, ended, _ in reversed(self._steps):
            if ended <= since:
                break
            known += 1
        longest = None
        # Its first step may be forgotten.
        last = (since if came is None else came) if known < self.KEPT else None
        waits = came is not None and last is not None
        for begun, ended, tokens in islice(self._steps, len(self._steps) - known, None):
            if ended > until:
                break
            if last is not None and (longest is None or ended - last > longest[1] - longest[0]):
                waited = begun - last > ended - begun
                beside, cause = tokens, "a step of its batch"
                if waits and waited:
                    beside, cause = self.beside(last)
                elif tokens:
                    cause = "prompts in the same step"
                elif waited:
                    cause = "steps without it"
                longest = (last, ended, beside, cause)
            last, waits = ended, False
        return longest


class Trace:
    """Spans of a stage. Times are seconds on the engine's clock; the spans'
    beginnings count from the request's arrival at its first router.

    A chunk that was held between layers has its pauses within it.
    """

    __slots__ = (
        "_arrived", "_begun", "_last", "_spans", "cause", "decoding_since", "idle_since", "kv_came",
    )  # fmt: skip

    def __init__(self, begun: float, waited_s: float = 0.0) -> None:
        """When the placement came, and how long the request had waited by then."""
        self._begun = begun
        self._arrived = begun - waited_s
        self._spans: list[inference.TraceSpan] = []
        self._last: dict[str, inference.TraceSpan] = {}
        self.idle_since = begun
        """End of what it did last."""
        self.cause = ""
        """Why it waits now, where that is known."""
        self.decoding_since: float | None = None
        self.kv_came: float | None = None
        """When the KV came from another worker that its first step of decoding reads."""

    def add(self, name: str, begin: float, end: float, tokens: int = 0, cause: str = "") -> None:
        """Something that it did or waited for; names as in `TraceSpan`."""
        start_ms = max(0.0, (begin - self._arrived) * 1000)
        duration_ms = max(0.0, (end - begin) * 1000)
        last = self._last.get(name)
        if len(self._spans) >= MAX_SPANS and last is not None:
            last.duration_ms = start_ms + duration_ms - last.start_ms
            last.tokens += tokens
        else:
            span = inference.TraceSpan(
                name=name, start_ms=start_ms, duration_ms=duration_ms, tokens=tokens, cause=cause
            )
            self._spans.append(span)
            self._last[name] = span
        self.idle_since = max(self.idle_since, end)

    def recount(self, name: str, tokens: int) -> None:
        """The last span of a name was of so many tokens, as is known only now."""
        if (span := self._last.get(name)) is not None:
            span.tokens = tokens

    def chunk_begins(self, now: float) -> None:
        """A step takes its next tokens: what was before was waiting."""
        if "worker_queue" not in self._last:
            # A transfer may have come first; what follows it is a pause.
            first = min((span.start_ms for span in self._spans), default=float("inf"))
            self.add("worker_queue", self._begun, min(now, self._arrived + first / 1000))
        if now - self.idle_since > _SHORTEST_PAUSE_S:
            self.add("pause", self.idle_since, now, cause=self.cause or "steps without it")
        self.cause = ""

    def ended(self, now: float, made: int, steps: StepLog) -> None:
        """The stage is over, after so many tokens."""
        if self.decoding_since is not None:
            self.add("decode", self.decoding_since, now, made)
            gap = steps.longest_gap(self.decoding_since, now, self.kv_came)
            if gap is not None:
                self.add("gap", *gap)

    def spans(self) -> list[inference.TraceSpan]:
        """In the order in which they began."""
        return sorted(self._spans, key=lambda span: span.start_ms)
