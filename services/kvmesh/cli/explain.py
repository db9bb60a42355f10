"""`kvmesh explain`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvmesh.cli.admin import call_admin, print_table
from kvmesh.cli.client import CONNECTION
from kvmesh.cli.settings import add_settings

if TYPE_CHECKING:
    from kvmesh.v1 import admin_pb2

_EPILOG = """\
Shows each decision of a router about a request: the plans that it considered, best
first, and what each would have added, in milliseconds, by term (docs/scheduling.md);
then what was predicted of the first token and what came of it. The id is in `accepted`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which generation."""
    parser.epilog = _EPILOG
    parser.add_argument("generation", metavar="ID", help="generation id, 32 hexadecimal digits")
    add_settings(parser, CONNECTION)


def run(args: argparse.Namespace) -> int:
    """Prints the decisions about one request."""
    from kvmesh.v1 import admin_pb2 as admin

    request = admin.ExplainRequest(generation_id=args.generation)
    answer = call_admin("explain", args, lambda stub, t: stub.Explain(request, timeout=t))
    if answer is None:
        return 1
    for decision in answer.decisions:
        print(
            f"attempt {decision.attempt}, after {decision.at_ms:.1f} ms, by {decision.policy}: "
            f"{decision.weighed} plans weighed, {decision.tied} within reach of the best"
        )
        _print_plans(decision)
        _print_phases(decision)
    return 0


def _print_phases(decision: admin_pb2.Decision) -> None:
    """What was predicted of the first token, and what came of it."""
    rows: list[tuple[str, ...]] = [("MS", "WAIT", "PREFILL", "TRANSFER", "FIRST TOKEN")]
    told = [("predicted", decision.predicted)]
    if decision.HasField("actual"):
        told.append(("measured", decision.actual))
    rows += [
        (name, *(f"{ms:.1f}" for ms in (p.wait_ms, p.prefill_ms, p.transfer_ms, p.ttft_ms)))
        for name, p in told
    ]
    print_table(rows)


def _print_plans(decision: admin_pb2.Decision) -> None:
    terms = list(dict.fromkeys(term.name for plan in decision.plans for term in plan.terms))
    head = ("", "PREFILL", "DECODE", "PREFIX FROM", "CACHED", "TTFT MS", "COST MS")
    rows = [(*head, *map(str.upper, terms))]
    for number, plan in enumerate(decision.plans):
        share = {term.name: f"{term.ms:.1f}" for term in plan.terms}
        rows.append(
            (
                "*" if number == decision.chosen else "",
                plan.prefill_worker or "-",
                plan.decode_worker,
                f"{plan.prefix_worker} ({plan.pulled_tokens})" if plan.prefix_worker else "-",
                str(plan.cached_tokens),
                f"{plan.ttft_ms:.1f}",
                f"{plan.total_ms:.1f}",
                *(share.get(term, "-") for term in terms),
            )
        )
    print_table(rows)
