"""A server's steps, as its streams show them.

A server does not say when a step ends. Its engine gives each stream that decodes one
message a step, so a step has ended where a stream speaks for the second time. From one
such moment to the next is a step's time; it teaches something only where it is known what
the step held: streams that decode and nothing else, or prompts that came while nothing
ran. With other clients' work in between it is as long as that makes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Told:
    """One message of a stream."""

    name: str
    first: bool
    computed_tokens: int | None = 0
    """Of the prompt, with the first message. None: the server has not said how many."""


@dataclass(slots=True)
class Step:
    """As border.StepDetails."""

    num_ctx_tokens: int
    num_generation_requests: int
    elapsed_ms: float
    ended_at: float
    """Seconds, monotonic."""


@dataclass(slots=True)
class _Open:
    began: float
    fresh: bool
    """Nothing ran when it began."""
    told_at: float = 0.0
    """When its first message came, and the last one: those of one step come together."""
    last_at: float = 0.0
    names: set[str] = field(default_factory=set)
    prompt_tokens: int = 0
    prompts: int = 0
    mixed: bool = False
    """A prompt was waiting meanwhile, or it is not known how much was computed of one, or it may
    be more than one step."""


class Steps:
    """Used by one event loop."""

    def __init__(self) -> None:
        self._open: _Open | None = None

    def added(self, now: float, *, idle: bool) -> None:
        """A request went to the server, to which nothing was running (`idle`) or something."""
        if idle or self._open is None:
            self._open = _Open(now, fresh=True)
        elif self._open.names or not self._open.fresh:
            self._open.mixed = True

    def told(self, messages: Iterable[Told], now: float, waiting: int, running: int) -> _Closed:
        """Messages that came together; after them so many requests wait for their first token,
        and so many run in all."""
        closed = _Closed()
        for message in messages:
            step = self._open
            if step is None:
                step = self._open = _Open(now, fresh=False)
            if message.name in step.names:
                step.mixed = step.mixed or waiting > 0
                closed = self._close(step)
                # What is not known to be one step may have been several: the last one of them.
                began = step.last_at if closed.step is None else step.told_at
                step = self._open = _Open(began, fresh=False, mixed=waiting > 0)
            if not step.names:
                step.told_at = now
            step.last_at = now
            step.names.add(message.name)
            if message.first:
                step.prompts += 1
                step.prompt_tokens += message.computed_tokens or 0
                step.mixed = step.mixed or message.computed_tokens is None
        if not running and self._open is not None:
            closed = self._close(self._open)
            self._open = None
        return closed

    def left(self, name: str) -> None:
        """A stream has ended, and others run on: it will not show where the step ends that it
        spoke in."""
        if self._open is not None and name in self._open.names:
            self._open.mixed = True

    @staticmethod
    def _close(step: _Open) -> _Closed:
        decoding = len(step.names) - step.prompts
        known = not step.mixed and (not decoding if step.fresh else not step.prompts)
        elapsed_ms = (step.told_at - step.began) * 1000
        if not known or not step.names or elapsed_ms <= 0:
            return _Closed(over=True)
        return _Closed(True, Step(step.prompt_tokens, decoding, elapsed_ms, step.told_at))


@dataclass(frozen=True, slots=True)
class _Closed:
    """Whether a step has ended, and what is known of it."""

    over: bool = False
    step: Step | None = None
