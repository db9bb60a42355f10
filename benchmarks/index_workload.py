"""The workload that indexes of cached prefixes are measured with: seeded, the same for all.

`prefixes` shared prompts of `depth` blocks. Each lives on one worker, the first `hot` of them on
`hot_copies` workers; on each worker that has one, `tails` sessions go on from its end by up to
`tail_max` blocks of their own. Blocks come as engines report them, at most `per_event` in an event
that names the block before; events of all sequences are mixed at random, in order within one
sequence of one worker.

A block has two names, made by the finaliser of splitmix64, so that no side's own hash is favoured:
`chain`, that of the whole prefix, and `local`, that of its content alone (which Dynamo's index goes
by). Both are odd numbers below 2^63.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Names = npt.NDArray[np.uint64]

# Apart in position, sequence and seed.
SEQUENCE, SEED = 0x100000, 0x1000000000000


def mix(numbers: Names) -> Names:
    """splitmix64 (S. Vigna, 2015), the lowest bit set and the highest one clear."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(1)) | np.uint64(1)


@dataclass(frozen=True, slots=True)
class Event:
    """Blocks that a worker stored."""

    worker: int
    number: int
    parent: int | None
    chain: Names
    local: Names


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt, and who holds how many blocks of it."""

    chain: Names
    local: Names
    holders: dict[int, int]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Blocks of a prompt and, for each worker that has it, of the tails there."""

    number: int
    homes: list[int]
    tails: dict[int, list[tuple[int, int]]]


class Workload:
    """Sequences, the events that store them, and prompts with the right answers."""

    def __init__(
        self,
        prefixes: int = 2000,
        depth: int = 512,
        workers: int = 64,
        hot: float = 0.05,
        hot_copies: int = 8,
        tails: int = 2,
        tail_max: int = 16,
        per_event: int = 32,
        seed: int = 7,
    ) -> None:
        self.depth, self.workers, self.per_event, self.seed = depth, workers, per_event, seed
        random = np.random.default_rng(seed)
        copies = [hot_copies if number < prefixes * hot else 1 for number in range(prefixes)]
        homes = [sorted(random.choice(workers, n, replace=False).tolist()) for n in copies]
        self.sequences = []
        self._fresh = prefixes
        for number in range(prefixes):
            own: dict[int, list[tuple[int, int]]] = {worker: [] for worker in homes[number]}
            for worker in homes[number]:
                for _ in range(tails):
                    own[worker].append((self._fresh, int(random.integers(1, tail_max + 1))))
                    self._fresh += 1
            self.sequences.append(Sequence(number, homes[number], own))
        ends = sum(
            length for s in self.sequences for tails in s.tails.values() for _, length in tails
        )
        self.blocks = prefixes * depth + ends
        self.entries = sum(copies) * depth + ends
        self._hot = sum(n > 1 for n in copies)
        self._numbers = [0] * workers

    def local(self, sequence: int, first: int, last: int) -> Names:
        """Names of blocks by their content."""
        base = (sequence * SEQUENCE + self.seed * SEED) % 2**64
        return mix(np.arange(first, last, dtype=np.uint64) + np.uint64(base))

    def chain(self, sequence: int, first: int, last: int) -> Names:
        """Names of blocks by their whole prefix."""
        return mix(self.local(sequence, first, last) ^ np.uint64(0x5555555555555555))

    def events(self) -> list[Event]:
        """All blocks come, in the order in which they are reported."""
        runs = [run for sequence in self.sequences for run in self._runs(sequence)]
        order = np.repeat(np.arange(len(runs)), [len(parts) for _, parts in runs])
        np.random.default_rng(self.seed + 1).shuffle(order)
        self._numbers = [0] * self.workers
        following = [iter(parts) for _, parts in runs]
        events = []
        for at in order.tolist():
            worker = runs[at][0]
            events.append(Event(worker, self._numbers[worker], *next(following[at])))
            self._numbers[worker] += 1
        return events

    def _runs(
        self, sequence: Sequence
    ) -> Iterator[tuple[int, list[tuple[int | None, Names, Names]]]]:
        chain = self.chain(sequence.number, 0, self.depth)
        local = self.local(sequence.number, 0, self.depth)
        starts = range(0, self.depth, self.per_event)
        prefix = [
            (
                int(chain[at - 1]) if at else None,
                chain[at : at + self.per_event],
                local[at : at + self.per_event],
            )
            for at in starts
        ]
        for worker in sequence.homes:
            ends = [
                (int(chain[-1]), self.chain(number, 0, length), self.local(number, 0, length))
                for number, length in sequence.tails[worker]
            ]
            yield worker, prefix + ends

    def removals(self, share: float = 0.1, per_event: int = 32) -> list[tuple[int, Names]]:
        """(worker, chain values) of what goes: tails first, then prefixes from their ends."""
        random = np.random.default_rng(self.seed + 2)
        count = len(self.sequences)
        gone = []
        for number in random.choice(count, int(count * share), replace=False).tolist():
            sequence = self.sequences[number]
            for worker in sequence.homes:
                for tail, length in sequence.tails[worker]:
                    gone.append((worker, self.chain(tail, 0, length)))
                for end in range(self.depth, 0, -per_event):
                    gone.append((worker, self.chain(number, max(0, end - per_event), end)))
        return gone

    def queries(self, hit: int, count: int, length: int = 512) -> list[Query]:
        """Prompts of `length` blocks, the first `hit` of them those of a prefix."""
        random = np.random.default_rng(self.seed + 3 + hit)
        queries = []
        for number in range(count):
            prefix = self.sequences[int(random.integers(0, len(self.sequences)))]
            rest = self._fresh + 1 + number + hit * 1_000_003 % 7919
            local = [self.local(prefix.number, 0, hit), self.local(rest, hit, length)]
            chain = [self.chain(prefix.number, 0, hit), self.chain(rest, hit, length)]
            holders = dict.fromkeys(prefix.homes, hit) if hit else {}
            queries.append(Query(np.concatenate(chain), np.concatenate(local), holders))
        return queries

    def tokens(self, sequences: int, length: int) -> list[npt.NDArray[np.int32]]:
        """Token ids, for the speed of hashing."""
        return [
            np.random.default_rng((self.seed, number)).integers(0, 32_000, length, dtype=np.int32)
            for number in range(sequences)
        ]
