"""Does a long prompt make a chat user wait on vLLM, and does kvmesh keep it from that?

A real model on vLLM's CPU build, real processes, two cores that each arrangement has in turn:

    (own)    one vLLM engine on both cores, with its own chunked prefill at its own size
             (2,048 tokens a step)
    (chunks) the same with steps of at most --chunk tokens
    (pd)     prefill and decode, an engine and a core each, KV by NIXL over kvmesh

All stand behind a kvmesh router, so that the difference is the engines'. Load and phases are those
of isolation.py: chat turns (seeded Poisson, 60 new tokens in, 64 out) alone, then the same turns
beside documents, one in flight (--document tokens in, 8 out). A phase during which others used
more than a tenth of the machine is repeated, and counted.

    python benchmarks/vllm_pd.py [--quick] [--json FILE] [--chunk TOKENS] [--document TOKENS]

Needs vLLM (docs/vllm.md: the environment that make test-vllm sets up); without it the status is 77.
--quick: one short phase of each kind, (chunks) and (pd); not evidence. The engines' starts, up to a
minute each, come on top of its minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import isolation
from alternating import (
    BUSY_LIMIT,
    Figure,
    is_evidence,
    print_figures,
    print_table,
    say,
    write_json,
)
from isolation import Plan, run_phase, warm_up
from isolation_clusters import Cluster, Worker
from isolation_load import Phase
from isolation_report import (
    CHAT_HEAD,
    DOCUMENT_HEAD,
    Measured,
    chat_rows,
    document_row,
    itl,
    quantile,
)
from run_all import INPUT_MISSING

from kvmesh.engine.vllm import border

CONTEXT = 2_048
POOL_TOKENS = 16_384


@dataclass(frozen=True)
class Setting:
    """An arrangement."""

    key: str
    title: str
    workers: tuple[Worker, ...]


def settings(chunk: int) -> dict[str, Setting]:
    """All arrangements, by their name."""
    small = ("--vllm-arg", f"max_num_batched_tokens={chunk}")
    both = ("--threads", "2")
    split = (Worker("prefill", (0,)), Worker("decode", (1,)))
    return {
        one.key: one
        for one in (
            Setting("own", "one engine, its own chunks", (Worker("both", (0, 1), both),)),
            Setting(
                "chunks", f"one engine, {chunk} a step", (Worker("both", (0, 1), both + small),)
            ),
            Setting("pd", "prefill + decode, NIXL", split),
        )
    }


@contextlib.contextmanager
def serving(setting: Setting) -> Iterator[Cluster]:
    """A cluster of an arrangement that serves."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"two cores are needed, here are {cores}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # Children have the cores that we have when they start.
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, set(cores[:2]))
        cluster = Cluster(Path(folder), as_shipped=True)
        stack.callback(cluster.close)
        endpoint = cluster.start_router()
        names = []
        for number, worker in enumerate(setting.workers):
            names.append(f"{worker.role}-{number}")
            os.sched_setaffinity(0, {cores[core] for core in worker.cores})
            cluster.start_worker(
                names[-1], worker.role,
                "--kv-pool-tokens", str(POOL_TOKENS), "--log-level", "warn",
                "--vllm-arg", f"max_model_len={CONTEXT}", "--vllm-arg", "enforce_eager=true",
                *worker.arguments, engine="vllm",
            )  # fmt: skip
        os.sched_setaffinity(0, set(cores[:2]))
        cluster.wait_live(endpoint, *names)
        yield cluster


def measure(setting: Setting, plan: Plan) -> Measured:
    """All phases of one arrangement."""
    measured = Measured(setting.key, setting.title)
    say(f"({setting.key}) starting")
    with serving(setting) as cluster:
        warm_up(cluster)
        for number in range(plan.rounds):
            say(f"({setting.key}) round {number + 1} of {plan.rounds}")
            # Those of isolation.py: its figures are of the same turns.
            seed = f"isolation/{number}"
            measured.alone.append(run_phase(cluster, plan, plan.alone_s, seed, 0))
            measured.storm.append(run_phase(cluster, plan, plan.storm_s, seed, 1))
    return measured


def figures_of(measured: dict[str, Measured]) -> list[Figure]:
    """Prefill and decode against the better of the single engines."""
    singles = [one for key, one in measured.items() if key != "pd"]
    split = measured["pd"]
    figures = []
    for name, part in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        best = min(quantile(itl(one.storm), part) for one in singles)
        ratio = quantile(itl(split.storm), part) / best
        figures.append(Figure(f"vllm_pd_itl_{name}_over_one_engine", ratio, "ratio", "lower"))
    own = quantile(itl(split.storm), 0.99) / quantile(itl(split.alone), 0.99)
    figures.append(Figure("vllm_pd_itl_p99_storm_over_alone", own, "ratio", "lower"))
    rate = split.documents_per_s / max(one.documents_per_s for one in singles)
    figures.append(Figure("vllm_pd_documents_over_one_engine", rate, "ratio", "higher"))
    return figures


def was_busy(phases: Iterable[Phase]) -> bool:
    """Whether others used the machine in one of them."""
    return any(phase.others_share > BUSY_LIMIT for phase in phases)


def main() -> int:
    """Measures and prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short phases; not evidence")
    parser.add_argument("--json", type=Path, help="file of the figures")
    parser.add_argument("--chunk", type=int, default=128, help="tokens a step of (chunks)")
    parser.add_argument("--document", type=int, default=1_500, help="tokens of a document")
    args = parser.parse_args()
    try:
        version = border.installed_version()
    except border.VllmError as error:
        print(f"vllm_pd needs vLLM: {error}; make test-vllm sets it up for CPUs", file=sys.stderr)
        return INPUT_MISSING
    plan = Plan(3, 60.0, 120.0, args.document, 0, 0.0)
    keys = ["own", "chunks", "pd"]
    if args.quick:
        # It is no evidence, however busy the machine is.
        isolation.MAX_REPEATS = 0
        plan, keys = Plan(1, 12.0, 18.0, min(args.document, 500), 0, 0.0), keys[1:]
    chosen = settings(args.chunk)
    measured = {key: measure(chosen[key], plan) for key in keys}
    rows = [row for one in measured.values() for row in chat_rows(one)]
    print_table(f"vLLM {version}: chat, alone and beside documents", CHAT_HEAD, rows)
    rate = max(one.documents_per_s for one in measured.values())
    rows = [document_row(one, rate) for one in measured.values()]
    print_table("documents; share of the best rate here", DOCUMENT_HEAD, rows)
    figures = figures_of(measured)
    print_figures(figures)
    phases = [phase for one in measured.values() for phase in one.phases]
    evidence = is_evidence(quick=args.quick, busy=was_busy(phases))
    if args.json:
        when = time.strftime("%Y-%m-%d")
        write_json(args.json, figures, vllm=version, quick=args.quick, when=when, evidence=evidence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
