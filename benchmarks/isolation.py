"""Does a long prompt make a chat user wait, and what does it cost to keep it from that?

A real model, real processes, two cores that each arrangement has in turn:

    (a) one worker for both stages, two threads, prompts unchunked: a prompt that is begun beside a
        stream is one step; one begun while nobody decodes still gives way between two layers
    (b) the same with chunks mixed into decode steps, the best of some fixed sizes
    (c) two workers for both stages, one thread and core each, least-loaded
    (d) one prefill and one decode worker, one thread and core each, as shipped
    (e) (d) with the planner

Chat turns arrive open-loop (seeded Poisson, 0.3 a second, 60 new tokens in, 64 out), the same
ones for every arrangement. Phases alternate: chat alone, then a storm of documents (5,000
distinct tokens in, 8 out, one in flight). The turns of a storm are those of the phase alone
before it, twice: as many answers are under way, and a difference is the storm's. R is the rate of
documents of one core that does nothing else, measured in the same run. A phase during which
others used more than a tenth of the machine is repeated, and counted.

    python benchmarks/isolation.py [--quick] [--json FILE] [--out FOLDER] [--only a,d]
                                   [--second-table [alone]] [--chunk TOKENS]

--out gets isolation.png (needs matplotlib), isolation.html and isolation.json (every token's time);
unless set it is the folder beside --json with its name.
--quick: (a) and (d), documents of 1,000 tokens, one short phase of each kind; not evidence.
--second-table: two documents in flight, (d) and (e); alone: nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alternating import (
    BUSY_LIMIT,
    MAX_REPEATS,
    Figure,
    MachineWatch,
    descendants,
    print_table,
    say,
    write_json,
)
from isolation_clusters import (
    ALONE,
    Arrangement,
    Cluster,
    arrangements,
    flips_of,
    has_planner,
    roles_of,
    serving,
    unified,
)
from isolation_load import VOCABULARY, Phase, PhaseRun, arrivals, documents_alone
from isolation_report import (
    CHAT_HEAD,
    COMPANY_HEAD,
    DOCUMENT_HEAD,
    Measured,
    Ratios,
    chat_rows,
    company_rows,
    document_row,
    itl,
    quantile,
    ttft,
    winners,
    write_html,
    write_png,
    write_raw,
)

from kvmesh import AsyncClient

CHUNKS = (16, 32, 64, 128, 256)
"""Sizes that (b) is chosen among."""
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    alone_s: float
    storm_s: float
    document_tokens: int
    documents_alone: int
    sweep_s: float
    trace: bool = False


FULL = Plan(3, 60.0, 120.0, 5_000, 3, 60.0)
QUICK = Plan(1, 12.0, 18.0, 1_000, 2, 10.0)


@dataclass(frozen=True)
class Core:
    """What one core does that has nothing else to do."""

    documents_per_s: float
    document_s: float
    prefill_tokens_per_s: float


def core_alone(plan: Plan) -> tuple[Core, bool]:
    """Measures R, again while others use the machine; and whether they did to the end."""

    async def measure(cluster: Cluster) -> Core:
        async with AsyncClient(cluster.endpoints[0]) as client:
            rates = []
            for _ in range(3):
                ids = [VOCABULARY[int.from_bytes(os.urandom(2)) % 30_000] for _ in range(512)]
                done = await client.complete(token_ids=ids, max_tokens=1, ignore_end_of_text=True)
                rates.append(1e3 * PREFILL_TOKENS / done.timings.prefill_ms)
            read = await documents_alone(client, plan.document_tokens, plan.documents_alone)
        took = [one.ended - one.sent for one in read if one.ended is not None]
        return Core(len(took) / sum(took), statistics.median(took), statistics.median(rates))

    with serving(ALONE) as cluster:
        for _ in range(MAX_REPEATS + 1):
            watch = MachineWatch(descendants(os.getpid()))
            core = asyncio.run(measure(cluster))
            if watch.share_of_others() <= BUSY_LIMIT:
                return core, False
        return core, True


def run_phase(cluster: Cluster, plan: Plan, seconds: float, seed: str, documents: int) -> Phase:
    """One phase, run again while others use the machine."""
    turns = arrivals(seconds, seed, plan.alone_s)
    before = len(flips_of(cluster) or [])

    async def once() -> Phase:
        async with AsyncClient(cluster.endpoints[0]) as client:
            run = PhaseRun(
                client, seconds, seed, turns, documents, plan.document_tokens, plan.trace
            )
            return await run.run()

    for repeats in range(MAX_REPEATS + 1):
        watch = MachineWatch(descendants(os.getpid()))
        phase = asyncio.run(once())
        phase.others_share, phase.repeats = watch.share_of_others(), repeats
        cluster.assert_alive()
        if phase.others_share <= BUSY_LIMIT:
            break
    flips = flips_of(cluster)
    phase.flips = None if flips is None else flips[before:]
    phase.roles = roles_of(cluster)
    return phase


def warm_up(cluster: Cluster) -> None:
    """First requests load code and learn paths; they are nobody's wait."""

    async def ask() -> None:
        async with AsyncClient(cluster.endpoints[0]) as client:
            for length in (40, 200):
                ids = list(VOCABULARY[length : 2 * length])
                await client.complete(token_ids=ids, max_tokens=8, ignore_end_of_text=True)

    asyncio.run(ask())


def measure(arrangement: Arrangement, plan: Plan, documents: int = 1) -> Measured:
    """All phases of one arrangement."""
    measured = Measured(arrangement.key, arrangement.title)
    with serving(arrangement) as cluster:
        warm_up(cluster)
        for number in range(plan.rounds):
            say(f"({arrangement.key}) round {number + 1} of {plan.rounds}")
            seed = f"isolation/{number}"
            measured.alone.append(run_phase(cluster, plan, plan.alone_s, seed, 0))
            measured.storm.append(run_phase(cluster, plan, plan.storm_s, seed, documents))
    return measured


def best_chunk(plan: Plan) -> tuple[int, list[list[object]]]:
    """The fixed chunk for (b): the least p95 between tokens in a storm."""
    rows: list[list[object]] = []
    for tokens in CHUNKS:
        with serving(unified("b", "", tokens)) as cluster:
            warm_up(cluster)
            phase = run_phase(cluster, plan, plan.sweep_s, "isolation/sweep", 1)
        say(f"(b) chunks of {tokens} tried")
        rows.append(
            [tokens, quantile(itl([phase]), 0.95), quantile(ttft([phase]), 0.95),
             60 * phase.documents_per_s]
        )  # fmt: skip
    return min(rows, key=lambda row: float(str(row[1])))[0], rows  # type: ignore[return-value]


def judge(ratios: Ratios, core: Core) -> list[list[object]]:
    """What is to be reached, and what was, of (d)."""
    ttft_bound = max(1.0, 200 / core.prefill_tokens_per_s)
    rows = [
        ("chat ITL p95, storm / alone", 1.15, ratios.itl_p95, False),
        ("chat ITL p99, storm / alone", 1.3, ratios.itl_p99, False),
        ("second token p95, decode steps of a stream alone", 2.0, ratios.second_steps, False),
        ("second token p95, decode steps then", 2.0, ratios.second_company_steps, False),
        ("chat TTFT p95, storm / alone", 1.3, ratios.ttft_p95, False),
        ("chat TTFT p95, s", ttft_bound, ratios.ttft_p95_s, False),
        ("documents, share of R", 0.8, ratios.share_of_rate, True),
        ("slowest document / alone", 1.5, ratios.slowest, False),
    ]
    return [
        [name, f"{'>=' if more else '<='} {bound:.3g}", value,
         "yes" if (value >= bound if more else value <= bound) else "no"]
        for name, bound, value, more in rows
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write figures here")
    parser.add_argument("--out", type=Path, help="folder for plots and raw data")
    parser.add_argument("--quick", action="store_true", help="a minute or two; not evidence")
    parser.add_argument("--only", default="", help="some of a,b,c,d,e")
    parser.add_argument(
        "--second-table", nargs="?", const="too", choices=("too", "alone"),
        help="two documents in flight; alone: without the tables of one",
    )  # fmt: skip
    parser.add_argument("--chunk", type=int, help="chunks of (b), instead of trying some")
    parser.add_argument("--rounds", type=int, help="of two phases each")
    parser.add_argument("--alone-s", type=float, help="length of a phase alone")
    parser.add_argument("--documents-alone", type=int, help="how many R is measured on")
    parser.add_argument("--storm-s", type=float, help="length of a storm")
    parser.add_argument("--trace", action="store_true", help="keep what each request waited for")
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    """How much is measured, as asked for."""
    base = QUICK if options.quick else FULL
    return Plan(
        options.rounds or base.rounds,
        options.alone_s or base.alone_s,
        options.storm_s or base.storm_s,
        base.document_tokens,
        options.documents_alone or base.documents_alone,
        base.sweep_s,
        options.trace,
    )


def main() -> None:
    """Runs it."""
    options = parse()
    plan = plan_of(options)
    keys = options.only.split(",") if options.only else list("ad" if options.quick else "abcde")
    if "e" in keys and not has_planner():
        say("(e) is left out: this version has no planner")
        keys.remove("e")
    note = f"{plan.rounds} x ({plan.alone_s:.0f} s alone, {plan.storm_s:.0f} s storm), "
    note += f"documents of {plan.document_tokens} tokens; {os.cpu_count()} cores"
    if plan != FULL or options.only or options.chunk:
        note += "; not evidence: less than the whole"
    first = [] if options.second_table == "alone" else keys

    core, busy = core_alone(plan)
    say(f"R = {60 * core.documents_per_s:.2f} documents a minute")
    chunk, sweep = options.chunk or 64, []
    if "b" in first and not options.chunk:
        chunk, sweep = best_chunk(plan)
    known = arrangements(chunk)
    found = [measure(known[key], plan) for key in first]

    tables: dict[str, tuple[Sequence[str], list[list[object]]]] = {}
    if sweep:
        head = ("chunk", "chat ITL p95 ms", "chat TTFT p95 ms", "documents a minute")
        tables["Fixed chunks, one storm each"] = (head, sweep)
    tables["Chat, ms"] = (CHAT_HEAD, [row for one in found for row in chat_rows(one)])
    rows = [document_row(one, core.documents_per_s) for one in found]
    tables[f"Documents; alone one takes {core.document_s:.1f} s, R = "
           f"{60 * core.documents_per_s:.2f} a minute"] = (DOCUMENT_HEAD, rows)  # fmt: skip
    tables["Chat ITL by how many answers were under way, ms"] = (
        COMPANY_HEAD,
        [row for one in found for row in company_rows(one)],
    )
    ratios = {one.key: Ratios.of(one, core.documents_per_s, core.document_s) for one in found}
    if len(found) > 1:
        tables["Best in the storm"] = (("", "arrangement", "value"), winners(found))
    names = (
        "itl_p95", "itl_p99", "second_steps", "second_company_steps", "ttft_p95", "share_of_rate",
        "slowest",
    )  # fmt: skip
    tables["Storm over alone"] = (
        (
            "",
            "ITL p95",
            "ITL p99",
            "2nd, steps alone",
            "steps then",
            "TTFT p95",
            "share of R",
            "slowest document",
        ),
        [[key, *(getattr(of, name) for name in names)] for key, of in ratios.items()],
    )
    figures: list[Figure] = []
    if "d" in ratios:
        of = ratios["d"]
        tables["(d): to reach"] = (("", "bound", "measured", "reached"), judge(of, core))
        figures = [
            Figure(name, value, unit, better)
            for name, value, unit, better in (
                ("chat_itl_p95_ratio", of.itl_p95, "ratio", "lower"),
                ("chat_itl_p99_ratio", of.itl_p99, "ratio", "lower"),
                ("chat_ttft_p95_s", of.ttft_p95_s, "s", "lower"),
                ("document_share_of_R", of.share_of_rate, "ratio", "higher"),
            )
            if value == value
        ]
    two: list[Measured] = []
    if options.second_table:
        two = [measure(known[key], plan, documents=2) for key in "de" if key in keys]
        for one in two:
            one.title += ", two documents in flight"
        tables["Two documents in flight: chat, ms"] = (
            CHAT_HEAD, [row for one in two for row in chat_rows(one)]
        )  # fmt: skip
        tables["Two documents in flight: documents"] = (
            DOCUMENT_HEAD, [document_row(one, core.documents_per_s) for one in two]
        )  # fmt: skip

    phases = [phase for one in found + two for phase in one.phases]
    if busy or any(phase.others_share > BUSY_LIMIT for phase in phases):
        note += "; not evidence: others used the machine"
    print(note)
    tables = {caption: (head, lines) for caption, (head, lines) in tables.items() if lines}
    for caption, (head, lines) in tables.items():
        print_table(caption, head, lines)
    if out := options.out or (options.json and options.json.with_suffix("")):
        out.mkdir(parents=True, exist_ok=True)
        if not write_png(out / "isolation.png", found + two):
            say("no PNG: matplotlib is not installed (requirements/bench.txt)")
        write_html(out / "isolation.html", note, found + two, tables)
        raw = {one.key: one for one in found} | {f"{one.key}, two documents": one for one in two}
        write_raw(out / "isolation.json", note, raw, core=vars(core))
    if options.json:
        write_json(options.json, figures, quick=options.quick, note=note)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
