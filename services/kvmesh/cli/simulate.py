"""`kvmesh simulate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.cli.settings import UsageError

if TYPE_CHECKING:
    from kvmesh.simulate.replay import Cluster, Run, TraceFile

_EPILOG = """\
Replays a trace over the index and the scheduler that serve, with simulated engines.
Step times have noise that the scheduler does not see; --perfect takes it away.

  kvmesh simulate --trace conversation.jsonl --workers 16 --speed 2
  kvmesh simulate --trace conversation.jsonl --sweep 1P7D..7P1D --html report.html
  kvmesh simulate --trace code.csv --policy cost --policy overlap-load:overlap-weight=16
  kvmesh simulate --requests 10000 --per-second 30 --prefill 4 --decode 4 --fail 60:0:30
  kvmesh simulate --trace code.csv --prefill 2 --decode 6 --planner dwell-ms=30000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to replay, on what, and where results go."""
    parser.epilog = _EPILOG
    what = parser.add_argument_group("trace")
    what.add_argument(
        "--trace", type=Path, metavar="FILE", help="Mooncake or simple JSON lines, or Azure CSV"
    )
    what.add_argument(
        "--format", choices=("mooncake", "azure", "simple"), help="default: by the file"
    )
    what.add_argument(
        "--raw-ticks", action="store_true", help="Mooncake: arrivals stay in their 3 s ticks"
    )
    what.add_argument(
        "--no-prefixes", action="store_true", help="Azure: no made-up shared prefixes"
    )
    what.add_argument(
        "--block-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens of a shared block, where the trace does not say (64)",
    )
    what.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="made-up traffic of so many requests, without --trace",
    )
    what.add_argument(
        "--per-second", type=float, default=10.0, metavar="N", help="made-up arrivals a second (10)"
    )
    what.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="replay so many times faster (1)"
    )
    what.add_argument(
        "--share",
        type=float,
        default=1.0,
        metavar="S",
        help="replay this share of the trace, from its start (1)",
    )
    what.add_argument(
        "--warm-up",
        type=float,
        default=0.2,
        metavar="S",
        help="share that warms caches and is not counted (0.2)",
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--profile",
        default="h100-70b-tp4",
        metavar="NAME",
        help="hardware and model, a name or a .toml file (h100-70b-tp4)",
    )
    cluster.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="workers that do both (8 where nothing else is given)",
    )
    cluster.add_argument("--prefill", type=int, default=0, metavar="N", help="prefill workers")
    cluster.add_argument("--decode", type=int, default=0, metavar="N", help="decode workers")
    cluster.add_argument(
        "--sweep", metavar="aPbD..cPdD", help="one run for each ratio of prefill to decode workers"
    )
    cluster.add_argument("--routers", type=int, default=1, metavar="N", help="routers (1)")
    cluster.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="S:WORKER[:BACK_S]",
        help="at this second a worker loses everything, and is back after a time",
    )
    cluster.add_argument("--perfect", action="store_true", help="no noise, reports at once")
    cluster.add_argument(
        "--prefix-pull", action="store_true", help="prefixes can be pulled from other workers"
    )
    cluster.add_argument(
        "--prior",
        type=float,
        nargs=5,
        metavar="X",
        help="what routers take the step coefficients a b c d e for at first, as multiples of the "
        "true mean (1 1 1 1 1)",
    )
    cluster.add_argument(
        "--planner",
        nargs="?",
        const="",
        metavar="N=V,...",
        help="prefill and decode workers change roles as the pool controller says; its numbers",
    )
    how = parser.add_argument_group("scheduling")
    how.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME[:N=V,...]",
        help="policy with its numbers; several: one run each (cost)",
    )
    how.add_argument(
        "--local-prefill",
        choices=("by-cost", "without-prefill-workers"),
        help="when decode workers compute prompts, under policy cost (by-cost)",
    )
    how.add_argument("--fifo", action="store_true", help="first come first served, sent on at once")
    how.add_argument(
        "--seed", type=int, default=1, metavar="N", help="equal seeds give equal results (1)"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    out.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    out.add_argument("--rows", action="store_true", help="with a row for each request in --json")


def run(args: argparse.Namespace) -> int:
    """Replays, prints tables, writes files."""
    from kvmesh.cli.admin import print_table
    from kvmesh.simulate import table
    from kvmesh.simulate.replay import FIFO, Policy, replay

    try:
        trace = _trace(args)
        policies = [Policy.parse(text) for text in args.policy or ["cost"]]
        runs: list[tuple[str, Run]] = []
        for cluster in _clusters(args):
            for policy in policies:
                chosen = Policy(policy.name, policy.numbers, FIFO) if args.fifo else policy
                name = " ".join(
                    part
                    for part, several in ((cluster.name, True), (policy.name, len(policies) > 1))
                    if several
                )
                runs.append(
                    (name, replay(trace, cluster, chosen, speed=args.speed, share=args.share))
                )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print_table(table.rows(runs))
    print()
    print_table(table.pool_rows(runs))
    print()
    if len(flips := table.flip_rows(runs)) > 1:
        print_table(flips)
        print()
    for line in table.notes(runs[0][1]):
        print(line)
    if args.json:
        document = {"runs": [{"name": name, **run} for name, run in runs]}
        args.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    if args.html:
        from kvmesh.simulate.report import html

        title = args.trace.name if args.trace else "made-up traffic"
        args.html.write_text(html(title, args.profile, args.speed, runs), encoding="utf-8")
    return 0


def _trace(args: argparse.Namespace) -> TraceFile:
    from kvmesh.simulate.replay import TraceFile

    if args.trace is None:
        if not args.requests:
            raise UsageError("--trace FILE is needed, or --requests N for made-up traffic")
        return TraceFile.synthetic(
            requests=args.requests, per_second=args.per_second, seed=args.seed
        )
    try:
        return TraceFile.read(
            args.trace,
            args.format,
            raw=args.raw_ticks,
            prefixes=not args.no_prefixes,
            block_tokens=args.block_tokens,
            seed=args.seed,
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"trace is {str(args.trace)!r}, which cannot be read: {error}") from error


def _clusters(args: argparse.Namespace) -> list[Cluster]:
    from kvmesh.simulate import load_profile
    from kvmesh.simulate.replay import PERFECT, Cluster, numbers, sweep

    profile = load_profile(args.profile)
    more: dict[str, Any] = {
        "routers": args.routers,
        "warm_up": args.warm_up,
        "seed": args.seed,
        "prefix_pull": args.prefix_pull,
        "rows": args.rows,
        "failures": [_failure(text) for text in args.fail],
        **({"noise": dict(PERFECT)} if args.perfect else {}),
        **({"prior": args.prior} if args.prior else {}),
        **({"local_prefill": args.local_prefill} if args.local_prefill else {}),
        **({"planner": numbers(args.planner)} if args.planner is not None else {}),
    }
    if args.sweep:
        return [Cluster(profile, 0, p, d, more) for p, d in sweep(args.sweep)]
    both = args.workers
    if both is None:
        both = 0 if args.prefill or args.decode else 8
    return [Cluster(profile, both, args.prefill, args.decode, more)]


def _failure(text: str) -> dict[str, float | int]:
    parts = text.split(":")
    try:
        at, worker, *back = parts
        failure: dict[str, float | int] = {"at_ms": float(at) * 1e3, "worker": int(worker)}
        if back:
            failure["back_after_ms"] = float(back[0]) * 1e3
    except ValueError as error:
        raise UsageError(
            f"fail is {text!r}; allowed is SECOND:WORKER or SECOND:WORKER:BACK_AFTER"
        ) from error
    return failure
