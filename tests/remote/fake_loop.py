"""The event loop of the fake servers: the one of the engines that are attached to them.

grpc.aio in two event loops of one process loses wake-ups now and then.
"""

import asyncio

from kvmesh.engine.remote.loop import event_loop


async def there(coroutine):
    """Runs a coroutine there, and waits for what it gives."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, event_loop()))


def do(function, *arguments) -> None:
    """Has something done there."""
    event_loop().call_soon_threadsafe(function, *arguments)
