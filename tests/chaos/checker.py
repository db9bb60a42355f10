"""What is true of a stream: the simulated model's own output, token by token.

The model is a pure function of prefix and position. Where its tokens depend on the attempt as
well, an output is right if it is one attempt's up to some point, from there another one's that
follows from what was delivered before it, and so on: attempts go up at one router; where
another one resumed the stream it is a higher owner, an even one for what ran already and the
odd one after it for what that router places, whose attempts go up from there; and they begin
again where a client went on from what it held. A token of an attempt that was over
shows at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from many_streams import VOCABULARY

from kvmesh.engine.sim.content import FIRST_STATE, MASK, Content, K, draw, token_number
from kvmesh.engine.sim.settings import SimSettings

_SIM = SimSettings()
_GAIN = int(Content(_SIM.block_bytes // _SIM.block_tokens // 8).gain)
_MOST_ATTEMPTS = 32
_MOST_OWNERS = 8


class Model:
    """The simulated model after some tokens."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._position, self._state, self._reading = 0, FIRST_STATE, 0
        for token in prompt:
            self.take(token)

    def take(self, token: int) -> None:
        """The text goes on with a token."""
        self._state = (K * self._state + token_number(token)) & MASK
        weight = (2 * self._position + 1) * _GAIN
        self._reading = (self._reading + weight * self._state) & MASK
        self._position += 1

    def next(self, tag: int = 0) -> int:
        """The token that comes now."""
        return draw(self._state, self._reading, tag, VOCABULARY)


def first_wrong(prompt: Sequence[int], output: Sequence[int]) -> int | None:
    """First index at which an output is not the model's. None: it is right."""
    model = Model(prompt)
    for index, token in enumerate(output):
        if model.next() != token:
            return index
        model.take(token)
    return None


def first_wrong_of_attempts(
    prompt: Sequence[int], output: Sequence[int], routers_lost: int
) -> int | None:
    """The same where tokens depend on the attempt.

    `routers_lost`: how often attempts may have begun again, or another owner taken over.
    """
    model = Model(prompt)
    # What may be so far: (routers that it took, (owner, attempt)). Before the first token
    # any number of attempts may have come to nothing.
    believed = {(0, (1, 0))}
    for index, token in enumerate(output):
        go_on = {one for one in believed if one[1][1] and model.next(_tag(*one[1])) == token}
        if not go_on:
            new = _makers(model, token, range(1, 2 * routers_lost + 2))
            reached = {
                (
                    lost + _router(owner) - (_router(before[0]) if goes_up else -1),
                    (owner, attempt),
                )
                for owner, attempt in new
                if attempt
                for lost, before in believed
                for goes_up in (True, False)
                if not goes_up or before < (owner, attempt)
            }
            go_on = {one for one in reached if one[0] <= routers_lost}
        if not go_on:
            return index
        believed = go_on
        model.take(token)
    return None


def attempts_of(prompt: Sequence[int], output: Sequence[int], index: int) -> list[tuple[int, int]]:
    """Whose token the one at an index may be, (owner, attempt), were its prefix the one given."""
    model = Model([*prompt, *output[:index]])
    return _makers(model, output[index], range(_MOST_OWNERS))


def _makers(model: Model, token: int, owners: Iterable[int]) -> list[tuple[int, int]]:
    return [
        (owner, attempt)
        for owner in owners
        for attempt in range(_MOST_ATTEMPTS + 1)
        if model.next(_tag(owner, attempt)) == token
    ]


def _router(owner: int) -> int:
    """How many routers had a stream before the one with this number."""
    return owner // 2


def _tag(owner: int, attempt: int) -> int:
    """What the tokens of an attempt depend on besides their prefix."""
    return owner << 32 | attempt
