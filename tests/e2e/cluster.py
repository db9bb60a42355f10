"""A cluster of real processes on loopback: etcd, routers and workers.

Children die with the test process, however it ends. Waiting is for events: a
line that a child announces, its end, or a router's own view of its workers.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from etcd import start_etcd
from etcd_nodes import EtcdNodes
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.cli.children import Child, Children
from kvmesh.cli.etcd import free_ports
from kvmesh.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

START_S = 120.0


class Cluster:
    def __init__(
        self,
        folder: Path,
        *,
        ttl_s: int = 10,
        etcd_nodes: bool = False,
        as_shipped: bool = False,
    ) -> None:
        """Over one etcd, or over three nodes of one. `as_shipped`: see `start_router`."""
        logs = folder / "logs"
        logs.mkdir(parents=True)
        self.folder = folder
        self.slow_file = folder / "slow"
        self.ttl_s = ttl_s
        self._as_shipped = as_shipped
        self.children = Children(logs, lambda *_: None)
        if etcd_nodes:
            self.nodes = EtcdNodes(self.children, folder)
            self.etcd = self.nodes.endpoints
        else:
            self._etcd_ports = free_ports([0, 0])
            self._etcd, self.etcd = start_etcd(self.children, folder / "etcd", self._etcd_ports)
        self.endpoints: list[str] = []
        self.routers: dict[str, Child] = {}
        self.workers: dict[str, Child] = {}
        self._channels: dict[str, grpc.Channel] = {}

    # -- starting ----------------------------------------------------------

    def start_router(self, *arguments: str) -> str:
        """Starts a router; returns its endpoint.

        Unless it is as shipped, or the arguments say otherwise, a prompt goes to a prefill worker
        where one is there, however short it is: tests of hand-offs have short prompts.
        """
        if not self._as_shipped and "--local-prefill" not in arguments:
            arguments = ("--local-prefill", "without-prefill-workers", *arguments)
        child = self.children.spawn(
            f"router-{len(self.endpoints)}",
            [
                sys.executable, "-m", "kvmesh.cli", "router",
                "--listen", "127.0.0.1:0",
                "--etcd", self.etcd,
                *arguments,
            ],
            announce=True,
        )  # fmt: skip
        endpoint = self._address(child)
        self.endpoints.append(endpoint)
        self.routers[endpoint] = child
        return endpoint

    def start_worker(self, name: str, role: str, *arguments: str, engine: str = "sim") -> Child:
        """Starts a worker; it is serving on return."""
        child = self.begin_worker(name, role, *arguments, engine=engine)
        self._address(child)
        return child

    def begin_worker(self, name: str, role: str, *arguments: str, engine: str = "sim") -> Child:
        """Starts a worker without waiting for it."""
        child = self.children.spawn(
            name,
            [
                sys.executable, "-m", "kvmesh.cli", "worker",
                "--worker-id", name,
                "--role", role,
                "--engine", engine,
                "--model", "sim" if engine == "sim" else "smollm2-135m",
                "--etcd", self.etcd,
                "--etcd-ttl", str(self.ttl_s),
                *arguments,
            ],
            announce=True,
        )  # fmt: skip
        self.workers[name] = child
        return child

    def steps(self, *more: str, profile: str = "step-10ms") -> tuple[str, str]:
        """Arguments of a simulated worker whose steps `slow_down` makes ten times as long."""
        settings = (f"profile={profile}", f"slow_while={self.slow_file}", *more)
        return "--engine-arguments", ",".join(settings)

    def slow_down(self) -> None:
        """From now on what a test does to streams finds them running, however long it takes."""
        self.slow_file.touch()

    def speed_up(self) -> None:
        """What was to be done to them is done."""
        self.slow_file.unlink()

    def _address(self, child: Child) -> str:
        while True:
            for line in child.said:
                if " on 127.0.0.1:" in line and (
                    ": serving " in line or line.startswith("listening")
                ):
                    return line.rpartition(" on ")[2].split()[0]
            self.children.wait(START_S)

    def worker_address(self, name: str) -> str:
        return self._address(self.workers[name])

    # -- looking -----------------------------------------------------------

    def channel(self, address: str) -> grpc.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.insecure_channel(address)
        return self._channels[address]

    def table(self, endpoint: str) -> dict[str, admin_pb2.WorkerStatus]:
        """The workers as a router sees them."""
        stub = admin_pb2_grpc.AdminStub(self.channel(endpoint))
        answer = stub.ListWorkers(admin_pb2.ListWorkersRequest(), timeout=60, wait_for_ready=True)
        return {worker.record.worker_id: worker for worker in answer.workers}

    def wait_table(
        self,
        endpoint: str,
        holds: Callable[[dict[str, admin_pb2.WorkerStatus]], bool],
        seconds: float = START_S,
    ) -> dict[str, admin_pb2.WorkerStatus]:
        """Looks until something holds of the table; fails with the last one seen."""
        deadline = time.monotonic() + seconds
        while not holds(table := self.table(endpoint)):
            assert time.monotonic() < deadline, f"never held of {table}"
            self.children.wait(0.02)
        return table

    def wait_live(self, endpoint: str, *names: str) -> None:
        """Waits until workers are live and their models can be asked for."""
        live = admin_pb2.SESSION_STATE_LIVE
        table = self.wait_table(
            endpoint, lambda table: all(n in table and table[n].state == live for n in names)
        )
        wanted = {table[name].record.model.name for name in names}
        stub = inference_pb2_grpc.InferenceStub(self.channel(endpoint))
        for _ in range(3_000):
            models = stub.ListModels(inference_pb2.ListModelsRequest(), timeout=60).models
            if wanted <= {model.name for model in models if model.ready}:
                return
            self.children.wait(0.02)
        raise AssertionError(f"models {wanted} never became ready")

    def wait_router(
        self,
        endpoint: str,
        holds: Callable[[admin_pb2.GetRouterInfoResponse], bool],
        seconds: float = START_S,
    ) -> None:
        """Asks a router about itself until something holds."""
        stub = admin_pb2_grpc.AdminStub(self.channel(endpoint))
        deadline = time.monotonic() + seconds
        while not holds(info := stub.GetRouterInfo(admin_pb2.GetRouterInfoRequest(), timeout=60)):
            assert time.monotonic() < deadline, f"never held of {info}"
            self.children.wait(0.02)

    def info(self, name: str) -> worker_pb2.GetInfoResponse:
        stub = worker_pb2_grpc.WorkerStub(self.channel(self.worker_address(name)))
        return stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=60)

    def healthy(self, name: str) -> bool:
        """Whether a worker's health says that it serves."""
        stub = health_pb2_grpc.HealthStub(self.channel(self.worker_address(name)))
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_empty(self, *names: str, seconds: float = START_S) -> None:
        """Waits until workers hold nothing: requests, transfers, blocks, orphans."""
        deadline = time.monotonic() + seconds
        for name in names:
            while (residue := self.info(name).residue) != worker_pb2.Residue():
                assert time.monotonic() < deadline, f"{name} still holds {residue}"
                self.children.wait(0.02)

    def assert_alive(self) -> None:
        """No router and no worker has ended."""
        for child in (*self.routers.values(), *self.workers.values()):
            assert child.process.poll() is None, child.describe_end()

    # -- breaking ----------------------------------------------------------

    def kill(self, name: str) -> None:
        """kill -9, and its end is seen."""
        self._kill(self.workers.pop(name))

    def forget(self, name: str) -> None:
        """A worker ended by itself, as it was to."""
        self.children.stop(self.workers.pop(name), START_S)

    def stop(self, name: str) -> None:
        """SIGTERM: it gives back what it cannot finish. Its end is seen."""
        self.children.stop(self.workers.pop(name), START_S)

    def kill_router(self, endpoint: str) -> None:
        """kill -9, and its end is seen."""
        self.endpoints.remove(endpoint)
        self._kill(self.routers.pop(endpoint))

    def kill_etcd(self) -> None:
        """kill -9, and its end is seen."""
        self._kill(self._etcd)

    def restart_etcd(self, *, keep_data: bool) -> None:
        """Starts it again at the same address, with its data or with none."""
        data = self.folder / ("etcd" if keep_data else "etcd-anew")
        self._etcd, _ = start_etcd(self.children, data, self._etcd_ports)

    def _kill(self, child: Child) -> None:
        os.kill(child.process.pid, signal.SIGKILL)
        self.children.stop(child, START_S)

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self.children.__exit__(None, None, None)
