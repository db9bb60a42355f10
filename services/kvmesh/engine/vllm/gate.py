"""Which attempts vLLM is given, and when: a suspect of killing workers runs alone.

vLLM batches what it has. So a suspect waits here until vLLM has nothing else,
and who comes after it waits until it has made some tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kvmesh.engine.vllm.attempts import Attempt


class Gate:
    """Attempts in the order in which they came."""

    def __init__(self, entered: Callable[[], int]) -> None:
        """`entered`: number of attempts that vLLM has."""
        self._entered = entered
        self._held: deque[Attempt] = deque()
        self._suspect: Attempt | None = None

    def add(self, attempt: Attempt) -> None:
        """Takes an attempt."""
        self._held.append(attempt)

    def remove(self, attempt: Attempt) -> None:
        """An attempt has ended, wherever it was."""
        if self._suspect is attempt:
            self._suspect = None
        if attempt in self._held:
            self._held.remove(attempt)

    def next(self) -> Attempt | None:
        """The next one that may go to vLLM now, if one may."""
        if not self._held:
            return None
        suspect = self._suspect
        if suspect is not None and suspect.solitary:
            return None
        self._suspect = None
        if self._held[0].alone:
            if self._entered():
                return None
            self._suspect = self._held[0]
        return self._held.popleft()
