"""`kvmesh up`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kvmesh.cli.children import ChildDiedError, tethered
from kvmesh.cli.client import DEFAULT_ENDPOINT, explain, print_stream, timings_line
from kvmesh.cli.cluster import Cluster, Plan, running
from kvmesh.cli.settings import Setting, UsageError, add_settings, config_file, merged

_EPILOG = """\
Starts etcd, a router, and prefill and decode workers as children of this process
and waits until they serve. Ctrl-C ends them all; so does the end of this process,
whatever its cause.

The sections [router] and [worker] of a file (--config), and KVMESH_* variables that are
no setting of `up`, hold for its router and its workers. What `up` has itself is its own
alone, also as a variable: KVMESH_THREADS are the threads of each worker and no router's,
KVMESH_LISTEN is the router's address and no worker's. It decides, whatever the file
says: listen, etcd, cluster and insecure of them all, and of workers role, engine, model,
worker_id, grace and transfer_listen.

With `-- COMMAND` a part that ends under it is told at once; without its router the
command is ended, too, and the status is 1.

examples:
  kvmesh up                               until Ctrl-C; then, elsewhere: kvmesh chat
  kvmesh up --engine sim                  no model: tokens that only look like text
  kvmesh up --ask "Who are you?" --once   one answer
  kvmesh up --once -- pytest tests        with KVMESH_ENDPOINT set; its exit status
"""

SETTINGS = (
    Setting("model", "model that the workers serve", default=Plan.model),
    Setting("engine", "what computes: torch or sim", default="torch"),
    Setting("prefill", "prefill workers", metavar="N", default="1"),
    Setting("decode", "decode workers", metavar="N", default="1"),
    Setting("both", "workers for both stages", metavar="N", default="0"),
    Setting(
        "listen",
        "address of the router; a port that is taken is replaced",
        metavar="HOST:PORT",
        default=f"{DEFAULT_ENDPOINT}, with --once a free port",
    ),
    # Not from KVMESH_ETCD: a COMMAND of `up` that starts a cluster means its own.
    Setting("etcd", "endpoints of a running etcd instead of one of our own", flag_only=True),
    Setting("etcd_port", "port of our own etcd", default="2379, with --once a free port"),
    Setting("cluster", "name of the cluster", default="default"),
    Setting("data", "folder for etcd's data and the logs; as shipped it goes at the end"),
    Setting("kv_pool_tokens", "size of each worker's KV pool", metavar="N"),
    Setting("threads", "threads that compute, in each worker", metavar="N"),
    Setting("insecure", "allow plain text on an address that is not loopback", is_switch=True),
    Setting("ready_timeout_s", "give up where it takes longer to start", default="600"),
)


_SIGNAL_S = 0.5
"""Longest that Ctrl-C is not seen."""

_NOT_WITH_UP = (Setting("api_keys", ""), Setting("tls_cert", ""))
"""Settings of routers that others reach."""


class _Told(BaseException):
    """A signal told us to end. No Exception, so that nothing on the way takes it."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to start, and what to do then."""
    parser.epilog = _EPILOG
    parser.usage = "kvmesh up [settings] [--ask TEXT] [--once] [-- COMMAND ARGS…]"
    parser.add_argument("--ask", metavar="TEXT", help="ask this once the cluster serves")
    parser.add_argument(
        "--once", action="store_true", help="end after the answer, or after COMMAND"
    )
    parser.add_argument("program", nargs="*", metavar="COMMAND", help=argparse.SUPPRESS)
    add_settings(parser, SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Runs a cluster."""
    if args.program and not args.once:
        raise UsageError("a COMMAND needs --once: the cluster ends with it")
    if args.once and not args.program and args.ask is None:
        raise UsageError("--once needs something to do: --ask TEXT or -- COMMAND ARGS…")
    _refuse_doors(args)
    plan = _plan(merged("up", SETTINGS, args), args.once, config_file(args))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _told)
    try:
        if plan.engine == "torch":
            _get_model(plan.model)
        with running(plan, _say) as cluster:
            return _serve(cluster, args)
    except ChildDiedError as error:
        print(f"kvmesh up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if not args.once else 130
    except _Told as told:
        return told.status


def _refuse_doors(args: argparse.Namespace) -> None:
    wanted = {"KVMESH_CONFIG", *(setting.variable for setting in _NOT_WITH_UP)}
    environment = {name: value for name, value in os.environ.items() if name in wanted}
    for name, value in merged("router", _NOT_WITH_UP, args, environment).items():
        if value:
            raise UsageError(
                f"{name} is {value!r} for routers, and what `up` starts is asked in plain text "
                f"and without a key; use `kvmesh router` and `kvmesh worker`, or leave {name} out"
            )


def _told(number: int, _: FrameType | None) -> NoReturn:
    # Told once more while ending: the default ends at once, and the kernel
    # takes the children.
    signal.signal(number, signal.SIG_DFL)
    raise _Told(number)


def _plan(values: dict[str, Any], once: bool, config: str | None) -> Plan:
    from kvmesh.worker.settings import SettingError, split_address

    def number(name: str, default: int, low: int = 0) -> int:
        try:
            found = int(values.get(name, default))
        except (TypeError, ValueError):
            found = low - 1
        if found < low:
            raise UsageError(f"{name} is {values[name]!r}; allowed is {low} or more")
        return found

    counts = {"prefill": 1, "decode": 1, "both": 0}
    if "both" in values:
        # Asked for workers of both stages: the split ones only on demand.
        counts = {"prefill": 0, "decode": 0, "both": 0}
    workers = {role: number(role, count) for role, count in counts.items()}
    if not workers["both"] and not workers["decode"]:
        raise UsageError("decode and both are 0; somebody has to decode")
    engine = str(values.get("engine", "torch"))
    if engine not in ("torch", "sim"):
        raise UsageError(f"engine is {engine!r}; allowed are torch, sim")
    listen = values.get("listen") or ("127.0.0.1:0" if once else DEFAULT_ENDPOINT)
    try:
        host, port = split_address("listen", listen)
    except SettingError as error:
        raise UsageError(str(error)) from error
    extra: list[str] = []
    for name in ("kv_pool_tokens", "threads"):
        if name in values:
            extra += [f"--{name.replace('_', '-')}", str(number(name, 0, 1))]
    return Plan(
        model=str(values.get("model") or ("sim" if engine == "sim" else Plan.model)),
        engine=engine,
        workers=workers,
        host=f"[{host}]" if ":" in host else host,
        port=port,
        etcd_port=number("etcd_port", 0 if once else 2379),
        etcd=str(values.get("etcd", "")),
        cluster=str(values.get("cluster", "default")),
        data=Path(values["data"]).expanduser().resolve() if values.get("data") else None,
        config=Path(config).resolve() if config else None,
        hidden_variables=frozenset(setting.variable for setting in SETTINGS) | {"KVMESH_CONFIG"},
        worker_arguments=tuple(extra),
        insecure=values.get("insecure", False),
        ready_timeout_s=float(number("ready_timeout_s", 600, 1)),
    )


def _say(child: str, line: str) -> None:
    print(f"[{child}] {line}", file=sys.stderr, flush=True)


def _get_model(model: str) -> None:
    """Gets the model once, before several workers ask for it."""
    command = [sys.executable, "-m", "kvmesh.cli", "models", "pull", model]
    done = subprocess.run(tethered(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if done.returncode != 0:
        raise UsageError(f"model is {model!r}, which cannot be had (see above)")


def _serve(cluster: Cluster, args: argparse.Namespace) -> int:
    if args.program:
        return _run_program(cluster, args.program)
    if args.ask is not None:
        status = _ask(cluster, args.ask)
        if args.once or status:
            return status
    where = cluster.endpoint
    flag = "" if where == DEFAULT_ENDPOINT else f" --endpoint {where}"
    print(
        f"\nThe cluster serves at {where} (etcd {cluster.etcd}, logs {cluster.logs}).\n"
        f"Ask more in another terminal: {_command()} chat{flag}\n"
        "Ctrl-C ends it.",
        flush=True,
    )
    while True:
        try:
            # Not for ever: a signal that comes just before the wait is seen only after it.
            cluster.children.wait(_SIGNAL_S)
        except ChildDiedError as error:
            # The mesh lives on without a worker; not without its router.
            print(f"kvmesh up: {error}", file=sys.stderr, flush=True)
            if cluster.router.process.poll() is not None:
                return 1


def _command() -> str:
    """How the user would call us again."""
    return sys.argv[0] if sys.argv[0].endswith("/kvmesh") else f"{sys.executable} -m kvmesh.cli"


def _ask(cluster: Cluster, question: str) -> int:
    import kvmesh

    print(f"\n> {question}", flush=True)
    with kvmesh.Client(cluster.endpoint) as client:
        try:
            events = client.generate(
                messages=[{"role": "user", "content": question}], max_tokens=128, temperature=0.0
            )
            _, finished, _ = print_stream(events)
        except kvmesh.MeshError as error:
            print(f"kvmesh up: {explain(error, cluster.endpoint)}", file=sys.stderr)
            return 1
    if finished is None:
        return 1
    print(timings_line(finished), flush=True)
    return 0


def _run_program(cluster: Cluster, program: list[str]) -> int:
    """Runs a command against the cluster; its exit status, as shells have it."""
    environment = {
        **os.environ,
        "KVMESH_ENDPOINT": cluster.endpoint,
        "KVMESH_ETCD": cluster.etcd,
        "KVMESH_CLUSTER": cluster.plan.cluster,
    }
    process = subprocess.Popen(tethered(program), env=environment)
    try:
        status = _wait_out(process, cluster)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return status if status >= 0 else 128 - status


def _wait_out(process: subprocess.Popen[bytes], cluster: Cluster) -> int:
    """Waits; a Ctrl-C is the command's own matter, the second one ends it.

    Raises `ChildDiedError` where the router ends first.
    """
    interrupts = 0
    with cluster.children.watching(process) as ended:
        while not ended():
            try:
                cluster.children.wait(_SIGNAL_S)
            except ChildDiedError as error:
                if cluster.router.process.poll() is not None:
                    raise
                print(f"kvmesh up: {error}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 2:
                    process.kill()
    return process.wait()
