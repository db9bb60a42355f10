"""The way from the engine thread to the event loop."""

import asyncio
import threading

from kvmesh.engine.core.outbox import Outbox


def on_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


async def all_of(box) -> list:
    return [item async for item in box.read()]


async def test_items_come_in_order_and_close_ends_the_reader_behind_them() -> None:
    box: Outbox[int] = Outbox(1 << 20)

    def write() -> None:
        for number in range(50_000):
            box.put(number)
        box.close()

    reader = asyncio.create_task(all_of(box))
    thread = threading.Thread(target=write)
    thread.start()
    async with asyncio.timeout(30):
        assert await reader == list(range(50_000))
    thread.join()


async def test_a_busy_loop_is_called_once_for_many_items(monkeypatch) -> None:
    box: Outbox[int] = Outbox(1 << 20)
    reader = asyncio.create_task(all_of(box))
    # The reader waits now.
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    calls = []
    call = loop.call_soon_threadsafe
    monkeypatch.setattr(
        loop, "call_soon_threadsafe", lambda *a, **k: (calls.append(1), call(*a, **k))[1]
    )
    # This thread is the loop's: it is busy until all of them are in.
    on_a_thread(lambda: [box.put(number) for number in range(1_000)])
    assert len(calls) == 1
    box.close()
    assert await reader == list(range(1_000))


async def test_a_full_box_has_room_again_when_half_of_it_is_read() -> None:
    box: Outbox[int] = Outbox(8)
    for number in range(8):
        box.put(number)
    assert not box.wait_for_room(0)
    items = box.read()
    for number in range(4):
        assert await anext(items) == number
    assert box.wait_for_room(0)
    await items.aclose()


async def test_a_writer_that_waits_goes_on_when_the_reader_does() -> None:
    box: Outbox[int] = Outbox(4)

    def write() -> None:
        for number in range(200):
            while not box.wait_for_room(30):
                raise AssertionError("no room came")
            box.put(number)
        box.close()

    thread = threading.Thread(target=write)
    thread.start()
    async with asyncio.timeout(30):
        assert await all_of(box) == list(range(200))
    thread.join()


async def test_close_frees_a_writer_that_waits() -> None:
    box: Outbox[int] = Outbox(1)
    box.put(1)
    found = []
    thread = threading.Thread(target=lambda: found.append(box.wait_for_room(30)))
    thread.start()
    box.close()
    thread.join(30)
    assert found == [True]


def test_a_loop_that_is_gone_stops_nobody() -> None:
    box: Outbox[int] = Outbox(2)

    async def read_one() -> int:
        items = box.read()
        box.put(0)
        first = await anext(items)
        await items.aclose()
        return first

    assert asyncio.run(read_one()) == 0
    for number in range(10):
        box.put(number)
    assert box.wait_for_room(0)


async def test_without_a_reader_only_the_newest_are_kept() -> None:
    box: Outbox[int] = Outbox(10, keeps_unread=False)
    for number in range(1_000):
        box.put(number)
        assert box.wait_for_room(0)
    box.close()
    assert await all_of(box) == list(range(991, 1_000))
