"""The arrangements of `isolation.py`: who serves, on which cores."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

from cluster import Cluster

from kvmesh.cli.commands import COMMANDS
from kvmesh.roles import role_name

MODEL_CONTEXT = 8_192
"""A fixed chunk of this many tokens is no chunk at all."""


@dataclass(frozen=True)
class Worker:
    """One worker and the cores that it may use (numbers into those that this machine gives us)."""

    role: str
    cores: tuple[int, ...]
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrangement:
    """A way to share the same two cores."""

    key: str
    title: str
    workers: tuple[Worker, ...]
    router: tuple[str, ...] = ()
    planner: bool = False


def unified(key: str, title: str, chunk_tokens: int) -> Arrangement:
    """One worker for everything, on both cores, with chunks of a fixed size."""
    arguments = ("--threads", "2", "--engine-arguments", f"chunk_tokens={chunk_tokens}")
    return Arrangement(key, title, (Worker("both", (0, 1), arguments),))


ALONE = Arrangement("R", "one core, one worker, documents only", (Worker("both", (0,)),))
_SPLIT = (Worker("prefill", (0,)), Worker("decode", (1,)))


def arrangements(chunk_tokens: int) -> dict[str, Arrangement]:
    """All of them, by their letter. `chunk_tokens`: those of (b)."""
    return {
        one.key: one
        for one in (
            unified("a", "one both, 2 threads, unchunked", MODEL_CONTEXT),
            unified("b", f"one both, 2 threads, chunks of {chunk_tokens}", chunk_tokens),
            Arrangement(
                "c",
                "two both, least-loaded",
                (Worker("both", (0,)), Worker("both", (1,))),
                ("--policy", "least-loaded"),
            ),
            Arrangement("d", "one prefill, one decode", _SPLIT),
            Arrangement("e", "(d) with the planner", _SPLIT, planner=True),
        )
    }


def has_planner() -> bool:
    """Whether this version has the command that (e) needs."""
    return "planner" in COMMANDS


_PLANNER = "planner"
_FLIP = re.compile(r"; flips (\S+ from \w+ to \w+)")


def flips_of(cluster: Cluster) -> list[str] | None:
    """What a planner flipped so far, by what it printed: `d from decode to both`."""
    log = cluster.folder / "logs" / f"{_PLANNER}.log"
    return _FLIP.findall(log.read_text()) if log.exists() else None


def roles_of(cluster: Cluster) -> dict[str, str]:
    """The roles that workers have now."""
    table = cluster.table(cluster.endpoints[0])
    return {name: role_name(worker.load.role) for name, worker in sorted(table.items())}


@contextlib.contextmanager
def serving(arrangement: Arrangement, extra_router: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """A cluster of an arrangement that serves. Router and etcd may use both cores."""
    cores = sorted(os.sched_getaffinity(0))
    needed = 1 + max(core for worker in arrangement.workers for core in worker.cores)
    if len(cores) < needed:
        raise SystemExit(f"arrangement {arrangement.key} needs {needed} cores, here are {cores}")
    two = set(cores[:2])
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # Children have the cores that we have when they start.
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, two)
        cluster = Cluster(Path(folder), as_shipped=True)
        stack.callback(cluster.close)
        endpoint = cluster.start_router(*arrangement.router, *extra_router)
        names = []
        for number, worker in enumerate(arrangement.workers):
            names.append(f"{worker.role}-{number}")
            os.sched_setaffinity(0, {cores[core] for core in worker.cores})
            # In turn: each times a few steps at its start, on cores that are its own.
            cluster.start_worker(names[-1], worker.role, *worker.arguments, engine="torch")
        os.sched_setaffinity(0, two)
        cluster.wait_live(endpoint, *names)
        if arrangement.planner:
            cluster.children.spawn(
                _PLANNER,
                [sys.executable, "-m", "kvmesh.cli", "planner", "--apply", "--endpoint", endpoint],
            )
        yield cluster
