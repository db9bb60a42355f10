"""What becomes of streams while processes die, stand still, part and lose their connections.

Three parts, all in networks of their own (tests/chaos): a seeded schedule of faults under load,
half of the time with tokens that depend on the attempt; many streams lost at once; long prompts
without a fault, for which nobody is to be given up.

    python benchmarks/chaos.py [--quick] [--json FILE] [--seed N] [--minutes M]

To reach: 0 bad streams of at least 10,000 over 300 faults; after kill -9 a gap under 1 s beside
recomputation; after a freeze or silence under 3 s (the limit) + 1 s beside it; at a drain with time
to hand over at most 2 steps; nobody falsely lost. Gaps that one kind of fault explains say nothing
of the others: the longest of all stands beside them, and the longest that no fault explains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from alternating import Figure, print_figures, print_table, write_json

ROOM = Path(__file__).resolve().parent.parent / "tests" / "chaos"
LOST_AT_ONCE = (4, 16, 64)
SUMMED = (
    "bad_streams", "faults", "streams", "lost", "repeated", "missing", "wrong", "stalled",
    "falsely_quarantined", "falsely_lost", "moved_streams", "recomputed_tokens", "asked_again",
)  # fmt: skip
LONGEST = (
    "longest_gap_s", "longest_unexplained_gap_s", "longest_gap_kill_s", "longest_gap_freeze_s",
    "drain_gap_steps", "give_back_gap_steps",
)  # fmt: skip
"""None where a run saw no such gap."""
FIGURES: tuple[tuple[str, str, Literal["lower", "higher"]], ...] = (
    ("bad_streams", "streams", "lower"),
    ("faults", "faults", "higher"),
    ("streams", "streams", "higher"),
    ("longest_gap_s", "s", "lower"),
    ("longest_unexplained_gap_s", "s", "lower"),
    ("longest_gap_kill_s", "s", "lower"),
    ("longest_gap_freeze_s", "s", "lower"),
    ("drain_gap_steps", "steps", "lower"),
    ("give_back_gap_steps", "steps", "lower"),
    ("falsely_lost", "workers", "lower"),
    ("bad_prompts", "prompts", "lower"),
)
ENOUGH_STREAMS, ENOUGH_FAULTS = 10_000, 300


def run(program: str, *arguments: object) -> dict[str, Any]:
    """A program of the room; what it reports. Its output goes to standard error."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, str(ROOM / program), "--report", report.name]
        done = subprocess.run([*command, *map(str, arguments)], stdout=sys.stderr)
        text = Path(report.name).read_text()
    if not text:
        raise SystemExit(f"{program} ended with status {done.returncode} and reported nothing")
    reported: dict[str, Any] = json.loads(text)
    return reported


def longest(values: Iterable[float | None]) -> float | None:
    """The longest of what was seen."""
    return max((value for value in values if value is not None), default=None)


def or_none(value: float | None) -> float | str:
    """For people: what was never seen is not 0."""
    return "none" if value is None else value


def play(
    seed: int, seconds: float, quick: bool
) -> tuple[dict[str, Any], list[list[object]], list[str]]:
    """Both modes of the schedule (quick: one): totals, a row a kind of fault, what was bad."""
    modes = [[]] if quick else [[], ["--attempt-tokens"]]
    runs = [
        run("chaos.py", "--seed", seed + number, "--seconds", seconds / len(modes), *mode)
        for number, mode in enumerate(modes)
    ]
    totals = {name: sum(one[name] for one in runs) for name in SUMMED}
    totals |= {name: longest(one[name] for one in runs) for name in LONGEST}
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        for kind, row in one["by_kind"].items():
            kinds.setdefault(kind, []).append(row)
    rows: list[list[object]] = [
        [
            kind,
            sum(row["faults"] for row in of),
            or_none(longest(row["longest_gap_s"] for row in of)),
            max(row["longest_until_whole_s"] for row in of),
            sum(row["dropped"] for row in of),
        ]
        for kind, of in sorted(kinds.items())
    ]
    return totals, rows, [detail for one in runs for detail in one["details"]]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; not evidence")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=7, help="of the schedule")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the schedule")
    options = parser.parse_args()
    seconds = 5.0 if options.quick else options.minutes * 60
    totals, rows, bad = play(options.seed, seconds, options.quick)
    head = ["fault", "times", "longest gap s", "whole after s", "packets dropped"]
    print_table(f"faults of seed {options.seed}, each followed until all is live", head, rows)
    print_table("streams", ["what", "count"], [[name, totals[name]] for name in SUMMED])
    print_table("gaps", ["what", "longest"], [[name, or_none(totals[name])] for name in LONGEST])
    counts = (4,) if options.quick else LOST_AT_ONCE
    lost = [run("losses.py", "--streams", count) for count in counts]
    print_table(
        "lost at once (prompts of 500 tokens, some 100 tokens made)",
        ["streams", "moved", "longest gap s", "tokens computed again"],
        [[*row.values()] for row in lost],
    )
    if not options.quick:
        prefills = run("long_prefills.py", "--seconds", min(600.0, seconds))
        bad += prefills.pop("details")
        print_table("5,000-token prompts without a fault", list(prefills), [[*prefills.values()]])
        totals["falsely_lost"] += prefills["falsely_lost"]
        totals["bad_prompts"] = prefills["bad"]
    for line in bad:
        print(line)
    figures = [
        Figure(name, value, unit, better)
        for name, unit, better in FIGURES
        # A gap that was never seen, or prompts that were not asked, are no figure.
        if (value := totals.get(name)) is not None
    ]
    figures += [
        Figure(f"longest_gap_{row['streams']}_lost_s", row["longest_gap_s"], "s", "lower")
        for row in lost
    ]
    print_figures(figures)
    enough = totals["streams"] >= ENOUGH_STREAMS and totals["faults"] >= ENOUGH_FAULTS
    if options.quick or not enough:
        why = "a quick run" if options.quick else "too few streams or faults"
        print(f"\nNot evidence: {why}.")
    if options.json is not None:
        write_json(
            options.json,
            figures,
            evidence=enough and not options.quick,
            seed=options.seed,
            totals=totals,
            lost_at_once=lost,
            bad=bad,
        )


if __name__ == "__main__":
    main()
