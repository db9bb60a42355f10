"""Which of the wires a server speaks: it is asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import grpc
import grpc.aio

from kvmesh.engine.remote.arguments import Arguments
from kvmesh.engine.remote.first_party import FirstPartyServer
from kvmesh.engine.remote.grpc_calls import CALL_S, OPTIONS, answer
from kvmesh.engine.remote.server import (
    CacheBatch,
    Description,
    Load,
    Part,
    Request,
    Server,
    UnusableError,
)
from kvmesh.engine.remote.smg import SmgServer
from kvmesh.vllm_wire import control_pb2 as control
from kvmesh.vllm_wire import control_pb2_grpc as control_rpc
from kvmesh.vllm_wire import engine_pb2 as engine
from kvmesh.vllm_wire import engine_pb2_grpc as engine_rpc


def connect(arguments: Arguments) -> Server:
    """A client of the server, in the running event loop. Nothing is sent yet."""
    address = arguments.server
    if address.speaks_grpc:
        return GrpcServer(arguments)
    from kvmesh.engine.remote.openai_http import Access, OpenAiServer

    return OpenAiServer(
        Access(
            f"{address.wire}://{address}",
            arguments.model,
            arguments.server_key,
            arguments.priorities,
            arguments.server_ca,
        )
    )


def channel(arguments: Arguments) -> grpc.aio.Channel:
    """To a server that speaks gRPC. Nothing is sent yet."""
    target = str(arguments.server)
    if not arguments.server.has_tls:
        return grpc.aio.insecure_channel(target, options=OPTIONS)
    credentials = grpc.ssl_channel_credentials(arguments.server_ca or None)
    if arguments.server_key:
        token = grpc.access_token_call_credentials(arguments.server_key)
        credentials = grpc.composite_channel_credentials(credentials, token)
    return grpc.aio.secure_channel(target, credentials, options=OPTIONS)


class GrpcServer:
    """One of vLLM's two generations of gRPC; which one shows when it describes itself."""

    ends_dropped = False

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._channel = channel(arguments)
        self._found: SmgServer | FirstPartyServer | None = None

    async def describe(self) -> Description:
        """Raises UnreachableError, UnusableError."""
        if self._found is None:
            self._found = await self._probe()
        return await self._found.describe()

    async def _probe(self) -> SmgServer | FirstPartyServer:
        smg, own = engine_rpc.VllmEngineStub(self._channel), control_rpc.ControlStub(self._channel)
        try:
            await answer(smg.HealthCheck(engine.HealthCheckRequest(), timeout=CALL_S))
            return SmgServer(self._channel, self._arguments.data_parallel_rank)
        except UnusableError:
            # Unimplemented: it is the other one, or neither.
            pass
        try:
            await answer(own.GetServerInfo(control.GetServerInfoRequest(), timeout=CALL_S))
        except UnusableError as error:
            raise UnusableError(
                f"server {self._arguments.server} speaks neither vllm.grpc.engine.VllmEngine nor "
                "vllm.Inference; where it speaks OpenAI's HTTP, give http://host:port"
            ) from error
        return FirstPartyServer(
            self._channel, self._arguments.server.host, priorities=self._arguments.priorities
        )

    @property
    def _server(self) -> SmgServer | FirstPartyServer:
        if self._found is None:
            raise AssertionError("the server was not asked who it is")
        return self._found

    async def check(self) -> None:
        """As Server."""
        await self._server.check()

    def generate(self, request: Request) -> AsyncGenerator[Part, None]:
        """As Server."""
        return self._server.generate(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """As Server."""
        await self._server.abort(request_ids)

    async def load(self) -> Load | None:
        """As Server."""
        return await self._server.load()

    def cache_batches(self) -> AsyncGenerator[CacheBatch, None]:
        """As Server."""
        return self._server.cache_batches()

    async def close(self) -> None:
        """Drops the connection."""
        await self._channel.close()
