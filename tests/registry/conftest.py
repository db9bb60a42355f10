"""A real etcd for a test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmesh.cli.children import Children
from kvmesh.cli.etcd import etcd_command, free_ports


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[str]:
    client, peer = free_ports([0, 0])
    with Children(tmp_path / "logs", lambda name, line: None) as children:
        children.spawn("etcd", etcd_command(client, peer, tmp_path / "data", durable=False))
        yield f"127.0.0.1:{client}"
