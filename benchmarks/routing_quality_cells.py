"""What `routing_quality.py` replays: traces on clusters, baselines, and what 100 % load is."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from kvmesh.simulate.profiles import load_profile
from kvmesh.simulate.replay import AT_ONCE, Cluster, Policy, TraceFile, replay

PROFILE = "h100-70b-tp4"
WEIGHTS = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
OVERLAPS, DECODES = (0.5, 1.0, 2.0, 4.0, 16.0), (0.0, 1 / 256, 1 / 64, 1 / 16, 1 / 4)
FIXED = (
    "round-robin",
    "random",
    "least-loaded",
    "power-of-two",
    "consistent-hash",
    "prefix-greedy",
)
SERVED, TUNED_SHARE, WARM_UP = 0.9, 1 / 3, 0.2
LIVE: Mapping[str, Any] = {}
"""Our queue as shipped: order by virtual deadline, held back in the router."""
OUR_ORDER = (AT_ONCE, LIVE)
"""Order by virtual deadline, in the engines' queues alone or held back in the router too."""


def formula(weight: float, queue: Mapping[str, Any] = AT_ONCE) -> Policy:
    return Policy("overlap-load", {"overlap_weight": weight}, queue)


@dataclass(frozen=True)
class Figures:
    """Means over seeds."""

    ttft: float
    above: float
    e2e: float
    slowdown: float
    good: float
    hits: float
    floor: float
    pooled: float

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Any]]) -> Figures:
        def over(pick: Any) -> float:
            return mean(float(pick(run)) for run in runs)

        return cls(
            over(lambda s: s["ttft_ms"]["mean"]),
            over(lambda s: s["above_floor_ms"]),
            over(lambda s: s["end_to_end_ms"]["mean"]),
            over(lambda s: s["slowdown"]["p99"]),
            over(lambda s: s["goodput_share"]),
            over(lambda s: s["hit_rate"]),
            over(lambda s: s["bounds"]["no_wait_ms"]),
            over(lambda s: s["bounds"]["pooled_ms"]),
        )


@dataclass(frozen=True)
class Cell:
    """A trace, a cluster and a seed count: what a table is about."""

    name: str
    trace: TraceFile
    cluster: Cluster
    seeds: Sequence[int]
    most: float
    """Highest replay speed that is looked at."""
    share: float = 1.0
    """Of the trace."""
    noise: Mapping[str, Any] = field(default_factory=dict)
    """Of the workers; empty: as in life."""
    coarse: bool = False
    """Grids of few weights, for a quick run."""
    runs: dict[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    """What was replayed before: the same again has the same summary."""

    def judge(self, policy: Policy, speeds: Sequence[float], **more: Any) -> Figures:
        """On all but the first third; of each seed at its own speed."""
        more = {"warm_up": TUNED_SHARE, **more}
        return self._figures(policy, speeds, self.share, more)

    def tune(
        self, policies: Iterable[Policy], speeds: Sequence[float]
    ) -> list[tuple[Policy, Figures]]:
        """On the first third, of every seed."""
        share = self.share * TUNED_SHARE
        return [(policy, self._figures(policy, speeds, share, {})) for policy in policies]

    def serves(self, policy: Policy, speed: float, seed: int) -> bool:
        """Whether enough of it is within SLO."""
        run = self._replay(policy, speed, seed, self.share, {"warm_up": WARM_UP})
        return Figures.of([run]).good >= SERVED

    def _figures(
        self, policy: Policy, speeds: Sequence[float], share: float, more: Mapping[str, Any]
    ) -> Figures:
        return Figures.of(
            [
                self._replay(policy, speed, seed, share, more)
                for seed, speed in zip(self.seeds, speeds, strict=False)
            ]
        )

    def _replay(
        self, policy: Policy, speed: float, seed: int, share: float, more: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        settings = {**({"noise": dict(self.noise)} if self.noise else {}), **more}
        key = repr((policy, speed, seed, share, sorted(settings.items())))
        if key not in self.runs:
            self.runs[key] = replay(
                self.trace, self.cluster, policy, speed=speed, share=share, seed=seed, **settings
            )["summary"]
        return self.runs[key]


def weights(cell: Cell) -> Sequence[float]:
    """What the usual formula's weight is tuned over."""
    return WEIGHTS[1:4:2] if cell.coarse else WEIGHTS


def formulas(cell: Cell) -> list[Policy]:
    """The usual formula with our order; in P:D pools its weight changes nothing."""
    tuned = (1.0,) if cell.cluster.prefill else weights(cell)
    return [formula(weight, queue) for weight, queue in itertools.product(tuned, OUR_ORDER)]


def free_weights(cell: Cell) -> list[Policy]:
    """The formula with both weights free, with our order."""
    step = 3 if cell.coarse else 1
    return [
        Policy("weighted", {"overlap": overlap, "decode": decode}, queue)
        for overlap, decode, queue in itertools.product(
            OVERLAPS[::step], DECODES[::step], OUR_ORDER
        )
    ]


def baselines(cell: Cell) -> list[Policy]:
    """All of which the best says what 100 % load is: with our order, held or not."""
    names = FIXED[2:3] if cell.coarse else FIXED
    fixed = [Policy(name, {}, queue) for name, queue in itertools.product(names, OUR_ORDER)]
    free = free_weights(cell) if cell.cluster.prefill else []
    return [*formulas(cell)[::-1], *free[::-1], *fixed]


def full_loads(cell: Cell, steps: int) -> list[float]:
    """100 % of each seed: the highest speed at which the best of the baselines serves, within 2 %
    of itself or the `steps`-th halving of all speeds.

    A seed's workers are up to 20 % faster or slower than the profile, each by its own: another
    cluster, which can do more or less. Who is the best baseline is found with the first seed.
    """
    unit = cell.most / 2**steps
    best, bests = 0, baselines(cell)[:1]
    for policy in baselines(cell):

        def served(at: int, policy: Policy = policy) -> bool:
            return cell.serves(policy, at * unit, cell.seeds[0])

        found = highest(best, 2**steps, served)
        if found > best:
            best, bests = found, [policy]
    loads = [best * unit]
    for seed in cell.seeds[1:]:

        def serves(at: int, seed: int = seed) -> bool:
            return cell.serves(bests[0], at * unit, seed)

        loads.append(highest(0, 2**steps, serves) * unit)
    return loads


def highest(low: int, top: int, served: Callable[[int], bool]) -> int:
    """The highest number under `top` that is served, within 2 % of itself; `low` where that is not.

    Who serves no more than `low` is asked but once, just above it. What is served at a number is
    taken to be served at all below.
    """

    def grain(at: int) -> int:
        """The next one that differs enough: a power of two, under 2 %."""
        return 1 << max(0, (at // 50).bit_length() - 1)

    high = top
    if low:
        step = grain(low)
        while low + step < top and served(low + step):
            low, step = low + step, 2 * step
        high = min(low + step, top)
    while high - low > grain(low):
        middle = (low + high) // 2
        if served(middle):
            low = middle
        else:
            high = middle
    return low


def split_cluster(trace: TraceFile, workers: int, args: argparse.Namespace, most: float) -> Cluster:
    """The P:D ratio at which the usual formula serves most."""
    best = (0.0, Cluster({}))
    profile = load_profile(PROFILE)
    shares = (0.75,) if args.quick else (0.5, 0.625, 0.6875, 0.75, 0.8125)
    for prefill in sorted({round(workers * share) for share in shares}):
        cluster = Cluster(profile, 0, prefill, workers - prefill)
        cell = Cell("", trace, cluster, args.seed_list[:1], most, args.share, args.noise)
        low, high = 0.0, most
        for _ in range(5):
            middle = (low + high) / 2
            if cell.serves(formula(1.0), middle, cell.seeds[0]):
                low = middle
            else:
                high = middle
        best = max(best, (low, cluster), key=lambda entry: entry[0])
    return best[1]
