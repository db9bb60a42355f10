"""Do the streams of a session feel what else the worker does?

64 streams run on one Python worker (engine sim, every step takes 10 ms whatever it holds), behind a
raw Attach client that notes when each token comes. Beside them, from another process:

- a router attaches that knows nothing, and is sent a snapshot of 1 M blocks, again and again;
- eight prompts of 8,000 tokens, again and again;
- a router downloads the tokeniser, again and again.

    python benchmarks/session.py [--quick] [--json FILE]

The figure is the 99th percentile of the time between two tokens of a stream beside each of the
three, over the same with nothing beside; blocks in turn, medians of blocks. The worker has one core
and the clients another.

A step takes its 10 ms with prompts in it, too: the profile's cost of a prompt's token is 0. So the
eight prompts cost the engine nothing, and what is measured of them is the port: placing them,
hashing, their cache events. What computing long prompts does to streams is isolation.py's question.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing as mp
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from alternating import (
    Blocks,
    Figure,
    alternate,
    is_evidence,
    print_figures,
    print_table,
    write_json,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.v1 import worker_pb2 as wire
from kvmesh.v1 import worker_pb2_grpc

STREAMS = 64
PROMPTS, PROMPT_TOKENS = 8, 8000
FILL_TOKENS = 96_000
"""Length of the prompts that fill the cache."""
BLOCK_TOKENS, VOCABULARY = 16, 50_000
CASES = ("alone", "snapshot", "prompts", "tokenizer")
START_S = 60.0
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


class Attached:
    """A session with the worker, from the router's side."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        # Frames stay bytes here: when one came is noted before it is read.
        self._call = channel.stream_stream(
            "/kvmesh.v1.Worker/Attach",
            request_serializer=wire.RouterFrame.SerializeToString,
            response_deserializer=None,
        )()
        self._name = name
        self._number = 0
        self.model = ""

    async def hello(self) -> None:
        version = wire.ProtocolVersion(major=1)
        hello = wire.RouterHello(
            version=version, router_id=self._name, router_incarnation=random.getrandbits(62) | 1
        )
        await self._call.write(wire.RouterFrame(hello=hello))
        answer = wire.WorkerFrame.FromString(await self._call.read())
        self.model = answer.hello.record.model.name

    async def place(self, tokens: int, max_tokens: int) -> bytes:
        """Places a prompt that no one had before; its generation."""
        self._number += 1
        generation = os.urandom(16)
        continuation = wire.Continuation(
            model=self.model,
            prompt_ids=random.choices(range(300, VOCABULARY), k=tokens),
            sampling=wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0),
            max_tokens=max_tokens,
        )
        place = wire.Place(
            generation=generation,
            owner=1,
            attempt=1,
            stage=wire.STAGE_WHOLE,
            continuation=continuation,
        )
        await self._call.write(wire.RouterFrame(number=self._number, place=place))
        return generation

    async def cancel(self, generation: bytes) -> None:
        self._number += 1
        cancel = wire.Cancel(generation=generation, owner=1, attempt=1)
        await self._call.write(wire.RouterFrame(number=self._number, cancel=cancel))

    async def frames(self) -> AsyncIterator[tuple[float, wire.WorkerFrame]]:
        """When a frame came, and what it says."""
        while (raw := await self._call.read()) is not grpc.aio.EOF:
            came = time.perf_counter()
            yield came, wire.WorkerFrame.FromString(raw)

    def close(self) -> None:
        self._call.cancel()


# -- what runs beside ------------------------------------------------------


class Beside:
    """The other process: does one thing again and again until it is told to stop."""

    def __init__(self, address: str) -> None:
        self._address = address

    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._address, options=UNLIMITED)

    async def snapshot(self, done: Callable[[int], None]) -> None:
        """Snapshots; counts blocks."""
        async with self._channel() as channel:
            while True:
                session = Attached(channel, "beside-snapshot")
                await session.hello()
                async for _, frame in session.frames():
                    if not frame.cache.HasField("snapshot"):
                        continue
                    done(sum(len(event.stored.chain) for event in frame.cache.events))
                    if frame.cache.snapshot.last:
                        break
                session.close()

    async def prompts(self, done: Callable[[int], None]) -> None:
        """Prompts, eight at a time; counts them."""
        await self._prompts(PROMPT_TOKENS, done)

    async def fill(self, done: Callable[[int], None]) -> None:
        """Long prompts; counts their blocks."""
        await self._prompts(FILL_TOKENS, lambda n: done(n * FILL_TOKENS // BLOCK_TOKENS))

    async def _prompts(self, tokens: int, done: Callable[[int], None]) -> None:
        async with self._channel() as channel:
            session = Attached(channel, "beside-prompts")
            await session.hello()
            for _ in range(PROMPTS):
                await session.place(tokens, 1)
            async for _, frame in session.frames():
                for end in frame.step.ends:
                    if not end.HasField("finished"):
                        raise RuntimeError(f"a prompt ended: {end}")
                    done(1)
                    await session.place(tokens, 1)

    async def tokenizer(self, done: Callable[[int], None]) -> None:
        """Downloads; counts bytes."""
        while True:
            async with self._channel() as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                async for part in stub.GetTokenizer(wire.GetTokenizerRequest()):
                    done(len(part.data))


def beside_process(pipe: Connection, address: str, core: int) -> None:
    os.sched_setaffinity(0, {core})
    # Of the clients on one core, the one that takes times goes first.
    os.nice(10)
    asyncio.run(serve_beside(pipe, address))


async def serve_beside(pipe: Connection, address: str) -> None:
    """Commands: (what, count to stop at or 0), answered with the count; None ends."""
    beside = Beside(address)
    while (command := await asyncio.to_thread(pipe.recv)) is not None:
        what, limit = command
        count, full = 0, asyncio.Event()

        def done(n: int, limit: int = limit, full: asyncio.Event = full) -> None:
            nonlocal count
            count += n
            if limit and count >= limit:
                full.set()

        task = asyncio.create_task(getattr(beside, what)(done))
        stop = asyncio.create_task(full.wait() if limit else asyncio.to_thread(pipe.recv))
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        pipe.send(count)


# -- what is measured ------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One block."""

    itl_p50_ms: float
    itl_p99_ms: float
    tokens: int
    beside: float
    """Blocks, prompts or bytes a second beside."""


@dataclass
class Streams:
    """The streams that are watched."""

    session: Attached
    last: dict[bytes, float] = field(default_factory=dict)
    """When a stream's last token came."""
    between: list[float] | None = None
    """Times between two tokens, while they count."""
    ended: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        async for came, frame in self.session.frames():
            rows = frame.step.tokens
            for i in range(len(rows.counts)):
                generation = rows.generations[16 * i : 16 * i + 16]
                before = self.last.get(generation)
                self.last[generation] = came
                if before is not None and self.between is not None:
                    self.between.append(came - before)
            for opening in frame.step.openings:
                if opening.HasField("refused"):
                    raise RuntimeError(f"refused: {opening}")
            self.ended += len(frame.step.ends)
            self.changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.changed.clear()
            await self.changed.wait()

    async def block(
        self, start: Callable[[], None], stop: Callable[[], int], window: float
    ) -> Reading:
        """Starts streams, measures them while something runs beside, ends them."""
        self.last.clear()
        self.ended = 0
        generations = [await self.session.place(32, 100_000) for _ in range(STREAMS)]
        await self.until(lambda: len(self.last) == STREAMS)
        start()
        # What begins beside has begun.
        await asyncio.sleep(0.3)
        self.between, began = [], time.perf_counter()
        await asyncio.sleep(window)
        took, between = time.perf_counter() - began, sorted(self.between)
        self.between = None
        count = await asyncio.to_thread(stop)
        for generation in generations:
            await self.session.cancel(generation)
        await self.until(lambda: self.ended == STREAMS)
        return Reading(
            itl_p50_ms=1e3 * between[len(between) // 2],
            itl_p99_ms=1e3 * between[len(between) * 99 // 100],
            tokens=len(between),
            beside=count / took,
        )


def start_worker(port: int, blocks: int, core: int, log: Path) -> subprocess.Popen[bytes]:
    # Room for the running streams and the prompts beside the blocks that stay.
    tokens = (blocks + 65_536) * BLOCK_TOKENS
    with log.open("wb") as output:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "kvmesh.cli", "worker", "--role", "both"),
                *("--engine", "sim", "--listen", f"127.0.0.1:{port}"),
                *("--kv-pool-tokens", str(tokens)),
                *(
                    "--engine-arguments",
                    f"profile=step-10ms,block_bytes=128,vocabulary={VOCABULARY}",
                ),
            ],
            stdout=output,
            stderr=output,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def serving(channel: grpc.aio.Channel) -> None:
    """Returns when the worker's health is SERVING: it answers before its model is loaded."""
    await channel.channel_ready()
    health = health_pb2_grpc.HealthStub(channel)
    async for status in health.Watch(health_pb2.HealthCheckRequest()):
        if status.status == health_pb2.HealthCheckResponse.SERVING:
            return


async def attach(address: str, worker: subprocess.Popen[bytes]) -> Streams:
    channel = grpc.aio.insecure_channel(address, options=UNLIMITED)
    ready = asyncio.create_task(serving(channel))
    deadline = time.monotonic() + START_S
    while not ready.done():
        if worker.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the worker does not serve (status {worker.poll()})")
        await asyncio.wait([ready], timeout=0.1)
    await ready
    session = Attached(channel, "watched")
    await session.hello()
    return Streams(session)


def run(blocks: int, rounds: int, window: float, log: Path) -> tuple[Blocks[Reading], int]:
    cores = sorted(os.sched_getaffinity(0))
    port = free_port()
    address = f"127.0.0.1:{port}"
    worker = start_worker(port, blocks, cores[0], log)
    os.sched_setaffinity(0, {cores[-1]})
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=beside_process, args=(theirs, address, cores[-1]), daemon=True)
    process.start()
    # It holds its end alone: should it die, waiting for it ends.
    theirs.close()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)

    def await_(what: Awaitable[Any]) -> Any:
        return loop.run_until_complete(what)

    def ask(what: str, limit: int) -> int:
        pipe.send((what, limit))
        return int(pipe.recv())

    try:
        streams = await_(attach(address, worker))
        reader = loop.create_task(streams.read())
        print(f"filling the cache with {blocks:,} blocks", file=sys.stderr)
        await_(asyncio.to_thread(ask, "fill", blocks))

        def block(case: str) -> Reading:
            def start() -> None:
                if case != "alone":
                    pipe.send((case, 0))

            def stop() -> int:
                return ask_end() if case != "alone" else 0

            def ask_end() -> int:
                pipe.send("stop")
                return int(pipe.recv())

            reading: Reading = await_(streams.block(start, stop, window))
            if reader.done():
                reader.result()
            return reading

        cases = {case: (lambda case=case: block(case)) for case in CASES}
        for case in CASES:
            block(case)
        assert process.pid is not None
        pids = [worker.pid, process.pid]
        return alternate(cases, rounds, lambda: pids), blocks  # type: ignore[arg-type]
    finally:
        pipe.send(None)
        process.join(5)
        process.kill()
        worker.terminate()
        try:
            worker.wait(15)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


UNITS = {"alone": "", "snapshot": "blocks/s", "prompts": "prompts/s", "tokenizer": "bytes/s"}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; not evidence")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="the worker's output")
    options = parser.parse_args()
    blocks, rounds, window = (20_000, 1, 1.2) if options.quick else (1_000_000, 7, 4.0)
    results, filled = run(blocks, rounds, window, options.log)
    head = ["beside", "ITL p50 ms", "p99 ms", "p99 over alone", "beside/s", "unit", "tokens"]
    p99 = {case: results.median(case, lambda r: r.itl_p99_ms) for case in CASES}
    rows = [
        [
            case,
            results.median(case, lambda r: r.itl_p50_ms),
            p99[case],
            p99[case] / p99["alone"],
            results.median(case, lambda r: r.beside),
            UNITS[case],
            sum(r.tokens for r in results.results[case]),
        ]
        for case in CASES
    ]
    print_table(
        f"{STREAMS} streams beside other work; {filled:,} blocks cached; prompts cost no step time",
        head,
        rows,
    )
    figures = [
        Figure(f"itl_p99_ratio_{case}", p99[case] / p99["alone"], "ratio", "lower")
        for case in CASES[1:]
    ]
    figures.append(Figure("itl_p99_alone_ms", p99["alone"], "ms", "lower"))
    print_figures(figures)
    print(f"\n{results.repeated} blocks were repeated because others used the machine, ", end="")
    print(f"{results.kept_busy} were kept although they did.")
    evidence = is_evidence(quick=options.quick, busy=results.kept_busy > 0)
    if options.json is not None:
        kept, again = results.kept_busy, results.repeated
        write_json(
            options.json,
            figures,
            evidence=evidence,
            blocks_cached=filled,
            blocks_repeated=again,
            blocks_kept_busy=kept,
        )


if __name__ == "__main__":
    main()
