"""The reader of cache events at a publisher as vLLM's is: batches that nobody can read."""

import itertools
from contextlib import ExitStack

import msgspec
import pytest
import zmq
from engine_harness import running, until
from fake_core import BLOCK, engine

from kvmesh.engine.contract import CLEARED, STORED
from kvmesh.engine.vllm.loop import Endpoints


def stored(number):
    return {
        "type": "BlockStored",
        "block_hashes": [number],
        "parent_block_hash": None,
        "token_ids": [number * 100 + at for at in range(BLOCK)],
        "block_size": BLOCK,
        "extra_keys": [None],
    }


@pytest.mark.parametrize("unreadable", [(b"\xc1",), (msgspec.msgpack.encode(7),), (b"", b"")])
async def test_a_reader_goes_on_after_what_it_cannot_read(tmp_path, unreadable) -> None:
    events, replay = f"ipc://{tmp_path}/e", f"ipc://{tmp_path}/r"
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        publisher = stack.enter_context(context.socket(zmq.PUB))
        publisher.linger = 0
        publisher.bind(events)
        numbers = itertools.count()

        def publish(*payload):
            publisher.send_multipart((b"", next(numbers).to_bytes(8, "big"), *payload))

        async with running(engine(endpoints=Endpoints(events, replay))) as driver:

            def told():
                return [change.kind for batch in driver.batches for change in batch.changes]

            def heard(number, after):
                # Who subscribes late misses what came before.
                publish(msgspec.msgpack.encode([0.0, [stored(number)], 0]))
                return STORED in told()[after:]

            await driver.changed.wait()
            await until(lambda: heard(1, 0))
            publish(*unreadable)
            await until(lambda: told() == [STORED, CLEARED])
            await until(lambda: heard(2, 2))
