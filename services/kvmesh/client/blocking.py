"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from kvmesh.client.channel import (
    Metadata,
    call_metadata,
    channel_options,
    credentials_for,
    resolve_target,
)
from kvmesh.client.errors import error_from_rpc
from kvmesh.client.events import Event, Result, ResultBuilder, event_from_wire
from kvmesh.client.recovery import Recovery
from kvmesh.client.request import GenerateOptions, build_request, build_tokenize_request
from kvmesh.v1 import inference_pb2 as wire
from kvmesh.v1 import inference_pb2_grpc as rpc


class Client:
    """A connection to a mesh; a context manager.

    >>> with kvmesh.Client("127.0.0.1:7440") as client:
    ...     print(client.complete(prompt="The capital of France is", max_tokens=8).text)

    Args:
        target: "host:port" or any gRPC target, such as
            "dns:///router:8000"; KVMESH_ENDPOINT where None.
        credentials: TLS credentials, True for the system's roots, None for
            plain text.
        token: API key or JWT, sent as `authorization: Bearer`.
        recover_s: how long a stream whose router or worker is gone may stand
            still while it is taken up again, at any router that the target
            names; 0 turns that off.
        options: further gRPC channel options.
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
            grpc.secure_channel(self.target, secure, merged)
            if secure
            else grpc.insecure_channel(self.target, merged)
        )
        self._stub = rpc.InferenceStub(self._channel)

    @property
    def channel(self) -> grpc.Channel:
        """The connection, for calls that this class has no method for."""
        return self._channel

    def generate(
        self,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        metadata: Sequence[tuple[str, str]] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Event]:
        """Streams a generation as typed events: accepted, tokens …, finished.

        Exactly one of `prompt`, `messages` and `token_ids` is needed. Closing
        the iterator, or leaving a loop over it for good, cancels. Raises
        `MeshError` where the call ends with another status than OK. A stream
        whose router is gone goes on at another one, with what its worker makes
        meanwhile where that lives (`resumable`): the caller sees a pause.
        """
        options.setdefault("resumable", self._recover_s > 0)
        recovery = Recovery(build_request(options), timeout, self._recover_s)
        headers = call_metadata(self._token, request_id, metadata)
        # The call begins here, not with the first look at the iterator.
        call = self._stub.Generate(recovery.request, timeout=timeout, metadata=headers)
        return self._events(call, recovery, headers)

    def _events(self, call: grpc.Call, recovery: Recovery, headers: Metadata) -> Iterator[Event]:
        while True:
            try:
                for response in call:
                    event = event_from_wire(response)
                    if event is not None and recovery.take(event):
                        yield event
                return
            except grpc.RpcError as error:
                failure = error_from_rpc(error)
                failure.__cause__ = error
            finally:
                # Also on a loop left early: the worker is not to go on for nobody.
                call.cancel()
            time.sleep(recovery.pause(failure))
            call = self._again(recovery, headers)

    def _again(self, recovery: Recovery, headers: Metadata) -> grpc.Call:
        resume = recovery.resume
        if resume is not None:
            return self._stub.Resume(resume, timeout=recovery.timeout, metadata=headers)
        return self._stub.Generate(recovery.request, timeout=recovery.timeout, metadata=headers)

    def complete(
        self,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        metadata: Sequence[tuple[str, str]] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Result:
        """Runs a generation to its end. Arguments as `generate`."""
        events = self.generate(timeout=timeout, request_id=request_id, metadata=metadata, **options)
        return ResultBuilder().extend(events).result()

    def tokenize(
        self, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> list[int]:
        """Token ids of `prompt` or `messages`, as `generate` would use them."""
        request = build_tokenize_request(options)
        try:
            response = self._stub.Tokenize(
                request, timeout=timeout, metadata=call_metadata(self._token, None, None)
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return list(response.ids)

    def models(self, *, timeout: float | None = None) -> list[wire.Model]:
        """The models that can be asked for."""
        try:
            response = self._stub.ListModels(
                wire.ListModelsRequest(),
                timeout=timeout,
                metadata=call_metadata(self._token, None, None),
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return list(response.models)

    def close(self) -> None:
        """Cancels what runs and closes the connection. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
