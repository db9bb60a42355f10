"""Statuses become exceptions with everything that the server said."""

import grpc
import pytest

from kvmesh.client.errors import (
    _KINDS,
    InvalidRequestError,
    MeshUnavailableError,
    OverloadedError,
    error_from_rpc,
)


class FakeCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, message: str, details: list | bytes) -> None:
        self._code, self._message = code, message
        if isinstance(details, bytes):
            self._trailer = details
        else:
            status = _KINDS["Status"](code=code.value[0], message=message)
            for detail in details:
                status.details.add(
                    type_url=f"type.googleapis.com/{detail.DESCRIPTOR.full_name}",
                    value=detail.SerializeToString(),
                )
            self._trailer = status.SerializeToString()

    def code(self):
        return self._code

    def details(self):
        return self._message

    def trailing_metadata(self):
        return (("x-request-id", "r"), ("grpc-status-details-bin", self._trailer))


def test_fields_that_were_refused_are_named() -> None:
    bad = _KINDS["BadRequest"]()
    bad.field_violations.add(field="sampling.top_p", description="is 2; allowed is over 0 to 1")
    info = _KINDS["ErrorInfo"](reason="OUT_OF_RANGE", domain="kvmesh")
    error = error_from_rpc(FakeCall(grpc.StatusCode.INVALID_ARGUMENT, "no", [info, bad]))
    assert isinstance(error, InvalidRequestError)
    assert error.reason == "OUT_OF_RANGE"
    assert error.violations[0].field == "sampling.top_p"
    assert "allowed is over 0 to 1" in str(error)
    assert error.next_index is None


def test_the_delay_and_the_next_index_are_told() -> None:
    retry = _KINDS["RetryInfo"]()
    retry.retry_delay.seconds, retry.retry_delay.nanos = 2, 500_000_000
    error = error_from_rpc(FakeCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [retry]))
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 2.5
    info = _KINDS["ErrorInfo"](reason="WORKER_LOST", domain="kvmesh")
    info.metadata["next_index"] = "17"
    error = error_from_rpc(FakeCall(grpc.StatusCode.UNAVAILABLE, "lost", [info]))
    assert isinstance(error, MeshUnavailableError)
    assert error.next_index == 17


def test_details_of_a_stranger_do_not_hide_the_status() -> None:
    error = error_from_rpc(FakeCall(grpc.StatusCode.UNAVAILABLE, "gone", b"\xff\xff\xff"))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert "details_error" in error.metadata


def test_an_error_can_be_raised_and_told_apart() -> None:
    with pytest.raises(MeshUnavailableError, match="UNAVAILABLE: gone"):
        raise error_from_rpc(FakeCall(grpc.StatusCode.UNAVAILABLE, "gone", []))
