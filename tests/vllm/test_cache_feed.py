"""A reader of cache events that fails is followed by another one."""

import threading

import pytest
from engine_harness import running, until
from fake_core import BLOCK, engine

from kvmesh.engine.contract import CLEARED, STORED
from kvmesh.engine.vllm import loop
from kvmesh.engine.vllm.loop import Endpoints


def stored(hash, ids):
    return {
        "type": "BlockStored",
        "block_hashes": [hash],
        "parent_block_hash": None,
        "token_ids": ids,
        "block_size": BLOCK,
        "extra_keys": [None],
    }


@pytest.mark.parametrize(
    "failure", [ValueError("no msgpack"), IndexError("no batch"), OSError("no socket")]
)
async def test_what_was_known_is_forgotten_and_built_up_anew(monkeypatch, caplog, failure) -> None:
    made = []
    serving, breaks = threading.Event(), threading.Event()

    class Feed:
        def __init__(self, events, replay, cache, told) -> None:
            assert (events, replay) == ("e", "r")
            made.append(self)
            self.number, self.cache, self.told = len(made), cache, told

        async def run(self) -> None:
            # What came before the engine serves is forgotten there.
            await until(serving.is_set)
            ids = [self.number * 100 + at for at in range(BLOCK)]
            self.cache.apply([0.0, [stored(self.number, ids)], 0])
            self.told()
            await until(lambda: self.number == 1 and breaks.is_set())
            raise failure

    monkeypatch.setattr(loop, "EventFeed", Feed)
    monkeypatch.setattr(loop, "AGAIN_S", 0.0)
    async with running(engine(endpoints=Endpoints("e", "r"))) as driver:

        def told():
            return [change.kind for batch in driver.batches for change in batch.changes]

        await driver.changed.wait()
        serving.set()
        await until(lambda: told() == [STORED])
        breaks.set()
        await until(lambda: told() == [STORED, CLEARED, STORED])
        assert [len(part) for part in driver.engine.snapshot()] == [1]
    assert str(failure) in caplog.text
    assert len(made) == 2
