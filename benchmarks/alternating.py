"""Blocks of A and B in turn, on a machine that others use too.

A figure of this project is a ratio or a difference measured side by side in one run. A round is
one block of each case; a block during which somebody else used more than a tenth of the machine is
repeated, and counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# Share of all cores that others may use during a block.
BUSY_LIMIT = 0.10
# A block is repeated at most so often; then it is kept, and counted as busy.
MAX_REPEATS = 3


def say(text: str) -> None:
    """Progress, apart from the tables."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which a part lies. There has to be one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


@dataclass(frozen=True)
class Figure:
    """One number that a run stands for."""

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]


class MachineWatch:
    """How much of the machine processes other than ours have used since the start."""

    def __init__(self, own_pids: Iterable[int]) -> None:
        # This process is counted by its own usage below.
        self._pids = [pid for pid in own_pids if pid != os.getpid()]
        self._busy, self._own, self._time = self._read()

    def _read(self) -> tuple[float, float, float]:
        own = sum(process_cpu_seconds(pid) for pid in self._pids)
        # Ended children of this process (load clients) are ours as well.
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            usage = resource.getrusage(who)
            own += usage.ru_utime + usage.ru_stime
        return machine_busy_seconds(), own, time.monotonic()

    def share_of_others(self) -> float:
        """Share of all cores, 0 to 1, steal time included."""
        busy, own, now = self._read()
        others = (busy - self._busy) - (own - self._own)
        capacity = (now - self._time) * (os.cpu_count() or 1)
        return max(0.0, others / capacity)


def machine_busy_seconds() -> float:
    """CPU seconds that all cores were not idle, stolen ones included (proc(5), /proc/stat)."""
    names = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(name) for name in names[:8])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_SECOND


def process_cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its ended children; 0 for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return 0.0
    # The name in parentheses may hold spaces; utime is field 14 of the line.
    fields = text.rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_SECOND


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in found:
        for children in Path(f"/proc/{task}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in children.read_text().split()]
    return found


@dataclass
class Blocks(Generic[T]):
    """Results of a run in turn, by case, one entry a round."""

    results: dict[str, list[T]] = field(default_factory=dict)
    repeated: int = 0
    kept_busy: int = 0

    def median(self, case: str, of: Callable[[T], float]) -> float:
        """Median over the rounds of a case."""
        return statistics.median(of(result) for result in self.results[case])

    def median_difference(self, case: str, base: str, of: Callable[[T], float]) -> float:
        """Median over the rounds of (case - base), each pair of one round."""
        pairs = zip(self.results[case], self.results[base], strict=True)
        return statistics.median(of(result) - of(reference) for result, reference in pairs)


def alternate(
    cases: Mapping[str, Callable[[], T]], rounds: int, own_pids: Callable[[], Iterable[int]]
) -> Blocks[T]:
    """Runs `rounds` rounds of one block a case; every other round goes backwards."""
    blocks: Blocks[T] = Blocks({case: [] for case in cases})
    for number in range(rounds):
        order = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for case in order:
            for attempt in range(MAX_REPEATS + 1):
                watch = MachineWatch(own_pids())
                result = cases[case]()
                if watch.share_of_others() <= BUSY_LIMIT:
                    break
                if attempt == MAX_REPEATS:
                    blocks.kept_busy += 1
                else:
                    blocks.repeated += 1
            blocks.results[case].append(result)
    return blocks


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table with columns as wide as they need."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [list(head), ["-" * width for width in widths], *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
    sys.stdout.flush()


def print_figures(figures: Sequence[Figure]) -> None:
    """Prints figures by their names, as `--json` has them."""
    head = ["figure", "value", "unit", "better"]
    print_table("figures", head, [[f.name, f.value, f.unit, f.better] for f in figures])


def is_evidence(*, quick: bool, busy: bool) -> bool:
    """Whether a run is; one that is none says why."""
    if quick or busy:
        print("Not evidence: " + ("a quick run." if quick else "the machine was busy."))
    return not (quick or busy)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def write_json(path: Path, figures: Sequence[Figure], **more: object) -> None:
    """Writes `{"figures": [...], ...}`."""
    entries = [vars(figure) for figure in figures]
    path.write_text(json.dumps({"figures": entries, **more}, indent=2) + "\n")
