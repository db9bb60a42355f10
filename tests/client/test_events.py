"""What a router sends becomes the event that it says."""

import pytest

from kvmesh.client.events import event_from_wire
from kvmesh.v1 import inference_pb2 as wire


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (wire.FINISH_REASON_STOP, "stop"),
        (wire.FINISH_REASON_LENGTH, "length"),
        # As a later release may have it; nothing says that the text ended by itself.
        (99, "unknown"),
    ],
)
def test_a_finish_reason_is_told_as_it_came(sent, told) -> None:
    response = wire.GenerateResponse()
    # Bytes, as they come: the field's number is open to values of later releases.
    response.finished.MergeFromString(wire.Finished(reason=sent).SerializeToString())
    assert event_from_wire(response).finish_reason == told
