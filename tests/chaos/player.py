"""Plays a schedule of faults on a mesh, and keeps when each was in force."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from faults import Fault
from mesh import ROLES, ROUTERS, Mesh
from schedule import can_be_together

AT_ONCE = 2
"""Most faults at the same time."""
WHOLE_S = 180.0
"""A mesh that is not whole again so long after a fault never is."""
LOOK_S = 0.2
"""Between two looks at whether it is."""


@dataclass
class Played:
    """A fault that was played. Times are those of time.monotonic."""

    fault: Fault
    injected: float
    healed: float = 0.0
    whole: float = 0.0
    """When all that it touched was in order again."""
    dropped: int = 0
    """Packets that it dropped."""

    def overlap_s(self, begin: float, end: float) -> float:
        """How much of a time it was in force, or its traces were there. Negative: none."""
        return min(end, self.whole) - max(begin, self.injected)


class Player:
    """Goes through a schedule; `step` does what is due."""

    def __init__(self, mesh: Mesh, planned: Iterator[tuple[float, Fault]]) -> None:
        self.played: list[Played] = []
        """Those that are over."""
        self.active: list[Played] = []
        self._mesh = mesh
        self._planned = planned
        self._began = time.monotonic()
        self._looked = 0.0
        pause, self._next = next(planned)
        self._due = self._began + pause

    @property
    def begun(self) -> int:
        """Faults that were injected."""
        return len(self.played) + len(self.active)

    def step(self, *, inject: bool) -> None:
        """Heals what is over and, if told so, injects what is due."""
        for one in self.active:
            if not one.healed and time.monotonic() >= one.injected + one.fault.hold_s:
                one.dropped = one.fault.heal(self._mesh)
                one.healed = time.monotonic()
                self._say("over", one.fault)
        self._look()
        if inject and self._may_begin():
            fault = self._next
            self._say("fault", fault)
            self.active.append(Played(fault, time.monotonic()))
            fault.inject(self._mesh)
            pause, self._next = next(self._planned)
            self._due = time.monotonic() + pause

    def _may_begin(self) -> bool:
        return (
            time.monotonic() >= self._due
            and len(self.active) < AT_ONCE
            and all(can_be_together(self._next, one.fault) for one in self.active)
        )

    def _look(self) -> None:
        """Takes out the faults of which nothing is left."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        for one in [one for one in self.active if one.healed]:
            if self._is_whole(one):
                one.whole = time.monotonic()
                # In this order: whoever looks from another thread misses none.
                self.played.append(one)
                self.active.remove(one)
                self._say("whole", one.fault)
            elif now - one.healed > WHOLE_S:
                raise AssertionError(f"not whole again after {one.fault}: {self._states()}")

    def _is_whole(self, one: Played) -> bool:
        """Whether all that no other fault touches is live, for every such router."""
        others = frozenset[str]().union(*(a.fault.hosts for a in self.active if a is not one))
        workers = [name for name in ROLES if name not in others]
        routers = [name for name in ROUTERS if name not in others]
        # A router does not know at once that a machine died without a word: until it hears of the
        # one that came in its place its view is not whole, however live it looks.
        return all(self._mesh.is_live(router, workers, since=one.healed) for router in routers)

    def _states(self) -> list[str]:
        return [
            f"{router} has {name} as {worker.state} ({worker.state_detail})"
            for router in ROUTERS
            for name, worker in self._mesh.table(router).items()
        ]

    def _say(self, what: str, fault: Fault) -> None:
        at = time.monotonic() - self._began
        print(f"{at:8.2f} s  {what:5}  {fault}", flush=True)
