"""How much better are the router's choices than a formula's, in time to first token and to the end?

Every policy replays the same trace over the same simulated workers (docs/simulator.md), by the
definitions of SCHEDULING 6:

- 100 % load is the highest replay speed at which the best baseline, with our queue order, still
  serves 90 % of requests within SLO (first token within 5x its unloaded time at that length, mean
  time between tokens within the class's target); found by bisection, the same for all. A seed's
  workers differ from another's by up to 20 % each, so that each seed has its own 100 %.
- Two tables: placement alone (every policy with our order), and whole (baselines first come first
  served). With our order each baseline, of whatever weights, may hold requests in the router as we
  do, or not: the better counts, for 100 % load too.
- Baselines are tuned over a grid on the first third, once for TTFT and once for end-to-end time, at
  each load; all are judged on the rest. `overlap-load` is Dynamo's formula with its one weight,
  `weighted` the same with two free weights, which no product has. In unified pools it is shown, and
  not the figure's base. In P:D pools the one weight changes nothing (a prefill worker has no
  streams, a decode worker no prompts), so that "tuned" there is the best of both formulas.
- Ours is as shipped; a row shows SCHEDULING's own weight of streams' delay (0.1) beside it. In P:D
  pools ours lets decode workers compute prompts where that costs least, which no baseline does
  (local_prefill): the row "ours, without local prefill" is the same choice with that switched off,
  so that what the choice brings can be told from what the switch brings. Its figures end in
  `_apart`.
- A quick run has coarse grids and one P:D ratio.
- Of the fixed policies those are judged that serve at least half of the first third within SLO.
- Clairvoyant: true lengths and coefficients, no report delay, each candidate rolled forward, least
  sum of first-token times of everyone who waits. In P:D pools prompts stay off decode workers: what
  their streams suffer is no part of its sum, and it would drown them.

    python benchmarks/routing_quality.py [--quick] [--json FILE] [--traces DIR] [--workers 8,16]
        [--only mooncake,azure-conv,azure-code] [--pools unified,pd] [--loads 50,80,95] [--seeds N]
        [--perfect] [--tuned-only]

Figures are means over worker counts of the Mooncake trace, as ratios; a ratio under 1 is ours.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from alternating import Figure, print_table, write_json
from routing_quality_cells import (
    FIXED,
    OUR_ORDER,
    PROFILE,
    Cell,
    Figures,
    formula,
    formulas,
    free_weights,
    full_loads,
    split_cluster,
    weights,
)
from trace_files import add_traces, need_traces

from kvmesh.simulate.profiles import load_profile
from kvmesh.simulate.replay import AT_ONCE, FIFO, PERFECT, Cluster, Policy, TraceFile

TRACES = {
    "mooncake": "mooncake_conversation_part1.jsonl",
    "azure-conv": "azure_conv_2023_part1.csv",
    "azure-code": "azure_code_2023_part1.csv",
}
APART = "without-prefill-workers"
"""Decode workers compute prompts only where no prefill worker takes them, as under baselines."""


COLLAPSES = 0.5
"""Share within SLO under which a fixed policy is not judged."""

Row = tuple[str, Figures]


def label(policy: Policy) -> str:
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in policy.numbers.items())
    held = "" if policy.queue in (AT_ONCE, FIFO) else "held"
    more = ", ".join(filter(None, (numbers, held)))
    return f"{policy.name} ({more})" if more else policy.name


def ours(cell: Cell, speeds: Sequence[float]) -> dict[str, Row]:
    """As shipped, and in P:D pools with prompts kept off decode workers."""
    rows: dict[str, Row] = {"ours": ("ours", cell.judge(Policy("cost"), speeds))}
    if cell.cluster.prefill:
        figures = cell.judge(Policy("cost"), speeds, local_prefill=APART)
        rows["ours_apart"] = ("ours, without local prefill", figures)
    return rows


def placement(cell: Cell, speeds: Sequence[float], fixed: bool) -> dict[str, Row]:
    """Every policy with our order."""
    rows = ours(cell, speeds)
    rows["ours_page"] = ("ours, weight 0.1", cell.judge(Policy("cost", {"stretch": 0.1}), speeds))
    tried = {
        "formula": cell.tune(formulas(cell), speeds),
        "free": cell.tune(free_weights(cell), speeds),
    }
    if cell.cluster.prefill:
        tried["formula"] += tried["free"]
    for key, of in tried.items():
        for goal in ("ttft", "e2e"):
            best = min(of, key=lambda entry: getattr(entry[1], goal))[0]
            rows[f"{key}_{goal}"] = (f"{goal}: {label(best)}", cell.judge(best, speeds))
    best = held_or_not(cell, speeds, formula(1.0))
    rows["default"] = (f"as shipped: {label(best)}", cell.judge(best, speeds))
    sight: dict[str, Any] = {"noise": {**cell.noise, **clear_sight()}}
    if cell.cluster.prefill:
        sight["local_prefill"] = APART
    rows["clairvoyant"] = (
        "clairvoyant, without local prefill" if cell.cluster.prefill else "clairvoyant",
        cell.judge(Policy("clairvoyant", {}, AT_ONCE), speeds, **sight),
    )
    if fixed:
        rows |= fixed_rows(cell, speeds, OUR_ORDER)
    return rows


def fixed_rows(
    cell: Cell, speeds: Sequence[float], queues: Sequence[Mapping[str, Any]]
) -> dict[str, Row]:
    """The fixed policies, each with the better queue of these by TTFT. One that leaves more than
    half of the first third outside its SLO is named and not judged: its queue only grows."""
    rows: dict[str, Row] = {}
    for name in FIXED:
        policy, figures = better_queue(cell, speeds, Policy(name), queues)
        if figures.good < COLLAPSES:
            print(f"{name}: not judged, serves {figures.good:.0%} of the first third within SLO")
            continue
        rows[name] = (label(policy), cell.judge(policy, speeds))
    return rows


def held_or_not(cell: Cell, speeds: Sequence[float], policy: Policy) -> Policy:
    """A policy with our order, held back in the router or not: the better one by TTFT."""
    return better_queue(cell, speeds, policy, OUR_ORDER)[0]


def better_queue(
    cell: Cell, speeds: Sequence[float], policy: Policy, queues: Sequence[Mapping[str, Any]]
) -> tuple[Policy, Figures]:
    """A policy with that of these queues which serves the first third better by TTFT."""
    tried = [Policy(policy.name, policy.numbers, queue) for queue in queues]
    return min(cell.tune(tried, speeds), key=lambda entry: entry[1].ttft)


def clear_sight() -> dict[str, Any]:
    """The workers' true noise, but nothing is told late."""
    late = ("reports_a_step_late", "report_ms", "network_ms")
    return {key: PERFECT[key] for key in late}


def whole(cell: Cell, speeds: Sequence[float], fixed: bool) -> dict[str, Row]:
    """Baselines first come first served."""
    rows = ours(cell, speeds)
    tried = cell.tune([formula(w, FIFO) for w in weights(cell)], speeds)
    for goal in ("ttft", "e2e"):
        best = min(tried, key=lambda entry: getattr(entry[1], goal))[0]
        rows[f"formula_{goal}"] = (f"{goal}: {label(best)}", cell.judge(best, speeds))
    rows["default"] = ("as shipped: overlap-load", cell.judge(formula(1.0, FIFO), speeds))
    if fixed:
        rows |= fixed_rows(cell, speeds, (FIFO,))
    return rows


HEAD = (
    "policy",
    "TTFT ms",
    "of ours",
    "above floor",
    "e2e s",
    "of ours",
    "slow p99",
    "goodput",
    "hits",
)


def show(title: str, rows: Mapping[str, Row]) -> None:
    base = rows["ours"][1]
    print_table(
        title,
        HEAD,
        [
            (
                name, f.ttft, f"{f.ttft / base.ttft:.3f}", f.above, f.e2e / 1e3,
                f"{f.e2e / base.e2e:.3f}", f.slowdown, f"{f.good:.1%}", f"{f.hits:.1%}",
            )
            for name, f in rows.values()
        ],
    )  # fmt: skip
    print(
        f"bounds of the mean TTFT: no waiting and every hit {base.floor:,.0f} ms; "
        f"pooled {base.pooled:,.0f} ms"
    )


def cells(args: argparse.Namespace) -> Iterable[tuple[str, Cell]]:
    profile = load_profile(PROFILE)
    for name in args.only:
        path = args.traces / TRACES[name]
        kinds = [(name, TraceFile.read(path))]
        if name != "mooncake" and not args.quick:
            kinds.append((f"{name} without prefixes", TraceFile.read(path, prefixes=False)))
        for kind, trace in kinds:
            for workers, pool in itertools.product(args.workers, args.pools):
                if kind != name and (pool == "pd" or workers != max(args.workers)):
                    continue
                # Azure's prompts are a tenth as long.
                most = workers / 2 if name == "mooncake" else workers * 6.0
                if pool == "pd":
                    cluster = split_cluster(trace, workers, args, most)
                else:
                    cluster = Cluster(profile, workers)
                title = f"{kind}, {cluster.name} workers"
                cell = Cell(
                    title, trace, cluster, args.seed_list, most, args.share, args.noise, args.quick
                )
                yield pool, cell


def main() -> int:
    args = arguments()
    began = time.monotonic()
    ratios: dict[str, list[float]] = {}
    tables: list[dict[str, Any]] = []
    replays = 0
    for pool, cell in cells(args):
        full = full_loads(cell, 6 if args.quick else 9)
        print(
            f"\n== {cell.name}: 100 % load is replay speed "
            f"{', '.join(f'{speed:.3f}' for speed in full)} by seed (best baseline, our order)"
        )
        for load in args.loads:
            at = [speed * load / 100 for speed in full]
            for table, rows in (
                ("placement alone", placement(cell, at, args.fixed)),
                ("whole", whole(cell, at, args.fixed)),
            ):
                show(f"{cell.name}, {load} % load, {table}", rows)
                tables.append(
                    {"cell": cell.name, "load": load, "table": table, "speeds": at,
                     "rows": {key: {"name": n, **vars(f)} for key, (n, f) in rows.items()}}
                )  # fmt: skip
                if cell.trace.source["format"] == "mooncake":
                    collect(ratios, pool, load, table, rows)
        replays += len(cell.runs)
    figures = [Figure(name, geometric_mean(of), "ratio", "lower") for name, of in ratios.items()]
    print_table("figures", ("figure", "ratio"), [(f.name, f"{f.value:.3f}") for f in figures])
    print(
        f"{time.monotonic() - began:.0f} s, {replays} replays"
        + (", quick: no evidence" if args.quick else "")
    )
    if args.json:
        write_json(args.json, figures, tables=tables, quick=args.quick, perfect=args.perfect)
    return 0


def collect(
    ratios: dict[str, list[float]], pool: str, load: int, table: str, rows: Mapping[str, Row]
) -> None:
    """The figures' ratios, ours over the other."""

    def note(name: str, key: str, what: str) -> None:
        for row, end in (("ours", ""), ("ours_apart", "_apart")):
            alike = (row == "ours_apart") == (pool == "pd") or key != "clairvoyant"
            if row in rows and alike:
                value = getattr(rows[row][1], what) / getattr(rows[key][1], what)
                ratios.setdefault(f"{name}_{load}{end}", []).append(value)

    if table == "whole":
        note(
            "whole_ttft_over_default" if pool == "unified" else "pd_whole_ttft_over_default",
            "default",
            "ttft",
        )
        return
    if pool == "unified":
        note("unified_ttft_over_tuned", "formula_ttft", "ttft")
        note("unified_e2e_over_tuned", "formula_e2e", "e2e")
        note("unified_ttft_over_e2e_tuned", "formula_e2e", "ttft")
        note("unified_ttft_over_default", "default", "ttft")
        note("unified_ttft_over_free_weights", "free_ttft", "ttft")
        note("unified_e2e_over_free_weights", "free_e2e", "e2e")
        note("unified_ttft_over_e2e_free_weights", "free_e2e", "ttft")
        note("ttft_over_clairvoyant", "clairvoyant", "ttft")
    else:
        note("pd_ttft_over_tuned", "formula_ttft", "ttft")
        note("pd_ttft_over_default", "default", "ttft")
        note("pd_ttft_over_free_weights", "free_ttft", "ttft")
        note("pd_e2e_over_free_weights", "free_e2e", "e2e")
        note("pd_ttft_over_clairvoyant", "clairvoyant", "ttft")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute; no evidence")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--perfect", action="store_true", help="workers without noise, reports at once"
    )
    parser.add_argument(
        "--tuned-only", action="store_true", help="without the fixed policies: no figure is of them"
    )
    add_traces(parser)
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--only", type=names, default=list(TRACES))
    parser.add_argument("--workers", type=numbers, default=[8, 16])
    parser.add_argument("--pools", type=names, default=["unified", "pd"])
    parser.add_argument("--loads", type=numbers, default=[50, 80, 95])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.share = 1.0
    args.fixed = not (args.quick or args.tuned_only)
    args.noise = dict(PERFECT) if args.perfect else {}
    if args.quick:
        args.only, args.workers, args.loads, args.seeds, args.share = (
            ["mooncake"],
            [8],
            [80],
            1,
            0.25,
        )
    args.seed_list = list(range(1, args.seeds + 1))
    need_traces(args.traces, [TRACES[name] for name in args.only])
    return args


if __name__ == "__main__":
    sys.exit(main())
