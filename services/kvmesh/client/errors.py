"""Statuses as exceptions.

Each carries the canonical code, the documented reason (google.rpc.ErrorInfo),
what fields were wrong, when to try again and from which index to go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import grpc
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory
from google.protobuf.message import DecodeError, Message

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that was refused."""

    field: str
    description: str


@dataclass(eq=False)
class MeshError(Exception):
    """A call ended with a status other than OK."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    """Reason of ErrorInfo, as listed in docs/protocols.md; empty if none came."""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None
    """When the server thinks that it pays to try again; None if it said nothing."""

    def __str__(self) -> str:
        text = f"{self.code.name}: {self.message}"
        for violation in self.violations:
            text += f"\n  {violation.field}: {violation.description}"
        if self.retry_after_s is not None:
            text += f"\n  try again in {self.retry_after_s:.1f} s"
        return text

    @property
    def next_index(self) -> int | None:
        """First output index that was not delivered; None before any token."""
        value = self.metadata.get("next_index", "")
        return int(value) if value.isdigit() else None


class InvalidRequestError(MeshError):
    """INVALID_ARGUMENT: the request is malformed or out of range."""


class ModelNotFoundError(MeshError):
    """NOT_FOUND: no such model or generation."""


class OverloadedError(MeshError):
    """RESOURCE_EXHAUSTED: queue full, limit reached or message too large."""


class MeshUnavailableError(MeshError):
    """UNAVAILABLE: no worker now, or the worker was lost."""


_BY_CODE: dict[grpc.StatusCode, type[MeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: MeshUnavailableError,
}


def error_from_rpc(error: grpc.RpcError) -> MeshError:
    """The exception for a failed call, blocking or asynchronous."""
    call: grpc.Call = error  # both kinds of RpcError are also the call
    code = call.code()
    mapped = _BY_CODE.get(code, MeshError)(code, call.details() or "")
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            _apply_details(mapped, value)
    return mapped


def _apply_details(error: MeshError, status_bytes: bytes) -> None:
    status = _Status()
    try:
        status.ParseFromString(status_bytes)
        details = [_unpack(detail) for detail in _details_of(status)]
    except DecodeError:
        # A proxy's own trailer, perhaps; code and message stand without it.
        error.metadata["details_error"] = "grpc-status-details-bin could not be decoded"
        return
    for name, message in details:
        if name == "ErrorInfo":
            error.reason = message.reason  # type: ignore[attr-defined]
            error.metadata = dict(message.metadata)  # type: ignore[attr-defined]
        elif name == "BadRequest":
            error.violations = tuple(
                FieldViolation(v.field, v.description)
                for v in message.field_violations  # type: ignore[attr-defined]
            )
        elif name == "RetryInfo":
            delay = message.retry_delay  # type: ignore[attr-defined]
            error.retry_after_s = delay.seconds + delay.nanos / 1e9


# google.rpc's status messages, declared here in a pool of our own: the client
# needs grpcio and protobuf only, and a program that has googleapis-common-protos
# loaded keeps its own. Field numbers: google/rpc/{status,error_details}.proto.
_F = descriptor_pb2.FieldDescriptorProto


def _message(
    name: str, fields: Iterable[tuple[str, int, int, str, bool]]
) -> descriptor_pb2.DescriptorProto:
    message = descriptor_pb2.DescriptorProto(name=name)
    for field_name, number, kind, type_name, repeated in fields:
        added = message.field.add(
            name=field_name,
            number=number,
            type=kind,
            label=_F.LABEL_REPEATED if repeated else _F.LABEL_OPTIONAL,
        )
        if type_name:
            added.type_name = type_name
    return message


def _status_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for dependency in (any_pb2, duration_pb2):
        pool.AddSerializedFile(dependency.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="kvmesh_client_status.proto",
        package="google.rpc",
        syntax="proto3",
        dependency=["google/protobuf/any.proto", "google/protobuf/duration.proto"],
    )
    any_type = ".google.protobuf.Any"
    file.message_type.extend(
        [
            _message(
                "Status",
                [
                    ("code", 1, _F.TYPE_INT32, "", False),
                    ("message", 2, _F.TYPE_STRING, "", False),
                    ("details", 3, _F.TYPE_MESSAGE, any_type, True),
                ],
            ),
            _message(
                "ErrorInfo",
                [
                    ("reason", 1, _F.TYPE_STRING, "", False),
                    ("domain", 2, _F.TYPE_STRING, "", False),
                    (
                        "metadata",
                        3,
                        _F.TYPE_MESSAGE,
                        ".google.rpc.ErrorInfo.MetadataEntry",
                        True,
                    ),
                ],
            ),
            _message(
                "RetryInfo",
                [("retry_delay", 1, _F.TYPE_MESSAGE, ".google.protobuf.Duration", False)],
            ),
            _message(
                "BadRequest",
                [
                    (
                        "field_violations",
                        1,
                        _F.TYPE_MESSAGE,
                        ".google.rpc.BadRequest.FieldViolation",
                        True,
                    )
                ],
            ),
        ]
    )
    by_name = {message.name: message for message in file.message_type}
    entry = _message(
        "MetadataEntry",
        [("key", 1, _F.TYPE_STRING, "", False), ("value", 2, _F.TYPE_STRING, "", False)],
    )
    entry.options.map_entry = True
    by_name["ErrorInfo"].nested_type.append(entry)
    by_name["BadRequest"].nested_type.append(
        _message(
            "FieldViolation",
            [
                ("field", 1, _F.TYPE_STRING, "", False),
                ("description", 2, _F.TYPE_STRING, "", False),
            ],
        )
    )
    pool.Add(file)
    return pool


_POOL = _status_pool()
_KINDS: dict[str, type[Message]] = {
    name: message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"google.rpc.{name}"))
    for name in ("Status", "ErrorInfo", "RetryInfo", "BadRequest")
}
_Status = _KINDS["Status"]


def _details_of(status: Message) -> list[any_pb2.Any]:
    return list(status.details)  # type: ignore[attr-defined]


def _unpack(detail: any_pb2.Any) -> tuple[str, Message]:
    name = detail.type_url.rpartition(".")[2]
    message = _KINDS.get(name, _KINDS["RetryInfo"])()
    if name in _KINDS:
        message.ParseFromString(detail.value)
        return name, message
    return "", message
