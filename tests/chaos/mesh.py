"""The mesh under test: etcd, routers and workers as real processes, each on a host of its own.

Half of the workers are reached by fault proxies, which have their host's second address: one
before the port of sessions, one before that of KV. The others are reached directly, so that a
process that dies is seen to refuse.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
from fault_proxy import FaultProxy
from network import Host, Network

from kvmesh.cli.children import Child, Children
from kvmesh.cli.etcd import etcd_command
from kvmesh.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

ROLES = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode", "b": "both"}
"""Every worker that there may be."""
PROXIED = ("p1", "d1")
ROUTERS = ("r1", "r2")
ETCD = "etcd"
SESSION_PORT, KV_PORT, ROUTER_PORT, ADMIN_PORT = 7001, 7002, 7440, 7441
START_S = 120.0
STEP_MS = 25.0
"""Length of a step, whatever it holds: long enough that two cores keep to it."""
STEPS = {"profile": "step-10ms", "speed": str(10.0 / STEP_MS)}
GRACE = "500ms"
"""What a worker has to finish what runs when it is drained: streams are often given back."""
PATIENT = ("d2", "b")
"""Workers with time to hand all of their streams over."""
PATIENCE = "5s"
"""What they have: more than the longest stream takes."""
POOL_TOKENS = 65_536
LEASE = "2s"
"""How long a receiver of KV waits for a sender that has fallen silent. As shipped it is 10 s,
and so long a stream stands still whose KV is on a path that drops it."""
LIVE = frozenset({admin_pb2.SESSION_STATE_LIVE})
PROBED = LIVE | {admin_pb2.SESSION_STATE_HALF_OPEN}
"""States of sessions that work. Half open: back from a loss, and one request decides."""
SUSPECT_MS = 1_000.0
"""A worker that is silent for longer is no more in order. Its state says so, but for one that is
half open: that stays so until it is lost again."""


@contextmanager
def folder_of_run(given: Path | None = None) -> Iterator[Path]:
    """A folder for a run's logs: the given one, or one that is kept only if the run fails."""
    folder = given or Path(tempfile.mkdtemp(prefix="kvmesh-chaos-"))
    try:
        yield folder
    except BaseException:
        print(f"logs are in {folder / 'logs'}", flush=True)
        raise
    if given is None:
        shutil.rmtree(folder)


def works(
    worker: admin_pb2.WorkerStatus,
    states: Collection[int] = PROBED,
    within_ms: float = SUSPECT_MS,
) -> bool:
    """Whether a session is in one of these states, and its worker was heard of within a time."""
    return worker.state in states and worker.silent_ms < min(SUSPECT_MS, within_ms)


class Mesh:
    """Starts and breaks processes; to be used from the main thread, and closed."""

    def __init__(
        self,
        folder: Path,
        engine: Mapping[str, str],
        *,
        router: Sequence[str] = (),
        clients: Sequence[str] = (),
    ) -> None:
        """`engine`: settings of every worker's simulated engine. `router`: more arguments of every
        router. `clients`: hosts on which nothing runs yet."""
        self.folder = folder
        self.network = Network([ETCD, *ROUTERS, *ROLES, *clients])
        self.children = Children(folder / "logs", lambda *_: None)
        self.running: dict[str, Child] = {}
        self.sessions: dict[str, FaultProxy] = {}
        """Proxies before sessions, by worker."""
        self.kv: dict[str, FaultProxy] = {}
        """Proxies before the KV ports."""
        self._engine = dict(engine)
        self._router = tuple(router)
        self._channels: dict[str, grpc.Channel] = {}
        self._stack = ExitStack()
        self._stack.callback(self.children.__exit__, None, None, None)

    # -- starting ----------------------------------------------------------

    def start(self, workers: Iterable[str] = ROLES) -> None:
        """Starts all of it; it serves on return."""
        self.start_etcd()
        self.wait(self._etcd_answers, "etcd answers")
        for name in ROUTERS:
            self.start_router(name)
            # Administration is for callers on the router's own host: a door for us there.
            self._proxy(name, f"127.0.0.1:{ROUTER_PORT}", self.door(name))
        started = list(workers)
        for name in started:
            self.start_worker(name)
        for router in ROUTERS:
            self.wait(lambda router=router: self.is_live(router, started), "workers are live")
            self.wait(lambda router=router: self._models_ready(router), "the model is ready")

    def start_etcd(self) -> None:
        """Starts etcd, again with the data that it had."""
        host = self._host(ETCD)
        command = etcd_command(2379, 2380, self.folder / "etcd", durable=True)
        # It is made for loopback; here it is a host.
        command = [part.replace("127.0.0.1", host.address) for part in command]
        self.running[ETCD] = self.children.spawn(ETCD, host.within(*command))

    def start_router(self, name: str) -> None:
        """Starts a router at its address, without waiting for it."""
        self._spawn(
            name, "router",
            "--router-id", name,
            "--listen", f"0.0.0.0:{ROUTER_PORT}",
            "--advertise", self.address(name),
            "--insecure",
            "--etcd-ttl", "2s",
            "--local-prefill", "without-prefill-workers",
            "--log-format", "json",
            *self._router,
        )  # fmt: skip

    def start_worker(self, name: str) -> None:
        """Starts a worker at its address, without waiting for it."""
        host = self._host(name)
        if name in PROXIED and name not in self.sessions:
            for proxies, port in ((self.sessions, SESSION_PORT), (self.kv, KV_PORT)):
                upstream, listen = f"{host.address}:{port}", f"{host.alias}:{port}"
                proxies[name] = self._proxy(name, upstream, listen)
        settings = {**self._engine, "stuck_while": str(self.stuck_file(name))}
        self._spawn(
            name, "worker",
            "--worker-id", name,
            "--role", ROLES[name],
            "--engine", "sim",
            "--model", "sim",
            "--listen", f"{host.address}:{SESSION_PORT}",
            "--transfer-listen", f"{host.address}:{KV_PORT}",
            "--transfer-tcp",
            "--advertise-host", host.alias if name in PROXIED else host.address,
            "--insecure",
            "--etcd-ttl", "2s",
            "--grace", PATIENCE if name in PATIENT else GRACE,
            "--transfer-lease", LEASE,
            "--kv-pool-tokens", str(POOL_TOKENS),
            "--engine-arguments", ",".join(f"{key}={value}" for key, value in settings.items()),
        )  # fmt: skip

    def _spawn(self, name: str, command: str, *arguments: str) -> None:
        etcd = f"{self._host(ETCD).address}:2379"
        line = [sys.executable, "-m", "kvmesh.cli", command, "--etcd", etcd, *arguments]
        within = self._host(name).within(*line)
        self.running[name] = self.children.spawn(name, within, announce=True)

    def _proxy(self, name: str, upstream: str, listen: str) -> FaultProxy:
        return self._stack.enter_context(FaultProxy(upstream, listen, self._host(name).within))

    def _host(self, name: str) -> Host:
        return self.network.hosts[name]

    # -- looking -----------------------------------------------------------

    def address(self, router: str) -> str:
        """Where clients reach a router."""
        return f"{self._host(router).address}:{ROUTER_PORT}"

    def door(self, router: str) -> str:
        """Where we are administrators of a router."""
        return f"{self._host(router).address}:{ADMIN_PORT}"

    def target(self, *routers: str) -> str:
        """A client's target: the first of these that answers."""
        return "ipv4:" + ",".join(self.address(name) for name in routers)

    def stuck_file(self, name: str) -> Path:
        """While it exists, the worker's engine ends no step."""
        return self.folder / f"{name}.stuck"

    def table(self, router: str) -> dict[str, admin_pb2.WorkerStatus]:
        """The workers as a router sees them; empty where it does not answer."""
        stub = admin_pb2_grpc.AdminStub(self._channel(self.door(router)))
        try:
            answer = stub.ListWorkers(admin_pb2.ListWorkersRequest(), timeout=2)
        except grpc.RpcError:
            return {}
        return {worker.record.worker_id: worker for worker in answer.workers}

    def is_live(
        self,
        router: str,
        workers: Iterable[str],
        states: Collection[int] = PROBED,
        since: float | None = None,
    ) -> bool:
        """Whether a router has sessions that work with all of these.

        `since`: and has heard of each after this time (of time.monotonic).
        """
        within_ms = SUSPECT_MS if since is None else (time.monotonic() - since) * 1000
        table = self.table(router)
        return all(name in table and works(table[name], states, within_ms) for name in workers)

    def _etcd_answers(self) -> bool:
        try:
            url = f"http://{self._host(ETCD).address}:2379/health"
            with urllib.request.urlopen(url, timeout=1) as answer:
                return b'"true"' in answer.read()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _models_ready(self, router: str) -> bool:
        stub = inference_pb2_grpc.InferenceStub(self._channel(self.address(router)))
        request = inference_pb2.ListModelsRequest()
        models = stub.ListModels(request, timeout=10, wait_for_ready=True).models
        return any(model.ready for model in models)

    def residue(self, worker: str) -> worker_pb2.Residue:
        """What a worker holds of requests."""
        stub = worker_pb2_grpc.WorkerStub(
            self._channel(f"{self._host(worker).address}:{SESSION_PORT}")
        )
        return stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=10).residue

    def _channel(self, address: str) -> grpc.Channel:
        if address not in self._channels:
            # What was away for a while is soon found again.
            options = [("grpc.max_reconnect_backoff_ms", 500)]
            self._channels[address] = grpc.insecure_channel(address, options)
        return self._channels[address]

    def wait(self, holds: Callable[[], bool], what: str, seconds: float = START_S) -> None:
        """Looks until something holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"never came true: {what}")
            self.children.wait(0.05)

    def logged(self, router: str) -> Iterator[dict[str, object]]:
        """What a router logged in all its lives, line by line."""
        for line in (self.folder / "logs" / f"{router}.log").read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    # -- breaking ----------------------------------------------------------

    def kill(self, name: str) -> None:
        """kill -9, and its end is seen."""
        child = self.running.pop(name)
        child.process.kill()
        self.children.stop(child, START_S)

    def drain(self, name: str) -> None:
        """SIGTERM to a worker, and its end is seen: nothing runs there any more."""
        self.children.stop(self.running.pop(name), START_S)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Signals a process."""
        os.kill(self.running[name].process.pid, number)

    def close(self) -> None:
        """Ends all processes."""
        for channel in self._channels.values():
            channel.close()
        for child in self.running.values():
            # One that is stopped could not end in order.
            child.process.send_signal(signal.SIGCONT)
        self._stack.close()
