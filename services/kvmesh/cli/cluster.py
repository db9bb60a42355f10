"""A whole cluster as children of this process: etcd, a router, workers."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.cli.children import Child, Children
from kvmesh.cli.etcd import etcd_command, free_ports
from kvmesh.cli.router import OPERATORS
from kvmesh.cli.settings import UsageError

_POLL_S = 0.05
_CALL_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Plan:
    """What to start."""

    model: str = "smollm2-135m"
    engine: str = "torch"
    workers: Mapping[str, int] = field(default_factory=lambda: {"prefill": 1, "decode": 1})
    """How many of each role."""
    host: str = "127.0.0.1"
    port: int = 0
    """Port of the router; 0, or one that is taken: any that is free."""
    etcd_port: int = 0
    """Port of our etcd, as `port`."""
    etcd: str = ""
    """Endpoints of a running etcd; empty: one is started."""
    cluster: str = "default"
    data: Path | None = None
    """Folder for etcd's data and the logs; None: one that goes with the cluster."""
    config: Path | None = None
    """File of settings whose sections [router] and [worker] hold for them; what is
    decided here is stronger."""
    hidden_variables: frozenset[str] = frozenset()
    """Variables of this process that are not for routers and workers."""
    worker_arguments: tuple[str, ...] = ()
    """Further flags for every worker."""
    insecure: bool = False
    ready_timeout_s: float = 600.0


@dataclass(slots=True)
class Cluster:
    """A cluster that runs."""

    plan: Plan
    children: Children
    endpoint: str
    etcd: str
    logs: Path
    router: Child
    workers: list[Child]


@contextlib.contextmanager
def running(plan: Plan, say: Callable[[str, str], None]) -> Iterator[Cluster]:
    """Starts a cluster, waits until it can serve, and ends it at last.

    Raises `ChildDiedError` where a part ends while it starts. The folder of a
    cluster that failed is kept: its logs say why.
    """
    with contextlib.ExitStack() as stack:
        data = plan.data
        if data is None:
            data = Path(stack.enter_context(_folder()))
        children = stack.enter_context(Children(data / "logs", say))
        yield _start(plan, children, data)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    name = tempfile.mkdtemp(prefix="kvmesh-up-")
    yield name
    # Not reached where something went wrong: then the logs are wanted.
    shutil.rmtree(name, ignore_errors=True)


def _start(plan: Plan, children: Children, data: Path) -> Cluster:
    port, client_port, peer_port = free_ports([plan.port, plan.etcd_port, 0])
    etcd = plan.etcd
    if not etcd:
        durable = plan.data is not None
        command = etcd_command(client_port, peer_port, data / "etcd", durable)
        children.spawn("etcd", command)
        etcd = f"127.0.0.1:{client_port}"
    # All start at once: whoever needs etcd tries until it answers.
    common = ["--etcd", etcd, "--cluster", plan.cluster]
    common.append("--insecure" if plan.insecure else "--no-insecure")
    if plan.config is not None:
        common += ["--config", str(plan.config)]
    kvmesh = [sys.executable, "-m", "kvmesh.cli"]
    listen = f"{plan.host}:{port}"
    router = children.spawn(
        "router",
        [*kvmesh, "router", *common, "--listen", listen],
        announce=True,
        hidden=plan.hidden_variables,
    )
    workers = []
    for role, count in plan.workers.items():
        for number in range(1, count + 1):
            name = f"{role}-{number}"
            command = [
                *kvmesh, "worker", *common, *plan.worker_arguments,
                "--role", role, "--engine", plan.engine, "--model", plan.model,
                "--worker-id", name, "--grace", "2s",
                # Several on one machine: a port that is given would be taken.
                "--listen", "127.0.0.1:0", "--transfer-listen", "127.0.0.1:0",
            ]  # fmt: skip
            hidden = plan.hidden_variables
            workers.append(children.spawn(name, command, announce=True, hidden=hidden))
    logs = data / "logs"
    until = time.monotonic() + plan.ready_timeout_s
    try:
        endpoint = children.wait_for(router, "listening on ", until)
        for worker in workers:
            children.wait_for(worker, f"worker {worker.name}: serving", until)
    except TimeoutError as late:
        raise _not_ready(plan, str(late), logs) from late
    cluster = Cluster(plan, children, endpoint, etcd, logs, router, workers)
    _wait_ready(cluster, until)
    return cluster


def _not_ready(plan: Plan, state: str, logs: Path) -> UsageError:
    return UsageError(
        f"the cluster is not ready after {plan.ready_timeout_s:g} s: {state}; logs are in {logs}"
    )


def _wait_ready(cluster: Cluster, until: float) -> None:
    """Waits until the router has a live session with every worker.

    Asks the router, and listens to the children between two questions.
    """
    import grpc

    from kvmesh.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

    names = {worker.name for worker in cluster.workers}
    apart = [line for line in cluster.router.said if line.startswith(OPERATORS)]
    operators = apart[0].removeprefix(OPERATORS) if apart else cluster.endpoint
    with (
        grpc.insecure_channel(cluster.endpoint) as channel,
        grpc.insecure_channel(operators) as admin_channel,
    ):
        admin = admin_pb2_grpc.AdminStub(admin_channel)
        inference = inference_pb2_grpc.InferenceStub(channel)
        state = "the router does not answer"
        while time.monotonic() < until:
            try:
                found = admin.ListWorkers(
                    admin_pb2.ListWorkersRequest(), timeout=_CALL_TIMEOUT_S
                ).workers
                live = {
                    w.record.worker_id for w in found if w.state == admin_pb2.SESSION_STATE_LIVE
                }
                models = inference.ListModels(
                    inference_pb2.ListModelsRequest(), timeout=_CALL_TIMEOUT_S
                ).models
                if names <= live and any(model.ready for model in models):
                    return
                waiting = ", ".join(sorted(names - live)) or "the model"
                state = f"still waiting for {waiting}"
            except grpc.RpcError as error:
                state = f"the router says {error.code().name}: {error.details()}"
            cluster.children.wait(_POLL_S)
    raise _not_ready(cluster.plan, state, cluster.logs)
