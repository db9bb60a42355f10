"""`kvmesh up`: a whole cluster on this machine, until Ctrl-C.

Starts etcd, a router, and prefill and decode workers as child processes, all on
loopback. They die with this command, however it ends.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvmesh.cli import etcd
from kvmesh.cli.children import Child, Children, Interrupted
from kvmesh.cli.connect import DEFAULT_ENDPOINT
from kvmesh.cli.errors import CommandError

_EXAMPLES = """\
examples:
  kvmesh up
  kvmesh up --engine sim --prefill 2 --decode 2
  kvmesh up --both 1
  kvmesh up --once -- python my_script.py     # runs it with KVMESH_ENDPOINT set
"""

_START_TIMEOUT_S = 600.0


@dataclass(slots=True)
class _Cluster:
    etcd: str
    router: Child
    endpoint: str


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "up",
        help="start a whole cluster on this machine",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="model [smollm2-135m]")
    parser.add_argument("--engine", default="torch", choices=("torch", "sim"), help="[torch]")
    parser.add_argument("--prefill", type=int, help="prefill workers [1]")
    parser.add_argument("--decode", type=int, help="decode workers [1]")
    parser.add_argument("--both", type=int, help="workers that do both [0]")
    parser.add_argument(
        "--listen", help=f"the router's address [{DEFAULT_ENDPOINT}; with --once a free port]"
    )
    parser.add_argument("--etcd", help="a running etcd, host:port; else one is started")
    parser.add_argument("--cluster", default="default", help="name of the cluster [default]")
    parser.add_argument("--state", help="folder for data and logs [a temporary one]")
    parser.add_argument("--kv-pool-tokens", default="16384", help="KV pool a worker [16384]")
    parser.add_argument(
        "--worker-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further setting of all workers; repeatable",
    )
    parser.add_argument("--ask", metavar="TEXT", help="ask this first, and print the answer")
    parser.add_argument("--max-tokens", type=int, default=64, help="for --ask [64]")
    parser.add_argument(
        "--once", action="store_true", help="end after --ask, or after COMMAND with its status"
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="with --once, after --")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs a cluster. Returns COMMAND's status, or 0."""
    if options.command and not options.once:
        raise CommandError("COMMAND needs --once: kvmesh up --once -- COMMAND", status=2)
    if options.once and not (options.command or options.ask):
        raise CommandError("--once needs COMMAND (after --) or --ask TEXT", status=2)
    model = _fetch_model(options)
    temporary = None if options.state else tempfile.mkdtemp(prefix="kvmesh-")
    state = Path(options.state or temporary or "")
    logs = state / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    failed = False
    try:
        with Children(logs, _say) as children:
            try:
                return _run_cluster(children, options, model, state)
            except Interrupted as stop:
                _say("up", f"{stop}: stopping")
                return 0 if not options.command else 128 + stop.number
    except CommandError:
        failed = True
        raise
    finally:
        if temporary and failed:
            _say("up", f"logs are kept in {logs}")
        elif temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _run_cluster(children: Children, options: argparse.Namespace, model: str, state: Path) -> int:
    cluster = _start(children, options, model, state)
    _say("up", f"serving on {cluster.endpoint}; logs in {state / 'logs'}")
    if options.ask:
        _ask(children, cluster, options)
    if options.command:
        return _run_command(children, options.command, cluster)
    if options.once:
        return 0
    print(
        f"\nask more, in another terminal:  kvmesh chat --endpoint {cluster.endpoint}\n"
        "Ctrl-C ends the cluster.",
        flush=True,
    )
    while True:
        children.handle(None)
        children.check_alive()


def _start(children: Children, options: argparse.Namespace, model: str, state: Path) -> _Cluster:
    python = sys.executable
    address = options.etcd
    if not address:
        _say("up", "starting etcd")
        address = etcd.start(children, state / "etcd")
    listen = options.listen or ("127.0.0.1:0" if options.once else DEFAULT_ENDPOINT)
    router = children.start(
        "router",
        [python, "-m", "kvmesh", "router", "--listen", listen, "--etcd", address,
         "--cluster", options.cluster],
    )  # fmt: skip
    workers = []
    for role, count in _roles(options):
        for number in range(1, count + 1):
            command = [
                python, "-m", "kvmesh", "worker",
                "--role", role,
                "--worker-id", f"{role}-{number}",
                "--engine", options.engine,
                "--model", model,
                "--served-name", options.model if "/" not in options.model else "",
                "--etcd", address,
                "--cluster", options.cluster,
                "--kv-pool-tokens", options.kv_pool_tokens,
            ]  # fmt: skip
            for pair in options.worker_arg:
                key, separator, value = pair.partition("=")
                if not separator:
                    raise CommandError(f"--worker-arg is {pair!r}; allowed is KEY=VALUE", status=2)
                command += ["--" + key.replace("_", "-"), value]
            workers.append(children.start(f"{role}-{number}", command))

    def serving(child: Child) -> bool:
        return any(": serving " in line for line in child.lines)

    children.wait_until(lambda: serving(router), _START_TIMEOUT_S, "starting the router")
    children.wait_until(
        lambda: all(map(serving, workers)), _START_TIMEOUT_S, "starting the workers"
    )
    endpoint = next(line for line in router.lines if ": serving " in line).rpartition(" on ")[2]
    cluster = _Cluster(address, router, endpoint.split()[0])
    _wait_ready(children, cluster.endpoint, len(workers))
    return cluster


def _roles(options: argparse.Namespace) -> list[tuple[str, int]]:
    prefill, decode, both = options.prefill, options.decode, options.both
    if both is None:
        prefill = 1 if prefill is None else prefill
        decode = 1 if decode is None else decode
    counts = [("prefill", prefill or 0), ("decode", decode or 0), ("both", both or 0)]
    if any(count < 0 for _, count in counts):
        raise CommandError("--prefill, --decode and --both count workers: 0 or more", status=2)
    if not (both or (decode and decode > 0)):
        raise CommandError("nobody would decode: --decode or --both is at least 1", status=2)
    return counts


def _wait_ready(children: Children, endpoint: str, workers: int) -> None:
    """Waits until the router has a live session with every worker."""
    import grpc

    from kvmesh.v1 import admin_pb2 as wire
    from kvmesh.v1 import admin_pb2_grpc as rpc

    with grpc.insecure_channel(endpoint) as channel:
        stub = rpc.AdminStub(channel)

        def ready() -> bool:
            request = wire.ListWorkersRequest()
            answer = stub.ListWorkers(request, timeout=10, wait_for_ready=True)
            live = [w for w in answer.workers if w.state == wire.SESSION_STATE_LIVE]
            return len(live) >= workers

        for _ in range(600):
            children.check_alive()
            if ready():
                return
            # News of a child or a signal; else the next question.
            children.handle(0.05)
    raise CommandError("the router has no session with every worker; see the logs")


def _ask(children: Children, cluster: _Cluster, options: argparse.Namespace) -> None:
    print(f"\n> {options.ask}", flush=True)
    command = [
        sys.executable, "-m", "kvmesh", "generate", "--chat", options.ask,
        "--max-tokens", str(options.max_tokens), "--temperature", "0",
    ]  # fmt: skip
    status = _run_command(children, command, cluster)
    if status != 0:
        raise CommandError("the question was not answered", status=status)


def _run_command(children: Children, command: list[str], cluster: _Cluster) -> int:
    program = shutil.which(command[0])
    if program is None:
        raise CommandError(f"{command[0]}: no such command", status=127)
    environment = {
        **os.environ,
        "KVMESH_ENDPOINT": cluster.endpoint,
        "KVMESH_ETCD": cluster.etcd,
    }
    child = children.start(
        "command", [program, *command[1:]], env=environment, announces=False, foreground=True
    )
    while child.process.returncode is None:
        children.handle(None)
        if child.process.returncode is None:
            children.check_alive()
    children.forget(child)
    status = child.process.returncode
    return status if status >= 0 else 128 - status


def _fetch_model(options: argparse.Namespace) -> str:
    """The model's folder; fetched in a process of its own, with progress."""
    if options.engine == "sim":
        return str(options.model)
    if Path(options.model).is_dir():
        return str(Path(options.model).resolve())
    fetched = subprocess.run(
        [sys.executable, "-m", "kvmesh", "models", "pull", options.model],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if fetched.returncode != 0:
        raise CommandError(f"model {options.model} could not be fetched")
    return fetched.stdout.strip().splitlines()[-1]


def _say(_source: str, line: str) -> None:
    print(line if _source != "up" else f"kvmesh: {line}", file=sys.stderr, flush=True)
