"""`kvmesh explain`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvmesh.cli.admin import call_admin, print_table
from kvmesh.cli.client import CONNECTION
from kvmesh.cli.settings import add_settings

if TYPE_CHECKING:
    from kvmesh.v1 import admin_pb2, inference_pb2

_EPILOG = """\
Shows each decision of a router about a request: how long it waited in the router for it
and why, the plans that it considered, best first, and what each would have added, in
milliseconds, by term (docs/scheduling.md); then what was predicted of the first token and
what came of it, and, once it has ended, where its time went and what its longest gap was.
One that still waits is told as such. The id is in `accepted`. A request that
asked for a trace (`kvmesh generate --trace`) is told span by span, and so are those of the
router's share (`explain_traces`).
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
    answer = call_admin("explain", args, lambda stub, how: stub.Explain(request, **how))
    if answer is None:
        return 1
    for decision in answer.decisions:
        _print_wait("waited", decision.waited, answer.predicted_wait_ms)
        print(
            f"attempt {decision.attempt}, after {decision.at_ms:.1f} ms, by {decision.policy}: "
            f"{decision.weighed} plans weighed, {decision.tied} within reach of the best"
        )
        _print_plans(decision)
        _print_phases(decision)
    if answer.HasField("waiting"):
        _print_wait("waits", answer.waiting, answer.predicted_wait_ms)
    if answer.HasField("finished"):
        _print_end(answer.finished)
    return 0


def _print_wait(word: str, wait: admin_pb2.RouterWait, predicted_ms: float) -> None:
    """How long the router kept it, where it did, and what admission predicted."""
    if word == "waited" and not wait.tries and wait.ms < 1:
        return
    times = "once" if wait.tries == 1 else f"{wait.tries} times"
    why = f", put off {times}, the last time since {wait.reason}" if wait.tries else ""
    print(
        f"{word} {wait.ms:.1f} ms in the router{why}; "
        f"admission predicted {predicted_ms:.1f} ms until its prompt starts"
    )


def _print_end(finished: inference_pb2.Finished) -> None:
    """Where the time of the whole request went."""
    t, u = finished.timings, finished.usage
    print(
        f"{u.prompt_tokens} prompt tokens: {u.cached_tokens} cached, {u.pulled_tokens} pulled, "
        f"{u.computed_tokens} computed, {u.recomputed_tokens} again; {u.output_tokens} made"
    )
    names = ("queue", "tokenize", "decide", "worker_queue", "prefill", "transfer",
             "transfer_tail", "first_token", "decode", "total")  # fmt: skip
    print_table(
        [
            ("MS", *(name.replace("_", " ").upper() for name in names)),
            ("", *(f"{getattr(t, f'{name}_ms'):.1f}" for name in names)),
        ]
    )
    if t.longest_gap_cause:
        print(
            f"longest gap {t.longest_gap_ms:.1f} ms, {t.longest_gap_start_ms:.0f} ms after its "
            f"arrival: {t.longest_gap_cause}"
        )
    if finished.trace:
        rows: list[tuple[str, ...]] = [("FROM MS", "MS", "WHAT", "TOKENS", "ATTEMPT", "CAUSE")]
        rows += [
            (f"{s.start_ms:.1f}", f"{s.duration_ms:.1f}", s.name, str(s.tokens or "-"),
             str(s.attempt or "-"), s.cause or "-")
            for s in finished.trace
        ]  # fmt: skip
        print_table(rows)


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
