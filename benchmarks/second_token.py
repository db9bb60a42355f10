"""Part two of kv_transfer.py: the hand-off as a client sees it.

Two clusters of real processes on loopback, the same model in each (torch, fp32, one thread a
worker): one with a prefill and a decode worker, one with a worker of both roles.

- From first to second token: in the split cluster the hand-off and a decode step lie between them,
  in the other one a decode step. The bound of the first: one decode step, 2 ms, and the bytes of
  the last chunk over the bandwidth of memory (a copy between two pools, in the same run).
- Four streams decode in the split cluster while a long prompt is computed and its KV arrives.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from alternating import Figure, alternate, descendants, print_table, quantile

from kvmesh import _router
from kvmesh.client import Client, Finished, Tokens
from kvmesh.v1 import admin_pb2, admin_pb2_grpc, worker_pb2

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = range(1000, 40_000)
"""Ids that prompts are drawn from: none of them ends a text."""
ALLOWED_MS = 2.0
"""What a hand-off may add to a decode step, beside the way of the last chunk."""
COPIED_BYTES = 64 << 20
OTHERS = 4
START_S = 600.0
SAY_ENDPOINT = (
    "import os, signal, sys\n"
    "with open(sys.argv[1] + '.new', 'w') as file: file.write(os.environ['KVMESH_ENDPOINT'])\n"
    "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
    "signal.pause()\n"
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: dict[int, int]
    """Rounds by prompt length."""
    arriving_tokens: int
    arriving_rounds: int


FULL = Plan({512: 15, 2048: 7, 5000: 3}, arriving_tokens=5000, arriving_rounds=2)
QUICK = Plan({256: 3}, arriving_tokens=512, arriving_rounds=1)


@contextlib.contextmanager
def cluster(folder: Path, prefill: int, decode: int, both: int) -> Iterator[tuple[Client, int]]:
    """A cluster that serves; its client and the process that holds all others."""
    said = folder / f"endpoint-{both}"
    with (folder / f"cluster-{both}.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvmesh.cli", "up", "--once"),
                *("--prefill", str(prefill), "--decode", str(decode), "--both", str(both)),
                *("--", sys.executable, "-c", SAY_ENDPOINT, str(said)),
            ],
            cwd=ROOT,
            # A hand-off is what is measured, also where one worker would do it sooner.
            env={**os.environ, "KVMESH_LOCAL_PREFILL": "without-prefill-workers"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + START_S
        while not said.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                text = (folder / f"cluster-{both}.log").read_text(errors="replace")
                raise SystemExit(f"the cluster does not serve:\n{text[-2000:]}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        with Client(said.read_text()) as client:
            yield client, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def prompt(tokens: int) -> list[int]:
    """Ids that nobody has cached."""
    return random.choices(VOCABULARY, k=tokens)


def arrivals(client: Client, ids: list[int], count: int) -> tuple[list[float], int]:
    """When each output token came, seconds; and bytes of KV that were handed off."""
    came: list[float] = []
    moved = 0
    for event in client.generate(
        token_ids=ids, max_tokens=count, temperature=0.0, ignore_end_of_text=True
    ):
        if isinstance(event, Tokens):
            came += [time.perf_counter()] * len(event.ids)
        elif isinstance(event, Finished):
            moved = event.timings.transferred_bytes
    return came, moved


@dataclass(frozen=True)
class Gap:
    """From the first to the second token of a prompt."""

    ms: float
    moved: int
    """Bytes of KV handed off; 0: one worker did all."""


def gap(client: Client, tokens: int) -> Gap:
    """Measures one; its prompt is new."""
    came, moved = arrivals(client, prompt(tokens), 2)
    return Gap(1e3 * (came[1] - came[0]), moved)


def handed_off(client: Client, tokens: int) -> Gap:
    """As `gap`, with a hand-off."""
    found = gap(client, tokens)
    if not found.moved:
        raise SystemExit(f"a prompt of {tokens} tokens was not handed off")
    return found


def chunk_tokens(client: Client) -> int:
    """Tokens of a prefill chunk where nothing else runs: whole blocks."""
    stub = admin_pb2_grpc.AdminStub(client.channel)
    workers = stub.ListWorkers(admin_pb2.ListWorkersRequest(), timeout=10).workers
    prefill = next(w.record for w in workers if w.record.role == worker_pb2.ROLE_PREFILL)
    block = prefill.capabilities.block_tokens
    return int(max(1, prefill.step_model.saturating_chunk // block) * block)


def memory_bytes_per_ms() -> float:
    """Of one thread that copies from one pool to another, as a transfer's reader does."""
    block = 1 << 20
    pools = [_router.KvPool(COPIED_BYTES // block, block, populate=True) for _ in range(2)]
    source, to = (np.frombuffer(pool, dtype=np.uint8) for pool in pools)
    took = []
    for _ in range(9):
        begin = time.perf_counter()
        np.copyto(to, source)
        took.append(time.perf_counter() - begin)
    return COPIED_BYTES / (1e3 * statistics.median(took))


def last_chunk_bytes(tokens: int, chunk: int, moved: int) -> float:
    """Bytes of KV that exist only when the first token does."""
    return moved / tokens * (tokens % chunk or chunk)


@dataclass
class Others:
    """Streams that decode meanwhile."""

    client: Client
    came: list[list[float]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def start(self) -> None:
        for index in range(OTHERS):
            self.came.append([])
            thread = threading.Thread(target=self._run, args=(index,))
            thread.start()
            self.threads.append(thread)
        while any(len(came) < 4 for came in self.came):
            time.sleep(0.05)
            self.check()

    def _run(self, index: int) -> None:
        events = self.client.generate(
            token_ids=prompt(64), max_tokens=2000, temperature=0.0, ignore_end_of_text=True
        )
        try:
            for event in events:
                if isinstance(event, Tokens):
                    self.came[index] += [time.perf_counter()] * len(event.ids)
                if self.stop.is_set():
                    return
        except BaseException as error:
            self.failures.append(error)
        finally:
            events.close()

    def check(self) -> None:
        if self.failures:
            raise self.failures[0]

    def between(self, begin: float, end: float) -> list[float]:
        """Times between two tokens, ms, of all streams in a window."""
        return [
            1e3 * (after - before)
            for came in self.came
            for before, after in itertools.pairwise(came)
            if begin <= before and after <= end
        ]

    def close(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def arriving(
    client: Client, tokens: int, alone_first: bool
) -> tuple[list[float], list[float], int]:
    """Times between tokens of the others: alone, and while a prompt is computed and arrives."""
    others = Others(client)
    others.start()
    try:
        alone: list[float] = []

        def quiet(seconds: float) -> None:
            begin = time.perf_counter()
            time.sleep(seconds)
            alone.extend(others.between(begin, time.perf_counter()))

        if alone_first:
            quiet(10.0)
        begin = time.perf_counter()
        came, moved = arrivals(client, prompt(tokens), 2)
        beside = others.between(begin, came[-1])
        if not alone_first:
            quiet(10.0)
        others.check()
        return alone, beside, moved
    finally:
        others.close()


def measure(quick: bool) -> tuple[list[Figure], dict[str, int]]:
    """Runs part two; its figures, and how many blocks were repeated or kept although busy."""
    plan = QUICK if quick else FULL
    figures: list[Figure] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        split, split_pid = stack.enter_context(cluster(folder, 1, 1, 0))
        both, both_pid = stack.enter_context(cluster(folder, 0, 0, 1))
        for client in (split, both):
            arrivals(client, prompt(64), 4)

        def own() -> list[int]:
            return [*descendants(split_pid), *descendants(both_pid)]

        rows, added, over, repeated, busy = [], [], [], 0, 0
        chunk, bandwidth = chunk_tokens(split), memory_bytes_per_ms()
        for tokens, rounds in plan.rounds.items():
            cases = {
                "split": lambda tokens=tokens: handed_off(split, tokens),
                "both": lambda tokens=tokens: gap(both, tokens),
            }
            blocks = alternate(cases, rounds, own)  # type: ignore[arg-type]
            repeated, busy = repeated + blocks.repeated, busy + blocks.kept_busy
            added.append(blocks.median_difference("split", "both", lambda found: found.ms))
            for case in cases:
                gaps = [found.ms for found in blocks.results[case]]
                rows.append([tokens, case, quantile(gaps, 0.5), quantile(gaps, 0.95), len(gaps)])
            moved = statistics.median(found.moved for found in blocks.results["split"])
            way_ms = last_chunk_bytes(tokens, chunk, int(moved)) / bandwidth
            bound = blocks.median("both", lambda found: found.ms) + ALLOWED_MS + way_ms
            over.append(blocks.median("split", lambda found: found.ms) - bound)
            rows[-2] += [added[-1], way_ms, bound, "yes" if over[-1] <= 0 else "NO"]
            figures += [
                Figure(f"second_token_added_{tokens}_ms", added[-1], "ms", "lower"),
                Figure(f"second_token_bound_{tokens}_ms", bound, "ms", "lower"),
            ]
        head = ["prompt", "cluster", "first to second p50 ms", "p95 ms", "requests", "added ms",
                "last chunk's way ms", "bound of p50 ms", "kept"]  # fmt: skip
        print_table("From first to second token", head, [[*row, *[None] * 4][:9] for row in rows])
        print(
            f"The bound: one decode step (the other cluster's p50), {ALLOWED_MS:g} ms, and the "
            f"last chunk (up to {chunk} tokens) at {bandwidth / 1e6:.1f} GB/s."
        )
        figures.append(Figure("second_token_added_ms", max(added), "ms", "lower"))
        figures.append(Figure("second_token_over_bound_ms", max(over), "ms", "lower"))

        turns = itertools.count()
        cases = {"arriving": lambda: arriving(split, plan.arriving_tokens, next(turns) % 2 == 0)}
        arrived = alternate(cases, plan.arriving_rounds, own)
        runs = arrived.results["arriving"]
        repeated, busy = repeated + arrived.repeated, busy + arrived.kept_busy
        alone = [gap for run in runs for gap in run[0]]
        beside = [gap for run in runs for gap in run[1]]
        table = [
            [name, statistics.fmean(gaps), quantile(gaps, 0.5), quantile(gaps, 0.99), len(gaps)]
            for name, gaps in (("alone", alone), ("arriving", beside))
        ]
        title = f"{OTHERS} streams on decode while {plan.arriving_tokens} tokens arrive"
        print_table(title, ["", "ITL mean ms", "p50 ms", "p99 ms", "gaps"], table)
        arrived_mb = [run[2] // 1_000_000 for run in runs]
        print(
            f"MB handed off: {arrived_mb}; {arrived.repeated} runs were repeated because others "
            f"used the machine, {arrived.kept_busy} kept although they did"
        )
        p50 = quantile(beside, 0.5) / quantile(alone, 0.5)
        p99 = quantile(beside, 0.99) / quantile(alone, 0.99)
        figures.append(Figure("itl_ratio_while_arriving", p50, "ratio", "lower"))
        figures.append(Figure("itl_p99_ratio_while_arriving", p99, "ratio", "lower"))
    return figures, {"blocks_repeated": repeated, "blocks_kept_busy": busy}
