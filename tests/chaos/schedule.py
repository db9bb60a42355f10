"""Which faults come when: all of it follows from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from faults import KINDS, Fault
from mesh import ROUTERS

PAUSE_S = (0.2, 1.5)
"""Least and longest time between the beginnings of two faults, seconds."""


def schedule(
    seed: int, kinds: Sequence[type[Fault]] = KINDS, first: int = 0
) -> Iterator[tuple[float, Fault]]:
    """Faults without end, from number `first` on: the pause before each, seconds, and it.

    Every kind comes once before any comes again.
    """
    return itertools.islice(_rounds(random.Random(seed), kinds), first, None)


def _rounds(rng: random.Random, kinds: Sequence[type[Fault]]) -> Iterator[tuple[float, Fault]]:
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            yield rng.uniform(*PAUSE_S), kind.draw(rng)


def can_be_together(one: Fault, other: Fault) -> bool:
    """Whether two faults may overlap. One router is left, whatever happens."""
    routers_of_both = one.hosts & {*ROUTERS} and other.hosts & {*ROUTERS}
    return not (one.hosts & other.hosts or routers_of_both or (one.silent and other.silent))
