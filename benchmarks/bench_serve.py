"""Does a load client that is not ours see what ours sees?

vLLM's own, `vllm bench serve`, asks a router for completions over OpenAI's HTTP: token ids in,
server-sent events out, a connection a request. The testkit's asks over gRPC. Both replay the same
requests of the Azure trace of conversations at their times, in turn, each on a cluster of its own:
etcd, a router, sim workers as in mixed_trace.py. Prefixes are made up as in the simulator
(docs/simulator.md); each client draws its own tokens for them, as many.

    python benchmarks/bench_serve.py [--quick] [--json FILE] [--traces DIR] [--cluster 2P2D|4]
        [--rate R] [--seconds S] [--rounds N]

Needs vLLM (docs/vllm.md: the environment that make test-vllm sets up); without it the status is 77.

TTFT is from sending a request to its first token, time a token (TPOT) the mean of a request. `late`
is how late the client sent: what it adds by itself. A request that failed, or whose answer has
another length than the trace says, makes the status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alternating import (
    BUSY_LIMIT,
    Figure,
    MachineWatch,
    is_evidence,
    print_figures,
    print_table,
    say,
    write_json,
)
from mixed_trace import BLOCK_TOKENS, OURS, SPEED, TRACES, go_first, roles, serving
from run_all import INPUT_MISSING
from streams import build
from trace_files import add_traces, need_traces
from trace_rows import Arrival, at_rate, azure, json_lines, with_prefixes

from kvmesh.engine.sim.settings import SimSettings
from kvmesh.engine.sim.vocabulary import tokenizer_files
from kvmesh.engine.vllm import border

TRACE = TRACES["interactive"]
OWN, VLLM = "testkit, gRPC", "vllm bench serve, HTTP"
PARTS = ("p50", "p90", "p99")
GRACE_S = 60.0
# What the command `vllm bench serve` runs: the command itself looks for a distribution `vllm`,
# which the build for CPUs is not.
COMMAND = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Load:
    """What both clients bring."""

    arrivals: Sequence[Arrival]
    workers: Sequence[str]


@dataclass(frozen=True)
class Run:
    """What one client saw of one cluster."""

    client: str
    requests: int
    wrong: int
    """Requests that failed, or were answered with another number of tokens."""
    ttft_ms: Mapping[str, float]
    tpot_ms: Mapping[str, float]
    late_ms: float
    """At most."""
    error: str
    others: float = 0.0
    """Share of the machine that others used."""

    def row(self) -> list[object]:
        """Of the table."""
        times = (times[part] for times in (self.ttft_ms, self.tpot_ms) for part in PARTS)
        return [
            *(self.client, self.requests, self.wrong, *times, self.late_ms),
            f"{self.others:.0%}",
        ]


HEAD = (
    "client", "requests", "wrong", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "late",
    "others",
)  # fmt: skip


def trace_lines(arrivals: Sequence[Arrival]) -> str:
    """A file of arrivals as `--dataset-name timed_trace` reads it. It makes tokens for hashed
    blocks alone: what a prompt has beyond them is one more, of the request's own."""
    lines = []
    for number, one in enumerate(arrivals):
        blocks = one.blocks[: one.prompt // BLOCK_TOKENS]
        rest = one.prompt - len(blocks) * BLOCK_TOKENS
        # Names of blocks have no sign.
        own = [-(number * 1_000_000 + at) - 1 for at in range(-(-rest // BLOCK_TOKENS))]
        line = {
            "timestamp": one.at_ms / 1e3,
            "input_length": one.prompt,
            "output_length": one.output,
            "hash_ids": [*blocks, *own],
        }
        lines.append(json.dumps(line))
    return "\n".join(lines) + "\n"


def by_testkit(testkit: Path, endpoint: str, load: Load, folder: Path) -> Run:
    """Our own load client."""
    file = folder / "arrivals.jsonl"
    file.write_text(json_lines(load.arrivals))
    command = [
        *(str(testkit), "replay-load", "--target", endpoint, "--arrivals", str(file)),
        *("--block-tokens", str(BLOCK_TOKENS), "--grace", str(GRACE_S)),
    ]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=go_first
    )
    told = json.loads(done.stdout)
    # All are of one class.
    (seen,) = told["classes"]
    return Run(
        OWN,
        seen["requests"],
        seen["failed"],
        seen["first_token_ms"],
        seen["itl_ms"],
        told["late_ms"]["max"],
        told["first_error"],
    )


def by_vllm(endpoint: str, load: Load, folder: Path) -> Run:
    """vLLM's."""
    file, model, result = folder / "trace.jsonl", folder / "model", folder / "result.json"
    file.write_text(trace_lines(load.arrivals))
    model.mkdir()
    for name, content in tokenizer_files(SimSettings().vocabulary).items():
        (model / name).write_bytes(content)
    command = [
        *(sys.executable, "-c", COMMAND, "--backend", "openai"),
        *("--base-url", f"http://{endpoint}", "--endpoint", "/v1/completions"),
        *("--model", "sim", "--tokenizer", str(model)),
        *("--dataset-name", "timed_trace", "--dataset-path", str(file)),
        *("--timed-trace-chunk-hash-size", str(BLOCK_TOKENS)),
        *("--num-prompts", str(len(load.arrivals)), "--temperature", "0"),
        # Its first request comes as the trace says, and not before that once more.
        *("--ready-check-timeout-sec", "0", "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--metric-percentiles", ",".join(part[1:] for part in PARTS)),
        *("--save-result", "--save-detailed"),
        *("--result-dir", str(folder), "--result-filename", result.name),
    ]
    environment = {
        **os.environ,
        # Equal blocks are equal tokens by hash().
        "PYTHONHASHSEED": "0",
        "NO_PROXY": "*",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    # Its own table is its affair; where it breaks, it is told.
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, preexec_fn=go_first
    )
    if done.returncode or not result.exists():
        raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return read(json.loads(result.read_text()), load.arrivals)


def read(told: Mapping[str, Any], arrivals: Sequence[Arrival]) -> Run:
    """What vLLM's client writes."""
    whole = [
        not error and (prompt, output) == (one.prompt, one.output)
        for error, prompt, output, one in zip(
            told["errors"], told["input_lens"], told["output_lens"], arrivals, strict=True
        )
    ]
    sent = told["start_times"]
    late = (
        1e3 * (at - sent[0]) - (one.at_ms - arrivals[0].at_ms)
        for at, one in zip(sent, arrivals, strict=True)
    )
    times = [{part: told[f"{part}_{what}_ms"] for part in PARTS} for what in ("ttft", "tpot")]
    return Run(
        VLLM,
        len(whole),
        len(whole) - sum(whole),
        *times,
        late_ms=max(late),
        error=next((error for error in told["errors"] if error), ""),
    )


def bring(client: Callable[[str, Load, Path], Run], load: Load) -> Run:
    """One client on a cluster of its own."""
    watch = MachineWatch(())
    with serving(OURS, load.workers) as cluster, tempfile.TemporaryDirectory() as folder:
        run = client(cluster.endpoints[0], load, Path(folder))
        cluster.assert_alive()
    run = Run(**{**vars(run), "others": watch.share_of_others()})
    say(f"{run.client}: {run.requests} requests, {run.wrong} wrong {run.error}")
    return run


def figures_of(runs: Sequence[Run]) -> list[Figure]:
    """Theirs over ours, means over the rounds."""
    found = []
    for name, of in (("ttft", lambda run: run.ttft_ms), ("tpot", lambda run: run.tpot_ms)):
        for part in ("p50", "p90"):
            theirs, ours = (
                sum(of(run)[part] for run in runs if run.client == client) for client in (VLLM, OWN)
            )
            if ours:
                name_of = f"vllm_bench_{name}_{part}_over_testkit"
                found.append(Figure(name_of, theirs / ours, "ratio", "lower"))
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round; no evidence")
    parser.add_argument("--json", type=Path, help="write figures and runs here")
    add_traces(parser)
    parser.add_argument("--cluster", default="2P2D", help="workers: as 2P2D, or 4 for both")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--seconds", type=float, help="of arrivals (default 60, quick 8)")
    parser.add_argument("--rounds", type=int, help="of each client (default 3, quick 1)")
    parser.add_argument("--testkit", type=Path, help="binary; default: built from here")
    return parser.parse_args(arguments)


def main() -> int:
    """Runs it; the exit status."""
    args = parse()
    need_traces(args.traces, [TRACE])
    try:
        version = border.installed_version()
    except border.VllmError as error:
        print(f"bench_serve needs vLLM: {error}; make test-vllm sets it up", file=sys.stderr)
        return INPUT_MISSING
    seconds = args.seconds or (8.0 if args.quick else 60.0)
    rounds = args.rounds or (1 if args.quick else 3)
    testkit = (args.testkit or build("kvmesh-testkit")[0]).resolve()
    rows = azure((args.traces / TRACE).read_text(encoding="utf-8"))
    arrivals = at_rate(
        with_prefixes(rows, BLOCK_TOKENS, TRACE), args.rate, round(args.rate * seconds)
    )
    load = Load(arrivals, roles(args.cluster))
    clients: list[Callable[[str, Load, Path], Run]] = [
        lambda endpoint, load, folder: by_testkit(testkit, endpoint, load, folder),
        by_vllm,
    ]
    runs = []
    for number in range(rounds):
        for client in clients if number % 2 == 0 else reversed(clients):
            runs.append(bring(client, load))
    title = (
        f"vLLM {version}; {args.cluster} sim workers at {SPEED:g} of an H100's speed, "
        f"{args.rate:g} requests/s for {seconds:g} s; times in ms"
    )
    print_table(title, HEAD, [run.row() for run in runs])
    figures = figures_of(runs)
    print_figures(figures)
    busy = max(run.others for run in runs) > BUSY_LIMIT
    evidence = is_evidence(quick=args.quick, busy=busy)
    if args.json:
        when = time.strftime("%Y-%m-%d")
        write_json(
            args.json, figures, title=title, when=when, evidence=evidence,
            runs=[vars(run) for run in runs],
        )  # fmt: skip
    return 1 if any(run.wrong for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
