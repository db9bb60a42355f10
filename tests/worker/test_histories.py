"""The worker does in every history what the reference worker does in the models.

Stateright checks routers against a reference worker (router_rs/session/tests). Here the worker
that serves is taken through histories of those models, over gRPC: what routers send, their
sessions that break and come back, what the engine says. After each step all is compared that
it has told each router and asked of its engine.

What is not compared, since the models leave it free:

- how tokens that follow each other are cut into rows and frames;
- what a router plans by and a person reads: load, cache events, step samples, timings, room in
  tokens, messages, the model's name;
- cancels of what the engine does not run: it ignores them (`contract.Engine.cancel`).
"""

import asyncio
import json
from itertools import zip_longest
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from port_rig import GENERATION, attach, read, running

from kvmesh.engine.contract import Placement, Stage, TokenColumns
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

_DATA = Path(__file__).parents[2] / "router_rs/session/tests/data"
_NOBODYS = bytes(16)
"""A generation that no history has. Find is always answered, in order: what its session was
told before is all that was said so far."""
_SHORT_WAITS = {"orphan_ttl_s": 0.05, "load_interval_ms": 10.0}
_ENDS = {
    "finished": {"finished": wire.StageFinished(reason=inference.FINISH_REASON_LENGTH)},
    "handed_off": {"handed_off": wire.HandedOff()},
    "handed_off engine": {"handed_off": wire.HandedOff(engine=wire.EngineHandOff(connector="c"))},
    "returned no_room": {"returned": wire.Returned(reason=wire.REFUSAL_REASON_NO_ROOM)},
    "transfer_failed": {"transfer_failed": wire.TransferFailed()},
}


def histories():
    for path in sorted(_DATA.glob("*.json")):
        data = json.loads(path.read_text())
        for history in data["histories"]:
            yield pytest.param(data["routers"], history["steps"], id=history["name"])


# -- the engine ----------------------------------------------------------------


class ToldEngine(FakeEngine):
    """Answers as the history tells it, and writes down what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.room = True
        self.asked: list[str] = []
        self.runs: dict[str, Placement] = {}

    def capabilities(self) -> wire.Capabilities:
        # As in the models: a prefill's token is one of the output.
        return wire.Capabilities(engine="told", block_tokens=16, prefill_emits_first_token=True)

    def submit(self, placement) -> None:
        name = name_of(placement.id)
        self.asked.append(f"place {name}")
        opening = placement.id.opening(placement.stage)
        if self.room:
            self.runs[name] = placement
            opening.reserved.SetInParent()
        else:
            opening.refused.reason = wire.REFUSAL_REASON_NO_ROOM
        self.emit(placement.router, step=0, openings=[opening])

    def cancel(self, attempts) -> None:
        for name in map(name_of, attempts):
            if name in self.runs:
                self.asked.append(f"cancel {name}")
                self.says(name, 0, [], {"cancelled": wire.Cancelled()})

    def hand_over(self, attempt, next_attempt, hand_off, border) -> None:
        self.asked.append(f"hand over {name_of(attempt)} to {next_attempt}")

    def says(self, name: str, first: int, ids: list[int], end: dict) -> None:
        placed = self.runs[name]
        parts = {}
        if ids:
            _, owner, attempt = placed.id
            parts["tokens"] = TokenColumns(GENERATION, [owner], [attempt], [first], [len(ids)], ids)
        if end:
            del self.runs[name]
            parts["ends"] = [placed.id.stage_end(placed.stage, wire.StageTimings(), **end)]
        self.emit(placed.router, **parts)


# -- frames in words, as router_rs/session/tests/histories has them ------------


def name_of(message) -> str:
    return f"{message.owner}.{message.attempt}"


def stage_of(message) -> str:
    return Stage(message.stage).name.lower()


def reason(of) -> str:
    return wire.RefusalReason.Name(of.reason).removeprefix("REFUSAL_REASON_").lower()


def opening_words(opening: wire.Opening) -> str:
    refused = opening.WhichOneof("answer") == "refused"
    answer = f"refused {reason(opening.refused)}" if refused else "reserved"
    return f"{name_of(opening)} {stage_of(opening)} {answer}"


def end_words(end: wire.StageEnd) -> str:
    how = end.WhichOneof("end")
    if how == "returned":
        how += f" {reason(end.returned)}"
    elif how == "handed_off" and end.handed_off.HasField("engine"):
        how += " engine"
    return f"{name_of(end)} {stage_of(end)} {how}"


def tokens_words(name: str, first: int, ids) -> str:
    return f"{name} tokens from {first}: {' '.join(map(str, ids))}"


def found_words(found: wire.Found) -> str:
    if found.refused:
        return f"claim refused, owner {found.owner}"
    if not found.known:
        return "found nothing"
    held = f"{stage_of(found)} next {found.next_index}"
    if found.resume_state:
        return f"gives {held}, {tokens_words(name_of(found), 0, found.output_ids)}"
    return f"found {name_of(found)} {held} digest {found.output_digest:016x}"


def row_words(rows: wire.TokenRows):
    ids = iter(rows.ids)
    columns = zip(rows.owners, rows.attempts, rows.first_indices, rows.counts, strict=True)
    for owner, attempt, first, count in columns:
        yield tokens_words(f"{owner}.{attempt}", first, [next(ids) for _ in range(count)])


def step_words(step: wire.StepOutput):
    yield from map(opening_words, step.openings)
    yield from row_words(step.tokens)
    yield from map(end_words, step.ends)
    yield from map(found_words, step.found)


def in_rows(said: dict[str, list[str]]) -> dict[str, list[str]]:
    return {router: joined(words) for router, words in said.items()}


def joined(said: list[str]) -> list[str]:
    """Tokens of an attempt that follow each other, in one row."""
    whole: list[str] = []
    for words in said:
        begin, _, ids = words.partition(": ")
        last, _, before = whole[-1].partition(": ") if whole else ("", "", "")
        name, _, first = last.rpartition(" ")
        follows = before and begin == f"{name} {int(first) + len(before.split())}"
        if follows:
            whole[-1] += f" {ids}"
        else:
            whole.append(words)
    return whole


# -- the routers ---------------------------------------------------------------


class Routers:
    """Those that are attached, and what each was told."""

    def __init__(self, rig) -> None:
        self._rig = rig
        self._calls = {}
        self._number = 0
        self.said: dict[str, list[str]] = {}

    async def attach(self, router: str, wants: list | None = None) -> None:
        reattach = []
        if wants:
            name, next_index = wants
            reattach.append(wire.Reattach(**named(name), next_index=next_index))
        self._calls[router], hello = await attach(
            self._rig, router, router_incarnation=1, reattach=reattach
        )
        for kept in hello.reattached:
            self._hears(router, f"goes on with {name_of(kept)} from {kept.next_index}")

    async def leave(self, router: str) -> None:
        self._calls.pop(router).cancel()
        while router in (await self._rig.stub.GetInfo(wire.GetInfoRequest())).routers:
            pass

    async def send(self, router: str, **command) -> None:
        self._number += 1
        await self._calls[router].write(wire.RouterFrame(number=self._number, **command))

    async def hear(self) -> None:
        """All that was said so far."""
        for router, call in self._calls.items():
            await self.send(router, find=wire.Find(generation=_NOBODYS))
            while True:
                step = await read(call, "step")
                if step.found and step.found[0].generation == _NOBODYS:
                    break
                for words in step_words(step):
                    self._hears(router, words)

    def _hears(self, router: str, words: str) -> None:
        self.said.setdefault(router, []).append(words)


class Replay:
    """A history and the worker that goes through it."""

    def __init__(self, rig, routers: Routers) -> None:
        self._rig = rig
        self._routers = routers

    async def see(self, step: dict) -> None:
        send, engine = self._routers.send, self._rig.engine
        match step:
            case {"attach": {"router": router, **wants}}:
                await self._routers.attach(router, **wants)
            case {"leave": {"router": router}}:
                await self._routers.leave(router)
            case {"place": {"router": router, "of": name, "room": room, **what}}:
                engine.room = room
                await send(router, place=place(name, what["stage"], what["output"]))
            case {"cancel": {"router": router, "of": name}}:
                await send(router, cancel=wire.Cancel(**named(name)))
            case {"hand_over": {"router": router, "of": name, "next_attempt": after}}:
                command = wire.HandOver(**named(name), next_attempt=after)
                await send(router, hand_over=command)
            case {"find": {"router": router, "had": had}}:
                command = wire.Find(generation=GENERATION, tenant="t", next_index=had)
                await send(router, find=command)
            case {"claim": {"router": router, "owner": owner}}:
                command = wire.Claim(generation=GENERATION, owner=owner, tenant="t")
                await send(router, claim=command)
            case {"engine": {"of": name, "first": first, "ids": ids, **end}}:
                engine.says(name, first, ids, _ENDS[end["end"]] if end else {})
            case {"expire": {}}:
                while not engine.asked:
                    await self._rig.stub.GetInfo(wire.GetInfoRequest())
            case _:
                raise ValueError(f"a history has a step that is not known here: {step}")

    async def what_came(self) -> tuple[list[str], dict[str, list[str]]]:
        """What was asked of the engine, and told to routers, since the last time."""
        # Commands are read; then the process has taken them, its engine's answers included.
        await self._routers.hear()
        await self._rig.stub.GetInfo(wire.GetInfoRequest())
        await self._routers.hear()
        asked, said = self._rig.engine.asked, self._routers.said
        self._rig.engine.asked, self._routers.said = [], {}
        return asked, said


def named(name: str) -> dict:
    owner, attempt = map(int, name.split("."))
    return {"generation": GENERATION, "owner": owner, "attempt": attempt}


def place(name: str, stage: str, output: list[int]) -> wire.Place:
    return wire.Place(
        **named(name),
        stage=Stage[stage.upper()].value,
        continuation=wire.Continuation(model="m", prompt_ids=[1, 2], output_ids=output),
        resume_state=b"all of it",
        tenant="t",
    )


@pytest.mark.parametrize(("routers", "steps"), [*histories()])
async def test_the_worker_does_what_the_reference_does(routers, steps) -> None:
    waits = any("expire" in step for step in steps)
    settings = _SHORT_WAITS if waits else {}
    # A worker that says too little ends the test, too.
    async with asyncio.timeout(60), running(ToldEngine(), **settings) as rig:
        attached = Routers(rig)
        for router in routers:
            await attached.attach(router)
        replay = Replay(rig, attached)
        for step, after in zip_longest(steps, steps[1:], fillvalue={}):
            await replay.see(step)
            if "expire" in after:
                # The wait runs: what comes of it is compared when it is over.
                continue
            asked, said = await replay.what_came()
            assert (step, asked, in_rows(said)) == (
                step, step.get("asked", []), in_rows(step.get("said", {})),
            )  # fmt: skip
