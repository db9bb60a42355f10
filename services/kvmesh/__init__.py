"""kvmesh: a gRPC mesh for disaggregated LLM serving.

`Client` and `AsyncClient` need grpcio and protobuf only; workers and engines
are extras (`kvmesh[torch]`). `KvIndex` needs NumPy and the native module.
"""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from kvmesh.index import KvIndex

__version__ = "0.1.0"

__all__ = [
    "Accepted",
    "AsyncClient",
    "Client",
    "Event",
    "FieldViolation",
    "Finished",
    "InvalidRequestError",
    "KvIndex",
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


def __getattr__(name: str) -> Any:
    # A client's environment has no NumPy.
    if name == "KvIndex":
        from kvmesh.index import KvIndex

        return KvIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
