"""A snapshot of a large cache beside steps that change it."""

import asyncio

from engine_harness import prompt, running, sim

BLOCKS = 12_000


def chains(parts) -> list[int]:
    return [value for _, stores in parts for event in stores for value in event.stored.chain]


async def fill(driver, prompts: int, tokens: int) -> None:
    attempts = [driver.place(prompt(tokens, seed), max_tokens=1) for seed in range(prompts)]
    for attempt in attempts:
        assert await attempt.ended() == "finished"


async def test_steps_run_to_their_end_between_two_parts() -> None:
    engine = sim(blocks=BLOCKS)
    batches = []

    async def follow() -> None:
        async for batch in engine.events():
            batches.append(batch)

    async with running(engine) as driver:
        follower = asyncio.create_task(follow())
        await fill(driver, 20, 8_000)
        await driver.idle()
        parts = engine.snapshot()
        view = [await anext(parts)]
        number = view[0][0]
        assert len(chains(view)) < engine.load().kv.evictable
        # The snapshot is held here, and the engine works: it drops prefixes
        # for those of new prompts, and streams decode.
        streams = [driver.place(prompt(600, 100 + i), max_tokens=200) for i in range(8)]
        await fill(driver, 30, 8_100)
        for stream in streams:
            assert await stream.ended() == "finished"
        await driver.idle()
        view += [part async for part in parts]
        after = {value for value in chains([part async for part in engine.snapshot()])}
    await follower

    assert {told for told, _ in view} == {number}
    seen = set(chains(view))
    at = 0
    for batch in batches:
        assert batch.first_event == at + 1
        for event in batch.events:
            at += 1
            if at > number:
                seen.update(event.stored.chain)
                seen.difference_update(event.removed.chain)
    assert seen == after


async def test_ancestors_come_before_those_who_follow_them() -> None:
    engine = sim(blocks=2_000)
    async with running(engine) as driver:
        for seed in range(5):
            await driver.place(prompt(3_000, seed), max_tokens=1).ended()
        await driver.idle()
        known: set[int] = set()
        roots: set[int] = set()
        async for _, stores in engine.snapshot():
            for event in stores:
                assert len(event.stored.chain) <= 4_096
                if event.stored.parent not in known:
                    roots.add(event.stored.parent)
                known.update(event.stored.chain)
    # One namespace: everything hangs on one root.
    assert len(roots) == 1
    assert len(known) == engine.load().kv.evictable
