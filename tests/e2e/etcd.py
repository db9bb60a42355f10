"""A real etcd on loopback for one test."""

import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from kvmesh.cli.children import Child, Children
from kvmesh.cli.etcd import etcd_command


def start_etcd(children: Children, data: Path, ports: Sequence[int]) -> tuple[Child, str]:
    """Starts etcd and waits until it answers. Returns it and its client address."""
    client_port, peer_port = ports
    client = f"127.0.0.1:{client_port}"
    child = children.spawn("etcd", etcd_command(client_port, peer_port, data, durable=True))
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"http://{client}/health", timeout=1) as answer:
                if b'"true"' in answer.read():
                    return child, client
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            # Not listening yet: wait for news of a child, a tenth of a second at most.
            children.wait(0.1)
    raise AssertionError("etcd does not answer")
