"""kvmesh: a gRPC mesh for disaggregated LLM serving.

`Client` and `AsyncClient` need grpcio and protobuf only; workers and engines
are extras (`kvmesh[torch]`).
"""

from kvmesh.client import (
    Accepted,
    AsyncClient,
    Client,
    Event,
    FieldViolation,
    Finished,
    InvalidRequestError,
    MeshError,
    MeshUnavailableError,
    ModelNotFoundError,
    OverloadedError,
    Placed,
    Result,
    Timings,
    TokenLogprobs,
    Tokens,
    TraceSpan,
    Usage,
)

__version__ = "0.1.0"

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
