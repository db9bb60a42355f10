"""A snapshot of a large cache beside steps that change it."""

from engine_harness import apply, chains_of, prompt, running, sim

BLOCKS = 12_000


async def fill(driver, prompts: int, tokens: int) -> None:
    attempts = [driver.place(prompt(tokens, seed), max_tokens=1) for seed in range(prompts)]
    for attempt in attempts:
        assert await attempt.ended() == "finished"


async def test_steps_run_to_their_end_between_two_parts() -> None:
    engine = sim(blocks=BLOCKS)
    async with running(engine) as driver:
        await fill(driver, 20, 8_000)
        await driver.idle()
        told_before = len(driver.batches)
        parts = engine.snapshot()
        view = [next(parts)]
        assert len(chains_of(view)) < engine.load().kv.evictable
        # The snapshot is held here, and the engine works: it drops prefixes
        # for those of new prompts, and streams decode.
        streams = [driver.place(prompt(600, 100 + i), max_tokens=200) for i in range(8)]
        await fill(driver, 30, 8_100)
        for stream in streams:
            assert await stream.ended() == "finished"
        await driver.idle()
        view += list(parts)
        after = set(chains_of(engine.snapshot()))

    due = 1
    seen = set(chains_of(view))
    for number, batch in enumerate(driver.batches):
        assert batch.first_event == due
        due += len(batch.changes)
        if number >= told_before:
            apply(seen, batch)
    assert seen == after


async def test_ancestors_come_before_those_who_follow_them() -> None:
    engine = sim(blocks=2_000)
    async with running(engine) as driver:
        for seed in range(5):
            await driver.place(prompt(3_000, seed), max_tokens=1).ended()
        await driver.idle()
        known: set[int] = set()
        roots: set[int] = set()
        for part in engine.snapshot():
            for change in part:
                assert len(change.chain) <= 4_096
                if change.parent not in known:
                    roots.add(change.parent)
                known.update(map(int, change.chain))
    # One namespace: everything hangs on one root.
    assert len(roots) == 1
    assert len(known) == engine.load().kv.evictable
