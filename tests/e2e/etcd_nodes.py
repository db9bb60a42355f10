"""An etcd of three nodes on loopback.

The nodes are Debian's etcd 3.4.23, which `make etcd-nodes` unpacks: the 3.5.1 that tests use as a
single node may lose consistency when nodes of a cluster crash (fixed in 3.5.3 and 3.5.6).
"""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmesh.cli.children import Child, Children
from kvmesh.cli.etcd import free_ports

START_S = 60.0


def nodes_binary() -> str:
    """Of the etcd that nodes run. Without it the test is skipped; in CI it fails."""
    binary = os.environ.get("TEST_ETCD_NODES_BIN", "")
    if binary and Path(binary).is_file():
        return binary
    text = "TEST_ETCD_NODES_BIN names no etcd for three nodes: run this by make, on Debian"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{text}; with CI=true this may not be skipped", pytrace=False)
    pytest.skip(text)


@dataclass
class Node:
    name: str
    client: int
    """Port for clients."""
    peer: int
    """Port for the other nodes."""
    child: Child | None = None
    lives: int = 0
    """Data folders that it has had."""


class EtcdNodes:
    """Three nodes: each may be killed, frozen and started again."""

    def __init__(self, children: Children, folder: Path) -> None:
        self._children = children
        self._folder = folder
        self._binary = nodes_binary()
        ports = free_ports([0] * 6)
        self.nodes = [Node(f"n{i}", ports[2 * i], ports[2 * i + 1]) for i in range(3)]
        self.start(*self.nodes)

    @property
    def endpoints(self) -> str:
        return ",".join(f"127.0.0.1:{node.client}" for node in self.nodes)

    def start(self, *nodes: Node, keep_data: bool = True) -> None:
        """Starts nodes and waits until the cluster has a leader."""
        for node in nodes:
            if not keep_data:
                node.lives += 1
            node.child = self._children.spawn(f"etcd-{node.name}", self._command(node))
        for _ in range(int(START_S / 0.1)):
            if self.leader() is not None:
                return
            self._children.wait(0.1)
        raise AssertionError("the nodes of etcd found no leader")

    def kill(self, *nodes: Node) -> None:
        """kill -9, and their ends are seen."""
        for node in nodes:
            child = self._child(node)
            os.kill(child.process.pid, signal.SIGKILL)
        for node in nodes:
            self._children.stop(self._child(node), START_S)
            node.child = None

    def freeze(self, node: Node) -> None:
        os.kill(self._child(node).process.pid, signal.SIGSTOP)

    def thaw(self, node: Node) -> None:
        os.kill(self._child(node).process.pid, signal.SIGCONT)

    def leader(self) -> Node | None:
        """Whom the nodes that answer follow; None while they agree on nobody."""
        members: dict[str, Node] = {}
        followed: set[str] = set()
        for node in self.nodes:
            status = self._status(node)
            if status is not None:
                members[status["header"]["member_id"]] = node
                followed.add(status.get("leader", ""))
        if len(followed) != 1:
            return None
        return members.get(followed.pop())

    def _status(self, node: Node) -> dict | None:
        if node.child is None:
            return None
        request = urllib.request.Request(
            f"http://127.0.0.1:{node.client}/v3/maintenance/status", data=b"{}", method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=1) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            # It does not listen yet, has no leader or is frozen.
            return None

    def _child(self, node: Node) -> Child:
        assert node.child is not None, f"{node.name} does not run"
        return node.child

    def _command(self, node: Node) -> list[str]:
        client, peer = f"http://127.0.0.1:{node.client}", f"http://127.0.0.1:{node.peer}"
        cluster = ",".join(f"{n.name}=http://127.0.0.1:{n.peer}" for n in self.nodes)
        return [
            self._binary,
            f"--name={node.name}",
            f"--data-dir={self._folder / node.name}-{node.lives}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={cluster}",
            # Nodes whose data is lost are a new cluster.
            f"--initial-cluster-token=kvmesh-{node.lives}",
            "--logger=zap",
            "--log-outputs=stderr",
            "--heartbeat-interval=100",
            "--election-timeout=1000",
        ]
