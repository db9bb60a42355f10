"""How fast do KV blocks move between two workers, beside what the machine can do?

Two processes, each with a pool of blocks and a transfer node, on one host:

- shared memory beside a memcpy between two mappings of the same page sizes,
  one thread each, block by block in the same order (shm_over_memcpy);
- TCP beside a plain loopback socket that sends from and receives into the same
  kind of memory (tcp_over_socket);
- TCP under TLS with certificates on both sides beside TCP without (tls_over_tcp).

The transfer's time is from the pull to the commit's verification: slot versions,
checksum at the sender and checksum at the receiver are all in it. All five move
the same number of bytes between mappings of the same kind, touched before: all
are pools, so that they lie in huge pages where the kernel gives them and in
small ones where not (--small-pages: in small ones at any rate). The table says
how much came in huge pages. A ratio is the median of the ratios of rounds.

Part two (second_token.py) is the hand-off as a client sees it, on clusters of
real processes with a real model.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import second_token
from alternating import (
    Blocks,
    Figure,
    alternate,
    is_evidence,
    print_figures,
    print_table,
    write_json,
)

from kvmesh import _router

BLOCK_BYTES = 46 * 1024 * 16
"""A block of 16 tokens of SmolLM2-135M in fp32: 30 layers, K and V, 3 x 64 floats."""
WORKER, INCARNATION, BLOCK_TOKENS = "prefill", 1, 16
WARM_UPS = 3
"""Runs of each case before any counts: connections, page tables, windows of the sockets."""


def certificates(folder: Path) -> None:
    """An authority, and a certificate of it for each worker, PEM files by their names."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca"
    )  # fmt: skip
    for name in (WORKER, "decode"):
        (folder / "names").write_text(f"subjectAltName=URI:kvmesh://default/worker/{name}\n")
        openssl(
            "req", *new_key, "-keyout", f"{name}.key", "-out", "request", "-subj", f"/CN={name}"
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", "request", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-extfile", "names", "-out", f"{name}.pem",
        )  # fmt: skip


def peer_tls(folder: Path, name: str) -> _router.PeerTls:
    files = (folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")
    return _router.PeerTls(*map(str, files), "default", name)


def node(
    pool: _router.KvPool, name: str, shared_memory: bool, tls: _router.PeerTls | None = None
) -> _router.TransferNode:
    return _router.TransferNode(
        pool,
        worker_id=name,
        incarnation=INCARNATION,
        compatibility=b"",
        block_tokens=BLOCK_TOKENS,
        shared_memory=shared_memory,
        copy_threads=1,
        tls=tls,
    )


def wait_for(at: _router.TransferNode, kind: type, failure: type) -> Any:
    while True:
        at.wait(60.0)
        for event in at.poll():
            if isinstance(event, failure):
                raise RuntimeError(f"transfer failed: {event.reason} {event.message}")
            if isinstance(event, kind):
                return event


def sender_process(pipe: Connection, blocks: int, huge: bool, folder: Path) -> None:
    """The worker that has the blocks: offers what it is told to, until told to end."""
    pool = _router.KvPool(blocks, BLOCK_BYTES, populate=True, huge_pages=huge)
    content = np.frombuffer(pool, dtype=np.uint64)
    content[:] = np.arange(content.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    slots = list(range(blocks))
    with (
        node(pool, WORKER, True) as near,
        node(pool, WORKER, False) as far,
        node(pool, WORKER, False, peer_tls(folder, WORKER)) as secured,
    ):
        ways = {"shm": near, "tcp": far, "tls": secured}
        pipe.send(({way: at.address for way, at in ways.items()}, huge_share(pool)))
        while True:
            command = pipe.recv()
            if command is None:
                return
            if command[0] == "socket":
                send_plain(command[1], memoryview(pool))
                continue
            at, transfer_id = ways[command[0]], command[1]
            at.offer(transfer_id, blocks)
            at.ready(transfer_id, 0, slots)
            at.commit(transfer_id, blocks * BLOCK_TOKENS)
            pipe.send("offered")
            wait_for(at, _router.SenderReleased, _router.SenderAborted)


def huge_share(*pools: _router.KvPool) -> float:
    """Share of pools that lies in huge pages."""
    return sum(pool.huge_use()[0] for pool in pools) / sum(pool.nbytes for pool in pools)


def send_plain(port: int, content: memoryview) -> None:
    with socket.create_connection(("127.0.0.1", port)) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.recv(1)
        for start in range(0, len(content), BLOCK_BYTES):
            stream.sendall(content[start : start + BLOCK_BYTES])
        stream.recv(1)


class Receiver:
    """The worker that wants the blocks, and the two things it is compared with."""

    def __init__(self, blocks: int, pipe: Connection, huge: bool, folder: Path) -> None:
        self.blocks, self.pipe = blocks, pipe
        self.pool, self.source = (
            _router.KvPool(blocks, BLOCK_BYTES, populate=True, huge_pages=huge) for _ in range(2)
        )
        self.slots = list(range(blocks))
        self.nbytes = blocks * BLOCK_BYTES
        addresses, sender_huge = pipe.recv()
        self.huge = (sender_huge, huge_share(self.pool, self.source))
        """Share in huge pages, of the sender's pool and of those here."""
        ends = {
            "shm": node(self.pool, "decode", True),
            "tcp": node(self.pool, "decode", False),
            "tls": node(self.pool, "decode", False, peer_tls(folder, "decode")),
        }
        self.ways = {way: (at, addresses[way]) for way, at in ends.items()}

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


def bytes_moved(blocks: int, rounds: int, huge: bool) -> tuple[list[Figure], dict[str, int]]:
    """Part one: the transfer beside what it is made of."""
    with tempfile.TemporaryDirectory() as folder:
        certificates(Path(folder))
        return _bytes_moved(blocks, rounds, huge, Path(folder))


def _bytes_moved(
    blocks: int, rounds: int, huge: bool, folder: Path
) -> tuple[list[Figure], dict[str, int]]:
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    arguments = (theirs, blocks, huge, folder)
    process = context.Process(target=sender_process, args=arguments, daemon=True)
    process.start()
    assert process.pid is not None
    receiver = Receiver(blocks, pipe, huge, folder)
    runs: dict[str, Callable[[], float]] = {
        "memcpy": receiver.memcpy,
        "shm": lambda: receiver.transfer("shm"),
        "socket": receiver.plain_socket,
        "tcp": lambda: receiver.transfer("tcp"),
        "tls": lambda: receiver.transfer("tls"),
    }
    try:
        for case in runs.values():
            for _ in range(WARM_UPS):
                case()
        blocks_run = alternate(runs, rounds, lambda: [process.pid or 0])
    finally:
        receiver.close()
        pipe.send(None)
        process.join(10)
    print("in huge pages: {:.0%} of the sender's pool, {:.0%} here".format(*receiver.huge))
    figures, counts = show(blocks_run, blocks, receiver.nbytes)
    figures.append(Figure("huge_page_share", min(receiver.huge), "share", "higher"))
    return figures, counts


def ratio(took: Blocks[float], ours: str, theirs: str) -> float:
    """Rate of ours over theirs: the median over rounds, each pair of one round."""
    pairs = zip(took.results[theirs], took.results[ours], strict=True)
    return statistics.median(reference / own for reference, own in pairs)


def show(took: Blocks[float], blocks: int, nbytes: int) -> tuple[list[Figure], dict[str, int]]:
    """Prints the table; gives the figures."""
    rate = {name: nbytes / statistics.median(times) / 1e9 for name, times in took.results.items()}
    rows = [
        [name, rate[name], nbytes / min(times) / 1e9, nbytes / max(times) / 1e9]
        for name, times in took.results.items()
    ]
    title = f"{blocks} blocks of {BLOCK_BYTES} bytes, {nbytes / 1e6:.0f} MB"
    print_table(title, ["", "GB/s", "best", "worst"], rows)
    ratios = {
        "shm_over_memcpy": ratio(took, "shm", "memcpy"),
        "tcp_over_socket": ratio(took, "tcp", "socket"),
        "tls_over_tcp": ratio(took, "tls", "tcp"),
    }
    figures = [Figure(name, value, "ratio", "higher") for name, value in ratios.items()]
    figures += [Figure(f"{name}_gb_s", value, "GB/s", "higher") for name, value in rate.items()]
    return figures, {"blocks_repeated": took.repeated, "blocks_kept_busy": took.kept_busy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures there")
    parser.add_argument("--quick", action="store_true", help="under 60 s; not evidence")
    parser.add_argument("--small-pages", action="store_true", help="do not ask for huge pages")
    parser.add_argument("--without-model", action="store_true", help="part one only")
    arguments = parser.parse_args()
    blocks, rounds = (128, 7) if arguments.quick else (384, 31)
    figures, counts = bytes_moved(blocks, rounds, not arguments.small_pages)
    if not arguments.without_model:
        more, others = second_token.measure(arguments.quick)
        figures += more
        counts = {name: counts[name] + others[name] for name in counts}
    print_figures(figures)
    print(
        f"\n{counts['blocks_repeated']} blocks were repeated because others used the machine, ",
        end="",
    )
    print(f"{counts['blocks_kept_busy']} were kept although they did.")
    evidence = is_evidence(quick=arguments.quick, busy=counts["blocks_kept_busy"] > 0)
    if arguments.json:
        write_json(arguments.json, figures, evidence=evidence, **counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
