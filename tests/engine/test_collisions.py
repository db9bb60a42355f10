"""Every hash of the chain is the same: what is read goes by token ids alone."""

import pytest
from engine_harness import VOCABULARY, prompt
from test_hand_off import pair, request

from kvmesh.engine.core.chain import Chain
from kvmesh.engine.sim.content import reference_tokens
from kvmesh.v1 import worker_pb2 as wire

UNIT_BYTES = 16 * 4


@pytest.fixture(autouse=True)
def colliding(monkeypatch) -> None:
    """Hash scheme 1 with one value for everything."""
    monkeypatch.setattr(Chain, "root", lambda self, adapter, cache_salt: 5)
    monkeypatch.setattr(Chain, "hashes", lambda self, parent, ids: [5] * (len(ids) // UNIT_BYTES))


@pytest.mark.parametrize("warm", ["p", "d", "both"])
async def test_a_hand_off_finds_no_wrong_block(warm) -> None:
    async with pair() as (p, d):
        for driver, name in ((p, "p"), (d, "d")):
            if warm in (name, "both"):
                # Other prompts of the same length, and one that shares a beginning.
                for seed in (7, 8):
                    await driver.place(prompt(200, seed), max_tokens=1).ended()
                await driver.place(prompt(96) + prompt(104, 9), max_tokens=1).ended()
        prefill, decode = await request(p, d, prompt(200), max_tokens=20)
        assert await decode.ended() == "finished"
        assert decode.tokens == reference_tokens(prompt(200), 20, VOCABULARY)
        # What they share is used; what only has the same hash is not.
        assert decode.opening.reserved.tokens_held == (0 if warm == "p" else 96)
        assert prefill.end.timings.cached_tokens == (0 if warm == "d" else 96)
        await p.idle()
        await d.idle()


async def test_a_pulled_prefix_is_the_one_that_was_asked_for() -> None:
    async with pair() as (holder, asker):
        await holder.place(prompt(320, 7), max_tokens=1).ended()
        await holder.place(prompt(160) + prompt(160, 8), max_tokens=1).ended()
        source = wire.PrefixSource(
            worker="p", incarnation=11, address=holder.engine.transfer_address, tokens=304
        )
        attempt = asker.place(prompt(320), prefix_from=source, max_tokens=20)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == reference_tokens(prompt(320), 20, VOCABULARY)
        assert attempt.end.timings.pulled_tokens == 160
        await holder.idle()
        await asker.idle()
