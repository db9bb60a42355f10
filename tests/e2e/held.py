"""What the processes of a cluster hold, before and after: what is left behind shows."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from cluster import Cluster
from figures import QUIET, figures

from kvmesh.cli.children import Child

Held = dict[str, float]
"""How much, by process and kind."""


def held(cluster: Cluster) -> Held:
    """Descriptors and threads by the kernel, all else by the processes' own figures."""
    now: Held = {}
    for endpoint, child in cluster.routers.items():
        told = figures(endpoint)
        now |= _of(child, {name: told[name] for name in (*QUIET, "connections", "tasks")})
    for name, child in cluster.workers.items():
        info = cluster.info(name)
        residue = {
            field.name: getattr(info.residue, field.name)
            for field in info.residue.DESCRIPTOR.fields
        }
        room = info.load.kv
        used = info.record.capabilities.pool_blocks - room.free - room.evictable
        now |= _of(child, {**residue, "blocks in use": used})
    return now


def left_over(cluster: Cluster, before: Mapping[str, float], seconds: float = 120) -> Held:
    """Looks until nobody holds more of anything than before, or for so long; how much more is
    held then. Threads and connections that are kept for a while go by themselves."""
    deadline = time.monotonic() + seconds
    while True:
        more = {
            what: now - before[what] for what, now in held(cluster).items() if now > before[what]
        }
        if not more or time.monotonic() >= deadline:
            return more
        cluster.children.wait(0.05)


def wait_held(cluster: Cluster, before: Mapping[str, float], seconds: float = 120) -> None:
    """Waits until nobody holds more of anything than before."""
    more = left_over(cluster, before, seconds)
    assert not more, {
        what: f"{before[what] + count:.0f}, {before[what]:.0f} before"
        for what, count in more.items()
    }


def _of(child: Child, told: Mapping[str, float]) -> Held:
    pid = child.process.pid
    by_kernel = {what: len(os.listdir(f"/proc/{pid}/{what}")) for what in ("fd", "task")}
    return {f"{child.name}: {what}": value for what, value in {**by_kernel, **told}.items()}
