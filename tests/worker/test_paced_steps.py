"""Steps that native code runs by itself bring what the engine's own loop brings."""

import asyncio
import os
import random
import threading
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from kvmesh._router import WorkerPort
from kvmesh.engine.core.engine import TransferSettings
from kvmesh.engine.sim.build import build_engine
from kvmesh.engine.sim.content import reference_tokens
from kvmesh.engine.sim.settings import SimSettings
from kvmesh.engine.sim.vocabulary import end_of_text_ids
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.v1 import worker_pb2_grpc as rpc
from kvmesh.worker.service import WorkerService
from kvmesh.worker.tokenizer_files import TokenizerFiles

ENDS = end_of_text_ids()
VOCABULARY = range(max(ENDS) + 1, 2000)
# Steps of half a millisecond, texts that mostly end by themselves.
SIM = SimSettings(profile="step-10ms", speed=20, end_of_text=150)


class Router:
    """A session; collects what its streams are told."""

    def __init__(self, stub, name) -> None:
        self._call = stub.Attach()
        self._name = name
        self._number = 0
        self.tokens: dict[bytes, list[int]] = {}
        self.ends: dict[bytes, wire.StageEnd] = {}
        self.samples: list[tuple[int, wire.StepSample]] = []
        self.context = 0
        self.changed = asyncio.Event()

    async def attach(self):
        hello = wire.RouterHello(version=wire.ProtocolVersion(major=1), router_id=self._name)
        await self._call.write(wire.RouterFrame(hello=hello))
        await self._call.read()
        self.reader = asyncio.create_task(self._read())
        return self

    def detach(self) -> None:
        self._call.cancel()
        self.reader.cancel()

    async def place(self, prompt, max_tokens) -> bytes:
        self._number += 1
        generation = os.urandom(16)
        self.tokens[generation] = []
        continuation = wire.Continuation(
            model="m", prompt_ids=prompt, max_tokens=max_tokens, stop_token_ids=ENDS
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

    async def cancel(self, generation) -> None:
        self._number += 1
        cancel = wire.Cancel(generation=generation, owner=1, attempt=1)
        await self._call.write(wire.RouterFrame(number=self._number, cancel=cancel))

    async def _read(self) -> None:
        while (frame := await self._call.read()) is not grpc.aio.EOF:
            step = frame.step
            at = 0
            for row, count in enumerate(step.tokens.counts):
                tokens = self.tokens[step.tokens.generations[16 * row : 16 * row + 16]]
                assert step.tokens.first_indices[row] == len(tokens)
                tokens.extend(step.tokens.ids[at : at + count])
                at += count
            if step.HasField("sample"):
                self.samples.append((step.step, step.sample))
            for end in step.ends:
                assert end.generation not in self.ends
                self.ends[end.generation] = end
            self.changed.set()

    async def until(self, holds) -> None:
        async with asyncio.timeout(30):
            while not holds():
                self.changed.clear()
                if self.reader.done():
                    self.reader.result()
                await self.changed.wait()


@asynccontextmanager
async def worker(sim=SIM):
    engine = build_engine(sim, pool_blocks=4096, transfer=TransferSettings())
    record = wire.WorkerRecord(
        worker_id="w", incarnation=7, role=wire.ROLE_BOTH, model=wire.ModelRecord(name="m")
    )
    files = TokenizerFiles.of({"tokenizer.json": b"{}"})
    port = WorkerPort("127.0.0.1:0")
    service = WorkerService(engine, port, record)
    engine.start(port)
    service.start()
    port.serve(record.SerializeToString(), list(files.files.items()), files.digest)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        try:
            yield engine, rpc.WorkerStub(channel)
        finally:
            await asyncio.to_thread(port.close, 0.1)
            await engine.close()
            await asyncio.to_thread(service.join)


def is_right(prompt, told, end, max_tokens) -> None:
    """The tokens of an undisturbed run, up to the limit or an end of text."""
    stopped = end.finished.reason == inference.FINISH_REASON_STOP
    assert stopped or end.finished.reason == inference.FINISH_REASON_LENGTH
    if stopped:
        assert told[-1] in ENDS
        told = told[:-1]
    else:
        assert len(told) == max_tokens
    assert told == reference_tokens(list(prompt), len(told), VOCABULARY)


async def test_streams_of_two_routers_come_and_go() -> None:
    rng = random.Random(5)
    async with worker() as (engine, stub):
        routers = [await Router(stub, name).attach() for name in ("a", "b")]
        asked = []
        for wave in range(3):
            for router in routers:
                for _ in range(4):
                    prompt = rng.choices(VOCABULARY, k=rng.randint(1, 100))
                    most = rng.randint(60, 400)
                    asked.append((router, prompt, most, await router.place(prompt, most)))
            # The next wave meets streams that are under way.
            first, _, _, generation = asked[8 * wave]
            await first.until(lambda r=first, g=generation: len(r.tokens[g]) > 20 or g in r.ends)
        for router in routers:
            await router.until(lambda r=router: len(r.ends) == 12)
        reasons = set()
        for router, prompt, most, generation in asked:
            end = router.ends[generation]
            is_right(prompt, router.tokens[generation], end, most)
            reasons.add(end.finished.reason)
        assert len(reasons) == 2, "both ways to end were met"
        assert engine.residue().requests == 0
        for router in routers:
            steps = [step for step, _ in router.samples]
            assert steps == sorted(set(steps))
            router.detach()


async def test_a_cancel_ends_a_stream_that_nothing_else_disturbs() -> None:
    async with worker(SimSettings(profile="step-10ms", speed=20)) as (engine, stub):
        router = await Router(stub, "a").attach()
        generations = [await router.place([300 + i], 100_000) for i in range(2)]
        await router.until(lambda: all(len(router.tokens[g]) > 100 for g in generations))
        assert engine._loop.steps._said.paced is not None, "what is tested runs"
        for generation in generations:
            await router.cancel(generation)
        await router.until(lambda: len(router.ends) == 2)
        assert {end.WhichOneof("end") for end in router.ends.values()} == {"cancelled"}
        assert any(sample.decode_batch == 2 for _, sample in router.samples)
        assert engine.residue().held_blocks == 0
        router.detach()


async def test_streams_that_fill_their_blocks_at_different_steps_seldom_need_a_look() -> None:
    async with worker(SimSettings(profile="step-10ms", speed=20)) as (engine, stub):
        router = await Router(stub, "a").attach()
        prompts = [range(300, 301 + i) for i in range(32)]
        # They begin together, however long it takes to ask for them.
        all_came, loop = threading.Event(), engine._loop
        loop.post(lambda _: all_came.wait())
        try:
            asked = {await router.place(prompt, 1000): prompt for prompt in prompts}
            async with asyncio.timeout(60):
                while True:
                    if len(loop._inbox) == len(prompts):
                        break
                    # Nothing tells of what the service has passed on.
                    await asyncio.sleep(0.001)
        finally:
            all_came.set()
        streams, steps, looks = loop.streams, loop.steps, []
        look = streams.take_due
        streams.take_due = lambda *a: (looks.append(steps.running.number), look(*a))[1]
        await router.until(lambda: len(router.ends) == len(asked))
        for generation, prompt in asked.items():
            is_right(prompt, router.tokens[generation], router.ends[generation], 1000)
        together = [
            step
            for step, sample in router.samples
            if sample.decode_batch == len(asked) and not sample.prefill_tokens
        ]
        assert len(together) > 900
        seen = [step for step in looks if together[0] < step < together[-1]]
        assert len(seen) * 32 < len(together)
        assert engine.residue().held_blocks == 0
        router.detach()
