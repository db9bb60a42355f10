"""Nodes of this process, and peers in processes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmesh import _router

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

BLOCKS, BLOCK_BYTES = 16, 64 * 1024
PEER = Path(__file__).with_name("peer.py")
LIMIT_S = 60.0
"""A bound that only a failure reaches, on however busy a machine."""
PATIENCE = {"lease_s": LIMIT_S, "offer_timeout_s": LIMIT_S, "connect_timeout_s": LIMIT_S}


class Node:
    """A node of this process, its pool, and the events that it told so far."""

    def __init__(
        self, name: str, *, blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES, **settings: Any
    ) -> None:
        self.name = name
        self.pool = _router.KvPool(blocks, block_bytes)
        self.content = np.frombuffer(self.pool, dtype=np.uint8).reshape(blocks, block_bytes)
        defaults = {"incarnation": 1, "compatibility": b"", "block_tokens": 16}
        settings = defaults | PATIENCE | settings
        self.node = _router.TransferNode(self.pool, worker_id=name, **settings)
        self.pending: list[Any] = []

    def fill(self, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.content[:] = rng.integers(0, 256, self.content.shape, dtype=np.uint8)

    def expect(self, kind: type, transfer_id: bytes | None = None, limit_s: float = LIMIT_S) -> Any:
        """The next event of a kind; the others before it are kept in `pending`."""
        deadline = time.monotonic() + limit_s
        seen = 0
        while True:
            self.pending += self.node.poll()
            for index, event in enumerate(self.pending[seen:], seen):
                if isinstance(event, kind) and transfer_id in (None, event.transfer_id):
                    del self.pending[index]
                    return event
            seen = len(self.pending)
            left = deadline - time.monotonic()
            others = [
                (type(e).__name__, getattr(e, "reason", ""), getattr(e, "message", ""))
                for e in self.pending
            ]
            assert left > 0, f"no {kind.__name__}, only {others}"
            self.node.wait(left)

    def pull(
        self,
        transfer_id: bytes,
        sender: "Node | Peer",
        from_token: int,
        slots: list[int],
        address: str = "",
    ) -> None:
        self.pool.raise_versions(slots)
        self.node.pull(transfer_id, address or sender.address, sender.name, 1, from_token, slots)

    @property
    def address(self) -> str:
        return self.node.address

    def until(self, key: str, limit_s: float = LIMIT_S) -> None:
        """Until a count of the residue is not 0."""
        deadline = time.monotonic() + limit_s
        while not self.node.residue()[key]:
            assert time.monotonic() < deadline, f"no {key}: {self.node.residue()}"

    def idle(self, limit_s: float = LIMIT_S) -> bool:
        """Whether nothing is held. Jobs of a transfer that is over are dropped when taken."""
        held = self.node.residue()
        if any(held[key] for key in ("sending", "receiving", "awaited", "pins")):
            return False
        deadline = time.monotonic() + limit_s
        while self.node.residue()["jobs"]:
            if time.monotonic() > deadline:
                return False
        return True


class Peer:
    """A node in another process."""

    def __init__(self, name: str, *, prefix: tuple[str, ...] = (), **settings: Any) -> None:
        self.name = name
        settings = (
            {
                "worker_id": name,
                "incarnation": 1,
                "blocks": BLOCKS,
                "block_bytes": BLOCK_BYTES,
            }
            | PATIENCE
            | settings
        )
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(PEER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address: str = self._read()["address"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer ended"
        return json.loads(line)

    def begin(self, call: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        values = [a.hex() if isinstance(a, bytes) else a for a in arguments]
        self.process.stdin.write(json.dumps({"call": call, "with": values}) + "\n")
        self.process.stdin.flush()

    def call(self, call: str, *arguments: Any) -> Any:
        self.begin(call, *arguments)
        return self._read()["answer"]

    def result(self) -> Any:
        return self._read()["answer"]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@pytest.fixture
def nodes() -> Iterator[Any]:
    """Makes nodes; ends them, and checks that none holds anything."""
    made: list[Node] = []

    def make(name: str, **settings: Any) -> Node:
        made.append(Node(name, **settings))
        return made[-1]

    yield make
    for node in made:
        node.node.close()


@pytest.fixture
def peers() -> Iterator[Any]:
    made: list[Peer] = []

    def make(name: str, **settings: Any) -> Peer:
        made.append(Peer(name, **settings))
        return made[-1]

    yield make
    for peer in made:
        peer.end()
