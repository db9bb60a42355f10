"""The asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc
import grpc.aio

from kvmesh.client.channel import call_metadata, channel_options, credentials_for, resolve_target
from kvmesh.client.errors import error_from_rpc
from kvmesh.client.events import Event, Result, ResultBuilder, event_from_wire
from kvmesh.client.recovery import Recovery
from kvmesh.client.request import GenerateOptions, build_request, build_tokenize_request
from kvmesh.v1 import inference_pb2 as wire
from kvmesh.v1 import inference_pb2_grpc as rpc


class AsyncClient:
    """As `Client`, with await.

    >>> async with kvmesh.AsyncClient("127.0.0.1:7440") as client:
    ...     async for event in client.generate(prompt="Once", max_tokens=8):
    ...         print(event)
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        credentials: grpc.ChannelCredentials | bool | None = None,
        token: str | None = None,
        recover_s: float = 30.0,
        options: Sequence[tuple[str, Any]] | None = None,
    ) -> None:
        self._recover_s = recover_s
        self.target = resolve_target(target)
        self._token = token
        secure = credentials_for(credentials)
        merged = channel_options(self.target, options)
        self._channel = (
            grpc.aio.secure_channel(self.target, secure, merged)
            if secure
            else grpc.aio.insecure_channel(self.target, merged)
        )
        self._stub = rpc.InferenceStub(self._channel)

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection, for calls that this class has no method for."""
        return self._channel

    async def generate(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  (a gRPC deadline, told to the server)
        request_id: str | None = None,
        metadata: Sequence[tuple[str, str]] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[Event]:
        """Streams a generation as typed events. Arguments as `Client.generate`."""
        options.setdefault("resumable", self._recover_s > 0)
        recovery = Recovery(build_request(options), timeout, self._recover_s)
        headers = call_metadata(self._token, request_id, metadata)
        while True:
            resume, timeout = recovery.resume, recovery.timeout
            call = (
                self._stub.Generate(recovery.request, timeout=timeout, metadata=headers)
                if resume is None
                else self._stub.Resume(resume, timeout=timeout, metadata=headers)
            )
            try:
                async for response in call:
                    event = event_from_wire(response)
                    if event is not None and recovery.take(event):
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error)
                failure.__cause__ = error
            finally:
                call.cancel()
            await asyncio.sleep(recovery.pause(failure))

    async def complete(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        request_id: str | None = None,
        metadata: Sequence[tuple[str, str]] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Result:
        """Runs a generation to its end. Arguments as `generate`."""
        builder = ResultBuilder()
        events = self.generate(timeout=timeout, request_id=request_id, metadata=metadata, **options)
        async for event in events:
            builder.add(event)
        return builder.result()

    async def tokenize(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        **options: Unpack[GenerateOptions],
    ) -> list[int]:
        """Token ids of `prompt` or `messages`, as `generate` would use them."""
        request = build_tokenize_request(options)
        try:
            response = await self._stub.Tokenize(
                request, timeout=timeout, metadata=call_metadata(self._token, None, None)
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return list(response.ids)

    async def models(self, *, timeout: float | None = None) -> list[wire.Model]:  # noqa: ASYNC109
        """The models that can be asked for."""
        try:
            response = await self._stub.ListModels(
                wire.ListModelsRequest(),
                timeout=timeout,
                metadata=call_metadata(self._token, None, None),
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return list(response.models)

    async def close(self) -> None:
        """Cancels what runs and closes the connection. Idempotent."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
