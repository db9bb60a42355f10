"""The client: ask a mesh, get typed events or one result.

Needs grpcio and protobuf only. `Client` blocks, `AsyncClient` awaits; both
take the same arguments and yield the same types.
"""

from kvmesh.client.aio import AsyncClient
from kvmesh.client.blocking import Client
from kvmesh.client.errors import (
    FieldViolation,
    InvalidRequestError,
    MeshError,
    MeshUnavailableError,
    ModelNotFoundError,
    OverloadedError,
)
from kvmesh.client.events import (
    Accepted,
    Event,
    Finished,
    Placed,
    Result,
    Timings,
    TokenLogprobs,
    Tokens,
    TraceSpan,
    Usage,
)

__all__ = [
    "Accepted",
    "AsyncClient",
    "Client",
    "Event",
    "FieldViolation",
    "Finished",
    "InvalidRequestError",
    "MeshError",
    "MeshUnavailableError",
    "ModelNotFoundError",
    "OverloadedError",
    "Placed",
    "Result",
    "Timings",
    "TokenLogprobs",
    "Tokens",
    "TraceSpan",
    "Usage",
]
