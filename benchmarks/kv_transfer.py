"""How fast do KV blocks move between two workers, beside what the machine can do?

Two processes, each with a pool of blocks and a transfer node, on one host:

- shared memory beside a memcpy between two mappings of the same page sizes,
  one thread each, block by block in the same order (shm_over_memcpy);
- TCP beside a plain loopback socket that sends from and receives into the same
  kind of memory (tcp_over_socket).

The transfer's time is from the pull to the commit's verification: slot versions,
checksum at the sender and checksum at the receiver are all in it. A and B run
in alternating blocks; figures are medians of blocks. A block during which the
machine was busy with something else is repeated, and counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from kvmesh import _router

BLOCK_BYTES = 46 * 1024 * 16
"""A block of 16 tokens of SmolLM2-135M in fp32: 30 layers, K and V, 3 x 64 floats."""
WORKER, INCARNATION, BLOCK_TOKENS = "prefill", 1, 16
TRIES = 4
"""Runs of a block before it is kept although the machine was busy."""


def node(pool: _router.KvPool, name: str, shared_memory: bool) -> _router.TransferNode:
    return _router.TransferNode(
        pool,
        worker_id=name,
        incarnation=INCARNATION,
        compatibility=b"",
        block_tokens=BLOCK_TOKENS,
        shared_memory=shared_memory,
        copy_threads=1,
    )


def wait_for(at: _router.TransferNode, kind: type, failure: type) -> Any:
    while True:
        at.wait(60.0)
        for event in at.poll():
            if isinstance(event, failure):
                raise RuntimeError(f"transfer failed: {event.reason} {event.message}")
            if isinstance(event, kind):
                return event


def sender_process(pipe: Connection, blocks: int) -> None:
    """The worker that has the blocks: offers what it is told to, until told to end."""
    pool = _router.KvPool(blocks, BLOCK_BYTES, populate=True)
    content = np.frombuffer(pool, dtype=np.uint64)
    content[:] = np.arange(content.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    slots = list(range(blocks))
    with node(pool, WORKER, True) as near, node(pool, WORKER, False) as far:
        pipe.send((near.address, far.address))
        while True:
            command = pipe.recv()
            if command is None:
                return
            if command[0] == "socket":
                send_plain(command[1], memoryview(pool))
                continue
            at = near if command[0] == "shm" else far
            transfer_id = command[1]
            at.offer(transfer_id, blocks)
            at.ready(transfer_id, 0, slots)
            at.commit(transfer_id, blocks * BLOCK_TOKENS)
            pipe.send("offered")
            wait_for(at, _router.SenderReleased, _router.SenderAborted)


def send_plain(port: int, content: memoryview) -> None:
    with socket.create_connection(("127.0.0.1", port)) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.recv(1)
        for start in range(0, len(content), BLOCK_BYTES):
            stream.sendall(content[start : start + BLOCK_BYTES])
        stream.recv(1)


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU: of all, and of this benchmark's two processes."""

    busy: float
    own: float

    @staticmethod
    def now(pids: list[int]) -> CpuTimes:
        tick = os.sysconf("SC_CLK_TCK")
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        own = 0
        for pid in pids:
            stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            own += int(stat[11]) + int(stat[12])
        return CpuTimes(busy / tick, own / tick)

    def foreign(self, before: CpuTimes) -> float:
        return max(0.0, (self.busy - before.busy) - (self.own - before.own))


class Receiver:
    """The worker that wants the blocks, and the two things it is compared with."""

    def __init__(self, blocks: int, pipe: Connection, sender_pid: int) -> None:
        self.blocks, self.pipe = blocks, pipe
        self.pids = [os.getpid(), sender_pid]
        self.pool = _router.KvPool(blocks, BLOCK_BYTES, populate=True)
        self.source = _router.KvPool(blocks, BLOCK_BYTES, populate=True)
        self.slots = list(range(blocks))
        self.nbytes = blocks * BLOCK_BYTES
        self.repeated = 0
        near, far = pipe.recv()
        self.ways = {
            "shm": (node(self.pool, "decode", True), near),
            "tcp": (node(self.pool, "decode", False), far),
        }

    def close(self) -> None:
        for at, _ in self.ways.values():
            at.close()

    def transfer(self, way: str) -> float:
        at, address = self.ways[way]
        transfer_id = os.urandom(16)
        self.pool.raise_versions(self.slots)
        self.pipe.send((way, transfer_id))
        assert self.pipe.recv() == "offered"
        at.pull(transfer_id, address, WORKER, INCARNATION, 0, self.slots)
        event = wait_for(at, _router.Committed, _router.ReceiveFailed)
        if event.shared_memory != (way == "shm") or event.bytes != self.nbytes:
            raise RuntimeError(f"not what was to be measured: {event.shared_memory} {event.bytes}")
        return float(event.seconds)

    def memcpy(self) -> float:
        to = np.frombuffer(self.pool, dtype=np.uint8).reshape(self.blocks, BLOCK_BYTES)
        source = np.frombuffer(self.source, dtype=np.uint8).reshape(self.blocks, BLOCK_BYTES)
        start = time.perf_counter()
        for i in range(self.blocks):
            np.copyto(to[i], source[i])
        return time.perf_counter() - start

    def plain_socket(self) -> float:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.pipe.send(("socket", listener.getsockname()[1]))
            stream, _ = listener.accept()
        content = memoryview(self.pool)
        with stream:
            start = time.perf_counter()
            stream.sendall(b"g")
            at = 0
            while at < self.nbytes:
                at += stream.recv_into(content[at : at + BLOCK_BYTES])
            took = time.perf_counter() - start
            stream.sendall(b"e")
        return took

    def quiet(self, run: Callable[[], float]) -> float:
        """One block, repeated while others use the machine (over 10 % of a core)."""
        for _ in range(TRIES):
            before, start = CpuTimes.now(self.pids), time.perf_counter()
            took = run()
            elapsed = time.perf_counter() - start
            if CpuTimes.now(self.pids).foreign(before) <= max(0.1 * elapsed, 0.02):
                return took
            self.repeated += 1
        return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures there")
    parser.add_argument("--quick", action="store_true", help="under 60 s; not evidence")
    arguments = parser.parse_args()
    blocks, rounds = (128, 7) if arguments.quick else (384, 31)

    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=sender_process, args=(theirs, blocks), daemon=True)
    process.start()
    assert process.pid is not None
    receiver = Receiver(blocks, pipe, process.pid)
    runs: dict[str, Callable[[], float]] = {
        "memcpy": receiver.memcpy,
        "shm": lambda: receiver.transfer("shm"),
        "socket": receiver.plain_socket,
        "tcp": lambda: receiver.transfer("tcp"),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for run in runs.values():
            run()  # Connections, page tables, first use.
        for index in range(rounds):
            order = list(runs.items())
            for name, run in order if index % 2 == 0 else reversed(order):
                took[name].append(receiver.quiet(run))
    finally:
        receiver.close()
        pipe.send(None)
        process.join(10)

    rate = {name: receiver.nbytes / statistics.median(times) / 1e9 for name, times in took.items()}
    ratios = {
        "shm_over_memcpy": rate["shm"] / rate["memcpy"],
        "tcp_over_socket": rate["tcp"] / rate["socket"],
    }
    mega = receiver.nbytes / 1e6
    print(f"{blocks} blocks of {BLOCK_BYTES} bytes ({mega:.0f} MB), {rounds} rounds, medians;")
    print(f"{receiver.repeated} blocks repeated because the machine was busy")
    print(f"{'':24}{'GB/s':>8}{'best':>8}{'worst':>8}")
    for name, times in took.items():
        best, worst = receiver.nbytes / min(times) / 1e9, receiver.nbytes / max(times) / 1e9
        print(f"{name:24}{rate[name]:8.2f}{best:8.2f}{worst:8.2f}")
    for name, ratio in ratios.items():
        print(f"{name:24}{ratio:8.2f}")
    if arguments.quick:
        print("quick: not evidence")
    if arguments.json:
        figures = [
            {"name": name, "value": value, "unit": "ratio", "better": "higher"}
            for name, value in ratios.items()
        ] + [
            {"name": f"{name}_gb_s", "value": value, "unit": "GB/s", "better": "higher"}
            for name, value in rate.items()
        ]
        result = {"figures": figures, "quick": arguments.quick, "repeated": receiver.repeated}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
