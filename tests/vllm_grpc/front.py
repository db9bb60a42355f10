"""SMG in front of a router, as real processes; and calls that it has no way to make."""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

from cluster import Cluster

from kvmesh.cli.etcd import free_ports

MODEL = "smollm2-135m"
ENGINE = "vllm.grpc.engine.VllmEngine"


def smg_program() -> Path | None:
    """SMG's, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("smg")
    on_path = shutil.which("smg")
    return beside if beside.exists() else Path(on_path) if on_path else None


class Stubs:
    """Calls of a service, made from what reflection tells of it."""

    def __init__(self, target: str, service: str) -> None:
        self.channel = grpc.insecure_channel(target)
        # A pool of its own: other tests may know the same names by other files.
        self.pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        self.service = self.pool.FindServiceByName(service)

    def message(self, name: str, **fields: Any) -> Any:
        """A message of the service's package."""
        full = f"{self.service.full_name.rpartition('.')[0]}.{name}"
        return GetMessageClass(self.pool.FindMessageTypeByName(full))(**fields)

    def call(self, method: str, request: Any, **options: Any) -> Any:
        described = self.service.methods_by_name[method]
        make = self.channel.unary_stream if described.server_streaming else self.channel.unary_unary
        answer = GetMessageClass(described.output_type)
        path = f"/{self.service.full_name}/{method}"
        multicallable = make(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return multicallable(request, timeout=60, **options)

    def close(self) -> None:
        self.channel.close()


class Refused(Exception):
    """SMG's answer that is no 200."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Front:
    """SMG, the router that it takes for an engine, and the workers."""

    cluster: Cluster
    target: str
    """The router's address."""
    url: str
    """SMG's."""

    def answers(self) -> bool:
        """Whether SMG has found the model and its tokeniser."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        try:
            self.ask("/v1/chat/completions", body)
        except Refused as refused:
            if refused.status in (404, 503):
                return False
            raise
        except urllib.error.URLError:
            return False
        return True

    def open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            return urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode()) from error

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.open(path, body) as answer:
            return json.load(answer)

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream, which has to say that it is done."""
        with self.open(path, {**body, "stream": True}) as answer:
            for line in answer:
                text = line.decode().strip()
                if text == "data: [DONE]":
                    return
                if text.startswith("data: "):
                    yield json.loads(text.removeprefix("data: "))
        raise AssertionError("a stream without its end")


def start_smg(cluster: Cluster, target: str, program: Path) -> str:
    """Starts SMG over a router; returns its address once it knows the model."""
    port, metrics = free_ports([0, 0])
    child = cluster.children.spawn(
        "smg",
        [
            str(program), "launch",
            "--host", "127.0.0.1", "--port", str(port),
            "--worker-urls", f"grpc://{target}",
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics),
            "--log-level", "warn", "--disable-retries",
        ],
    )  # fmt: skip
    front = Front(cluster, target, f"http://127.0.0.1:{port}")
    wait(cluster, child, front.answers)
    return front.url


def wait(cluster: Cluster, child: Any, holds: Callable[[], bool]) -> None:
    """Looks until something holds while a child lives."""
    deadline = time.monotonic() + 120
    while not holds():
        assert child.process.poll() is None, child.describe_end()
        assert time.monotonic() < deadline, child.describe_end()
        cluster.children.wait(0.05)
