"""A seeded schedule of faults under load, and every stream is as if there were none.

CHAOS_SEED and CHAOS_FAULTS make it another one, or a longer one.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from cluster import Cluster
from fault_proxy import FaultProxy
from figures import figures, wait_quiet
from many_streams import Streams, prompts

from kvmesh.cli.etcd import free_ports

SEED = int(os.environ.get("CHAOS_SEED", "7"))
FAULTS = int(os.environ.get("CHAOS_FAULTS", "8"))
ROLES = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode", "b": "both"}
STREAMS = 12
TOKENS = 200


class Rig:
    """A cluster in which each worker's sessions go by a fault proxy of its own."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        self.cluster = cluster
        self._ports = dict(zip(ROLES, free_ports([0] * len(ROLES)), strict=True))
        for name in ROLES:
            self.start(name)
        self.proxies = {
            name: stack.enter_context(FaultProxy(f"127.0.0.1:{port}"))
            for name, port in self._ports.items()
        }
        addresses = ",".join(proxy.address for proxy in self.proxies.values())
        self.endpoint = cluster.start_router("--workers", addresses)
        self.cluster.wait_live(self.endpoint, *ROLES)

    def start(self, name: str) -> None:
        """Starts a worker at its own address; one that was killed comes back there."""
        self.cluster.start_worker(
            name, ROLES[name], "--etcd", "", "--listen", f"127.0.0.1:{self._ports[name]}",
            "--engine-arguments", "profile=step-10ms",
        )  # fmt: skip

    def strike(self, kind: str, name: str) -> None:
        """A fault begins."""
        match kind:
            case "kill":
                self.cluster.kill(name)
            case "freeze":
                os.kill(self.cluster.workers[name].process.pid, signal.SIGSTOP)
            case "stall":
                self.proxies[name].tell("up stall on", "down stall on")
            case _:
                self.proxies[name].tell(kind)

    def heal(self, kind: str, name: str) -> None:
        """It is over."""
        match kind:
            case "kill":
                self.start(name)
            case "freeze":
                os.kill(self.cluster.workers[name].process.pid, signal.SIGCONT)
        self.proxies[name].tell("heal")


@pytest.fixture
def rig(fresh) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(fresh, stack)


def test_no_stream_is_lost_repeated_or_wrong(rig) -> None:
    rng = random.Random(SEED)
    kinds = ["kill", "freeze", "stall", "cut", "reset"]
    for number in range(FAULTS):
        kind, name = rng.choice(kinds), rng.choice(list(ROLES))
        print(f"fault {number}: {kind} {name}")
        streams = Streams(rig.endpoint, prompts(STREAMS, tokens=60, seed=number), TOKENS)
        streams.wait(rng.randrange(TOKENS // 2))
        rig.strike(kind, name)
        if rng.random() < 0.5:
            # It is over while the streams run, or only when they have ended.
            rig.heal(kind, name)
            streams.assert_undisturbed()
        else:
            streams.assert_undisturbed()
            rig.heal(kind, name)
    now = figures(rig.endpoint)
    assert now["finished_total"] == FAULTS * STREAMS
    assert now["failed_total"] == now["violations_total"] == now["quarantined_total"] == 0
    print(
        f"longest gap {now['longest_moved_gap_seconds']:.2f} s, "
        f"recomputed {now['recomputed_tokens_total']:.0f} tokens"
    )
    wait_quiet(rig.cluster, rig.endpoint, *ROLES)
    rig.cluster.assert_alive()
