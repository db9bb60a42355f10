"""How a client goes on with a stream whose router is gone.

First any router is asked to take the running generation over (Resume): nothing is computed
again. Where that cannot be had, since its worker is gone as well or nobody kept it, all
that is needed is with the client: the request, the ids that it got and the seed that
`Accepted` told. Any router goes on from there (GenerateRequest.continue_from), on any
worker, with the tokens that would have come. Both clients use this; it knows no channel
and no loop.
"""

from __future__ import annotations

import random
import time

import grpc

from kvmesh.client.errors import MeshError
from kvmesh.client.events import Accepted, Event, Tokens
from kvmesh.v1 import inference_pb2 as wire

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_RESUME_SHARE = 0.5
"""Of the time that a stream may stand still: so long one that is resumable is asked for."""
_UNSAID_S = 3.0
"""So long at most where routers do answer and cannot say who has it: each gives up a worker that is
silent after this time. Without the bound the next one that falls silent is waited for, too. For as
long as the stream stood still before its router was lost, one was waited for already."""
_UNSAID_LEAST_S = 1.0
"""So long in any case: a router whose session just broke asks again."""
_UNSAID_PAUSE_S = 0.5
"""Longest pause then. A router that answers is there, and may know more at any moment."""

_ANOTHER_TIME = frozenset(
    {
        # No router answers, or it ends: another may.
        grpc.StatusCode.UNAVAILABLE,
        # A limit, with the time to wait for.
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        # These end the stream, whoever runs it.
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)
"""What ends a call of Resume without saying that the generation cannot be had."""


class Recovery:
    """One stream over as many calls as it takes."""

    def __init__(
        self, request: wire.GenerateRequest, timeout: float | None, recover_s: float
    ) -> None:
        """`timeout`: seconds for all calls together; None: no limit. `recover_s`:
        how long a stream may stand still before its error is the caller's."""
        now = time.monotonic()
        self._request = request
        self._deadline = None if timeout is None else now + timeout
        self._recover_s = recover_s
        self._accepted = False
        self._generation = ""
        self._resumes = False
        self._failures = 0
        self._moved = now
        self._heard: float | None = None
        self._asks = now
        self._resume_until = now
        self._loss: MeshError | None = None

    @property
    def request(self) -> wire.GenerateRequest:
        """What the next call asks for, where it resumes nothing."""
        return self._request

    @property
    def resume(self) -> wire.ResumeRequest | None:
        """What the next call resumes; None: it is a call of Generate."""
        if not self._resumes:
            return None
        held = self._request.continue_from.token_ids
        return wire.ResumeRequest(
            generation_id=self._generation, next_index=len(held), token_ids=held
        )

    @property
    def timeout(self) -> float | None:
        """What is left for the next call, seconds."""
        if self._deadline is None:
            return None
        return max(0.001, self._deadline - time.monotonic())

    def take(self, event: Event) -> bool:
        """Notes an event. False: it is one that the caller has already."""
        if isinstance(event, Accepted):
            known, self._accepted = self._accepted, True
            # From continue_from on it is another one, which can be resumed in its turn.
            self._generation = event.generation_id
            if not known:
                self._go_on_from(event.seed)
            return not known
        if isinstance(event, Tokens):
            self._request.continue_from.token_ids.extend(event.ids)
            self._failures = 0
            self._loss = None
            self._heard = time.monotonic()
        return True

    def _go_on_from(self, seed: int) -> None:
        request = wire.GenerateRequest()
        request.CopyFrom(self._request)
        request.continue_from.seed = seed
        self._request = request

    def pause(self, error: MeshError) -> float:
        """Seconds until the stream is tried anew. Raises `error` where it is not,
        since it never began or that is no loss; and what began it all, which knows
        the next index, where nothing came for too long."""
        now = time.monotonic()
        if self._resumes and error.code not in _ANOTHER_TIME:
            return self._goes_on_by_itself()
        unsaid = self._resumes and error.reason == "NOT_YET"
        if unsaid:
            # What never had a token may be a long prompt that is computed: it stood not still.
            stood_s = 0.0 if self._heard is None else self._moved - self._heard
            asked_for_s = max(_UNSAID_LEAST_S, _UNSAID_S - stood_s)
            # From when it was asked: it may have waited for an answer meanwhile.
            self._resume_until = min(self._resume_until, self._asks + asked_for_s)
        if error.code is grpc.StatusCode.UNAVAILABLE and now >= self._resume_until:
            # Nobody could say in all that time; there has to be some for the other way.
            if unsaid:
                return self._goes_on_by_itself()
            self._resumes = False
        # Where many streams of a lost router go on at once, one may have to wait for
        # room or for its tenant's limits, as any other request.
        told_s = error.retry_after_s if self._loss is not None else None
        lost = error.code is grpc.StatusCode.UNAVAILABLE
        if not self._accepted or not (lost or told_s is not None):
            raise error
        if self._loss is None:
            self._moved, self._loss = now, error
            self._resumes = self._request.hints.resumable
            waits = self._recover_s
            if self._deadline is not None:
                waits = min(waits, self._deadline - now)
            self._resume_until = now + waits * _RESUME_SHARE
        later = now + (told_s or 0.0)
        late = self._deadline is not None and later >= self._deadline
        if late or later - self._moved >= self._recover_s:
            raise self._loss
        longest = _UNSAID_PAUSE_S if unsaid else _LONGEST_PAUSE_S
        bound = min(longest, _FIRST_PAUSE_S * 2**self._failures)
        self._failures = min(self._failures + 1, 16)
        # Clients that lost the same router come back apart.
        pause = (told_s or 0.0) + random.uniform(bound / 4, bound)
        self._asks = now + pause
        return pause

    def _goes_on_by_itself(self) -> float:
        """Nobody resumes it: what the client holds is gone on from, at once. What was in vain
        says nothing of that call."""
        self._resumes = False
        self._failures = 0
        return 0.0
