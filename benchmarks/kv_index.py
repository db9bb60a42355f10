"""How fast and how small is the index of cached prefixes?

The workload (index_workload.py) is 2,000 prompts of 512 blocks with tails over 64 workers: 1.07 M
distinct blocks, 1.43 M (worker, block) entries. Through Python, in blocks in turn:

- kvmesh.KvIndex, fed event by event with NumPy arrays, and again 64 events at a time;
- NVIDIA's RadixTree (ai_dynamo_runtime, requirements/bench.txt) where installed, fed event by event
  with the JSON that it takes (it takes no more than one), made before the clock starts.

Every answer is checked. Where benchmarks/peers/index is built (make peers), that program compares
the Rust index with the concurrent one of NVIDIA's crate dynamo-kv-router, in blocks in turn too. A
second table has 1,024 workers and 10 M blocks.

    python benchmarks/kv_index.py [--quick] [--json FILE] [--write FOLDER]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing as mp
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from alternating import Blocks, Figure, alternate, print_table, write_json
from index_workload import Event, Query, Workload

from kvmesh.index import KvIndex, chain_values

try:
    from dynamo.llm import RadixTree, compute_block_hash_for_seq
except ImportError:
    RadixTree = None

DEPTHS = (0, 64, 512)
BATCH = 64
"""Events in a call of `stored_many`."""
PEER = Path(__file__).parent / "peers/index/target/release/kvmesh-peer-index"


class Ours:
    """kvmesh.KvIndex."""

    def __init__(self, workers: int, max_bytes: int = 1 << 30) -> None:
        self._workers, self._max_bytes = workers, max_bytes

    def new(self) -> KvIndex:
        index = KvIndex(max_bytes=self._max_bytes)
        for _ in range(self._workers):
            index.add_worker(16)
        return index

    def event(self, event: Event) -> Event:
        return event

    def apply(self, index: KvIndex, events: Sequence[Event]) -> None:
        stored = index.stored
        for event in events:
            stored(event.worker, event.chain, parent=event.parent)

    def query(self, query: Query) -> Any:
        return query.chain

    def lookup(self, index: KvIndex) -> Callable[[Any], Any]:
        # One for each reader.
        out = np.empty(self._workers, dtype=np.uint32)
        return lambda query: index.lookup(query, out)

    def found(self, answer: Any) -> dict[int, int]:
        return {worker: tokens // 16 for worker, tokens in enumerate(answer.tolist()) if tokens}


class Batched(Ours):
    """kvmesh.KvIndex, many events in a call."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._ready: list[tuple[Any, Any, Any, Any]] = []

    def prepare(self, events: Sequence[Event]) -> None:
        """Puts events together; as an engine's events come, before the clock starts."""
        for first in range(0, len(events), BATCH):
            some = events[first : first + BATCH]
            workers = np.array([event.worker for event in some], dtype=np.uint32)
            parents = np.array([event.parent or 0 for event in some], dtype=np.uint64)
            ends = np.cumsum([0] + [len(event.chain) for event in some], dtype=np.uint64)
            chain = np.concatenate([event.chain for event in some])
            self._ready.append((workers, parents, ends, chain))

    def rate(self, blocks: int) -> float:
        """Blocks a second."""
        index = self.new()
        begin = time.perf_counter()
        for batch in self._ready:
            index.stored_many(*batch)
        rate = blocks / (time.perf_counter() - begin)
        if index.stats().entries != blocks:
            raise SystemExit("batched events are lost")
        return rate


class Dynamo:
    """RadixTree of ai_dynamo_runtime."""

    def new(self) -> Any:
        return RadixTree()

    def event(self, event: Event) -> tuple[int, bytes]:
        pairs = zip(event.chain.tolist(), event.local.tolist(), strict=True)
        blocks = [{"block_hash": chain, "tokens_hash": local} for chain, local in pairs]
        stored = {"parent_hash": event.parent, "blocks": blocks}
        made = {"event_id": event.number, "data": {"stored": stored}}
        return event.worker, json.dumps(made).encode()

    def apply(self, tree: Any, events: Sequence[tuple[int, bytes]]) -> None:
        for worker, event in events:
            tree.apply_event(worker, event)

    def query(self, query: Query) -> list[int]:
        return query.local.tolist()

    def lookup(self, tree: Any) -> Callable[[Any], Any]:
        return lambda query: tree.find_matches(query)

    def found(self, answer: Any) -> dict[int, int]:
        return {
            worker if isinstance(worker, int) else worker[0]: depth
            for worker, depth in answer.scores.items()
        }


@dataclass(frozen=True)
class Block:
    """What one block measured."""

    blocks_per_s: float
    p50_us: dict[int, float]
    p99_us: dict[int, float]
    lookups_per_s: dict[int, float]


def measure(side: Any, events: Sequence[Any], blocks: int, queries: dict[int, list[Any]]) -> Block:
    """Builds an index, looks prompts up, and does both at once."""
    index = side.new()
    begin = time.perf_counter()
    side.apply(index, events)
    rate = blocks / (time.perf_counter() - begin)
    lookup = side.lookup(index)
    p50, p99 = {}, {}
    for depth, pairs in queries.items():
        for query, holders in pairs:
            found = side.found(lookup(query))
            if found != holders:
                raise SystemExit(f"{type(side).__name__} is wrong at depth {depth}: {found}")
        times = []
        for query, _ in pairs:
            start = time.perf_counter_ns()
            lookup(query)
            times.append(time.perf_counter_ns() - start)
        times.sort()
        p50[depth] = times[len(times) // 2] / 1e3
        p99[depth] = times[len(times) * 99 // 100] / 1e3
    prompts = [query for pairs in queries.values() for query, _ in pairs]
    del index, lookup
    # An index that grows: half of the events are there, the others come meanwhile.
    index, half, rest = side.new(), len(events) // 2, len(events) // 4
    side.apply(index, events[:half])
    beside = {}
    for threads in (1, 2):
        new, half = events[half : half + rest], half + rest
        beside[threads] = lookups_beside(side, index, new, prompts, threads)
    return Block(rate, p50, p99, beside)


def lookups_beside(
    side: Any, index: Any, events: Sequence[Any], prompts: Sequence[Any], threads: int
) -> float:
    """Look-ups a second by so many threads while events are applied."""
    stop = threading.Event()
    counts = [0] * threads

    def read(thread: int) -> None:
        lookup = side.lookup(index)
        while not stop.is_set():
            for prompt in prompts[thread :: 16 * threads]:
                lookup(prompt)
                counts[thread] += 1

    readers = [threading.Thread(target=read, args=(thread,)) for thread in range(threads)]
    begin = time.perf_counter()
    for reader in readers:
        reader.start()
    side.apply(index, events)
    stop.set()
    seconds = time.perf_counter() - begin
    for reader in readers:
        reader.join()
    return sum(counts) / seconds


def resident_bytes() -> int:
    """Memory of this process (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def grown(side: Any, events: Sequence[Any], queue: Any) -> None:
    """Bytes that a process grows by when it builds an index; runs in a process of its own."""
    # What the parent has freed would hide what is taken.
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes()
    index = side.new()
    side.apply(index, events)
    queue.put(resident_bytes() - before)


def footprint(side: Any, events: Sequence[Any]) -> int:
    """Bytes of memory that an index takes, as the kernel counts."""
    context = mp.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=grown, args=(side, events, queue))
    child.start()
    size = queue.get()
    child.join()
    return size


def hash_rate(workload: Workload, ours: bool) -> float:
    """Token ids hashed a second, 16 to a block, prompts of 8,192."""
    prompts = workload.tokens(64, 8192)
    ready = prompts if ours else [prompt.tolist() for prompt in prompts]
    rounds = 20 if ours else 2
    begin = time.perf_counter()
    for _ in range(rounds):
        for prompt in ready:
            if ours:
                chain_values(7, prompt)
            else:
                compute_block_hash_for_seq(prompt, 16)
    return rounds * 64 * 8192 / (time.perf_counter() - begin)


def compare_python(workload: Workload, rounds: int, count: int) -> list[Figure]:
    """The first table."""
    events = workload.events()
    queries = {depth: workload.queries(depth, count) for depth in DEPTHS}
    sides: dict[str, Any] = {"kvmesh": Ours(workload.workers)}
    if RadixTree is not None:
        sides["dynamo"] = Dynamo()
    ready = {name: [side.event(event) for event in events] for name, side in sides.items()}
    prompts = {
        name: {
            depth: [(side.query(query), query.holders) for query in some]
            for depth, some in queries.items()
        }
        for name, side in sides.items()
    }

    def block(name: str) -> Callable[[], Block]:
        return lambda: measure(sides[name], ready[name], workload.entries, prompts[name])

    results = alternate({name: block(name) for name in sides}, rounds, list)
    batched = Batched(workload.workers)
    batched.prepare(events)
    many = statistics.median(batched.rate(workload.entries) for _ in range(rounds))
    sizes = {name: footprint(side, ready[name]) for name, side in sides.items()}
    index = sides["kvmesh"].new()
    sides["kvmesh"].apply(index, events)
    stats = index.stats()
    gone = workload.removals()
    begin = time.perf_counter()
    for worker, chain in gone:
        index.removed(worker, chain)
    removed = sum(len(chain) for _, chain in gone) / (time.perf_counter() - begin)
    del index
    hashing = {name: hash_rate(workload, name == "kvmesh") for name in sides}
    apart = {
        f"M blocks/s applied, {BATCH} events a call": many / 1e6,
        "M blocks/s removed": removed / 1e6,
        "B an entry, counted": stats.bytes / stats.entries,
    }
    print_python(workload, results, sizes, hashing, apart)
    figures = [
        Figure("bytes_per_entry", stats.bytes / stats.entries, "B", "lower"),
        Figure("hash_mtokens_per_s", hashing["kvmesh"] / 1e6, "M/s", "higher"),
        Figure("apply_mblocks_per_s", results.median("kvmesh", rate_of) / 1e6, "M/s", "higher"),
        Figure("lookup_512_p50_us", results.median("kvmesh", p50_at(512)), "us", "lower"),
        Figure("lookup_512_p99_us", results.median("kvmesh", p99_at(512)), "us", "lower"),
    ]
    if "dynamo" in sides:
        apply = results.median("kvmesh", rate_of) / results.median("dynamo", rate_of)
        lookup = results.median("dynamo", p50_at(512)) / results.median("kvmesh", p50_at(512))
        figures.append(Figure("apply_over_dynamo", apply, "x", "higher"))
        batches = many / results.median("dynamo", rate_of)
        figures.append(Figure("apply_batched_over_dynamo", batches, "x", "higher"))
        figures.append(Figure("lookup_512_speedup_over_dynamo", lookup, "x", "higher"))
    return figures


def rate_of(block: Block) -> float:
    return block.blocks_per_s


def p50_at(depth: int) -> Callable[[Block], float]:
    return lambda block: block.p50_us[depth]


def p99_at(depth: int) -> Callable[[Block], float]:
    return lambda block: block.p99_us[depth]


def beside_at(threads: int) -> Callable[[Block], float]:
    return lambda block: block.lookups_per_s[threads]


def print_python(
    workload: Workload,
    results: Blocks[Block],
    sizes: dict[str, int],
    hashing: dict[str, float],
    apart: dict[str, float],
) -> None:
    names = list(results.results)

    def row(label: str, of: Callable[[str], float | None]) -> list[object]:
        values = [of(name) for name in names]
        ratio = None
        if len(values) == 2 and values[0] and values[1]:
            ratio = values[0] / values[1]
        return [label, *values, ratio]

    rows = [row("M blocks/s applied", lambda n: results.median(n, rate_of) / 1e6)]
    for depth in DEPTHS:
        for label, of in (("p50", p50_at(depth)), ("p99", p99_at(depth))):
            text = f"look-up of 512, hit {depth}, {label}, us"
            rows.append(row(text, lambda n, of=of: results.median(n, of)))
    for threads in (1, 2):
        text = f"k look-ups/s, {threads} threads beside events"
        of = beside_at(threads)
        rows.append(row(text, lambda n, of=of: results.median(n, of) / 1e3))
    rows.append(row("B an entry, resident", lambda n: sizes[n] / workload.entries))
    rows.append(row("M token ids/s hashed", lambda n: hashing[n] / 1e6))
    rows += [[label, value, *[None] * len(names)] for label, value in apart.items()]
    print_table(
        f"Through Python: {workload.workers} workers, {workload.blocks:,} blocks, "
        f"{workload.entries:,} entries",
        ["", *names, "ratio"],
        rows,
    )
    if "dynamo" not in results.results:
        print("ai_dynamo_runtime is not installed (requirements/bench.txt): no comparison")
    busy = f"repeated: {results.repeated}, kept: {results.kept_busy}"
    print(f"blocks during which others used the machine: {busy}")


def large(workers: int, prefixes: int, count: int) -> list[Figure]:
    """The second table: many workers and blocks."""
    workload = Workload(prefixes=prefixes, workers=workers)
    events = workload.events()
    side = Ours(workload.workers)
    prompts = {
        depth: [(query.chain, query.holders) for query in workload.queries(depth, count)]
        for depth in DEPTHS
    }
    block = measure(side, events, workload.entries, prompts)
    index = side.new()
    side.apply(index, events)
    stats = index.stats()
    rows: list[list[object]] = [["M blocks/s applied", block.blocks_per_s / 1e6]]
    for depth in DEPTHS:
        rows.append([f"look-up of 512, hit {depth}, p50, us", block.p50_us[depth]])
        rows.append([f"look-up of 512, hit {depth}, p99, us", block.p99_us[depth]])
    for threads, rate in block.lookups_per_s.items():
        rows.append([f"k look-ups/s, {threads} threads beside events", rate / 1e3])
    rows.append(["B an entry, counted", stats.bytes / stats.entries])
    rows.append(["MiB counted", stats.bytes / 2**20])
    rows.append(["blocks evicted", stats.evicted])
    print_table(
        f"Through Python: {workers:,} workers, {workload.blocks:,} blocks, "
        f"{workload.entries:,} entries",
        ["", "kvmesh"],
        rows,
    )
    return [
        Figure("bytes_per_entry_1024_workers", stats.bytes / stats.entries, "B", "lower"),
        Figure("lookup_512_p50_us_1024_workers", block.p50_us[512], "us", "lower"),
    ]


def compare_crates(workload: Workload, rounds: int, count: int, title: str) -> list[dict[str, Any]]:
    """What the program in benchmarks/peers/index says; one dictionary a block."""
    with tempfile.TemporaryDirectory() as folder:
        events, queries = Path(folder) / "events", Path(folder) / "queries"
        write_events(workload, events)
        write_queries(workload, queries, count)
        command = [PEER, events, queries, str(workload.workers), str(rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    blocks = [json.loads(line) for line in done.stdout.splitlines()]
    keys = [key for key in blocks[0] if key not in ("side", "round", "resident_bytes")]
    rows: list[list[object]] = []
    for key in keys:
        ours, theirs = (median_of(blocks, side, key) for side in ("ours", "dynamo"))
        better = theirs / ours if key.endswith("_us") else ours / theirs
        rows.append([key.replace("_", " "), ours, theirs, better])
    head = ["", "kvmesh-kv-index", "dynamo-kv-router", "times better"]
    print_table(f"Crate against crate: {title}", head, rows)
    return blocks


def median_of(blocks: Sequence[dict[str, Any]], side: str, key: str) -> float:
    return statistics.median(block[key] for block in blocks if block["side"] == side)


def crate_figures(blocks: Sequence[dict[str, Any]], of: str = "") -> list[Figure]:
    """Ratios of the medians; for look-ups that at depth 512, and the worst of all rows."""

    def ratio(key: str) -> float:
        ours, theirs = (median_of(blocks, side, key) for side in ("ours", "dynamo"))
        return theirs / ours if key.endswith("_us") else ours / theirs

    keys = [key for key in blocks[0] if key not in ("side", "round", "resident_bytes")]
    return [
        Figure(f"crate_apply_over_dynamo{of}", ratio("apply_blocks_per_s"), "x", "higher"),
        Figure(f"crate_lookup_over_dynamo{of}", ratio("lookup_512_p50_us"), "x", "higher"),
        Figure(f"crate_worst_row_over_dynamo{of}", min(map(ratio, keys)), "x", "higher"),
    ]


def write_events(workload: Workload, path: Path) -> None:
    """The format of benchmarks/peers/index/src/workload.rs."""
    events = workload.events()
    parts = [np.array([len(events)], dtype=np.uint64)]
    for event in events:
        has_parent, parent = event.parent is not None, event.parent or 0
        head = [event.worker, has_parent, parent, len(event.chain)]
        parts += [np.array(head, dtype=np.uint64), event.chain, event.local]
    np.concatenate(parts).tofile(path)


def write_queries(workload: Workload, path: Path, count: int) -> None:
    """The format of benchmarks/peers/index/src/workload.rs."""
    queries = [(depth, query) for depth in DEPTHS for query in workload.queries(depth, count)]
    parts = [np.array([len(queries), 512], dtype=np.uint64)]
    for depth, query in queries:
        parts += [np.array([depth], dtype=np.uint64), query.chain, query.local]
    np.concatenate(parts).tofile(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; no evidence")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write the workload there, and measure nothing"
    )
    given = parser.parse_args()
    sys.setswitchinterval(0.0005)
    workload = Workload(prefixes=200) if given.quick else Workload()
    rounds, count = (1, 500) if given.quick else (5, 2000)
    if given.write:
        given.write.mkdir(parents=True, exist_ok=True)
        write_events(workload, given.write / "events")
        write_queries(workload, given.write / "queries", count)
        return
    figures = compare_python(workload, rounds, count)
    if PEER.exists():
        title = f"{workload.workers} workers, {workload.blocks:,} blocks"
        figures += crate_figures(compare_crates(workload, rounds, count, title))
    else:
        print("\nbenchmarks/peers/index is not built (make peers): no comparison of crates")
    if not given.quick:
        figures += large(1024, 19_000, count)
        if PEER.exists():
            workload = Workload(prefixes=19_000, workers=1024)
            title = f"1,024 workers, {workload.blocks:,} blocks"
            large_blocks = compare_crates(workload, rounds, count, title)
            figures += crate_figures(large_blocks, "_1024_workers")
    print()
    for figure in figures:
        print(f"{figure.name}: {figure.value:.3g} {figure.unit}")
    if given.quick:
        print("--quick: no evidence")
    if given.json:
        write_json(given.json, figures, quick=given.quick)


if __name__ == "__main__":
    main()
