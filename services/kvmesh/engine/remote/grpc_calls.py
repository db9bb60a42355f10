"""What gRPC says, in terms of `server.ServerError`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable
from typing import TypeVar

import grpc
import grpc.aio

from kvmesh.engine.remote.server import (
    FailedError,
    LostError,
    RejectedError,
    ServerError,
    UnreachableError,
    UnusableError,
)

CALL_S = 3.0
"""Longest wait for a call that computes nothing."""

OPTIONS = (
    # A batch of cache events has no bound of its own.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_REFUSED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
)
_UNKNOWN = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_MOST_TEXT = 300

T = TypeVar("T")


def told(error: grpc.aio.AioRpcError) -> ServerError:
    """A status as an error."""
    code, text = error.code(), (error.details() or "").strip()[:_MOST_TEXT]
    message = f"the server answers {code.name}: {text}"
    if code in _GONE:
        return UnreachableError(message)
    if code in _UNKNOWN:
        return RejectedError(f"{message}; set server_key to a key of it", code.value[0])
    if code in _REFUSED:
        return RejectedError(message, code.value[0])
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return UnusableError(message)
    return FailedError(message)


async def answer(call: Awaitable[T]) -> T:
    """A call's answer. Raises ServerError."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise told(error) from error


async def known(asked: Awaitable[T]) -> T:
    """What a server answered before. Raises UnreachableError where it does not now, LostError
    where it is another one."""
    try:
        return await asked
    except FailedError as error:
        # It had no time for this, say: that is a look in vain.
        raise UnreachableError(str(error)) from error
    except UnreachableError:
        raise
    except ServerError as error:
        raise LostError(str(error)) from error


async def messages(stream: AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """A stream's messages. Raises ServerError."""
    try:
        async for message in stream:
            yield message
    except grpc.aio.AioRpcError as error:
        raise told(error) from error
    finally:
        stream.cancel()  # type: ignore[attr-defined]
