"""The bytes that a router carries from prefill to decode."""

import json
import math
import zlib
from types import SimpleNamespace

import pytest

from kvmesh.engine.vllm.hand_off import MOST_BYTES, HandOff, HandOffError, pack, unpack
from kvmesh.engine.vllm.served import lease_ms

PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[3, 4, 5]],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "remote_blocks_expiry_time": None,
}


def test_what_was_packed_is_unpacked() -> None:
    said = HandOff(PARAMS, 1234.5, 30_000.0)
    assert unpack(pack(said)) == said
    assert json.loads(pack(said))["params"] == PARAMS, "short ones are plain JSON"


def test_a_connector_that_needs_nothing_told_gets_nothing() -> None:
    assert unpack(pack(HandOff(None))).params is None
    assert unpack(pack(HandOff({}))).params is None


def test_the_blocks_of_a_very_long_prompt_fit() -> None:
    """Half a million tokens in blocks of 32, wherever they lie."""
    blocks = [(at * 7919) % 40_000 for at in range(500_000 // 32)]
    long = HandOff({**PARAMS, "remote_block_ids": [blocks]})
    assert len(json.dumps(long.params)) > MOST_BYTES
    assert unpack(pack(long)) == long


def test_blocks_are_taken_within_half_of_their_lease() -> None:
    said = unpack(pack(HandOff(PARAMS, age_ms=5_000.0, lease_ms=30_000.0)))
    assert said.left_ms(5_010.0) == 14_990.0
    assert said.left_ms(20_000.0) == 0.0
    assert said.left_ms(20_001.0) == -1.0
    no_lease = unpack(pack(HandOff(PARAMS, age_ms=5_000.0)))
    assert no_lease.left_ms(1e9) == math.inf, "no lease is known"


@pytest.mark.parametrize(
    ("connector", "extra", "lease"),
    [
        ("NixlConnector", None, 30_000.0),
        ("NixlPushConnector", {"kv_lease_duration": 12}, 12_000.0),
        ("ExampleConnector", {"shared_storage_path": "/shared"}, 0.0),
        ("MultiConnector", {"connectors": [{"kv_connector": "ExampleConnector"}]}, 0.0),
        (
            "MultiConnector",
            {
                "connectors": [
                    {"kv_connector": "ExampleConnector"},
                    {
                        "kv_connector": "NixlConnector",
                        "kv_connector_extra_config": {"kv_lease_duration": 20},
                    },
                    {"kv_connector": "NixlConnector"},
                ]
            },
            20_000.0,
        ),
    ],
)
def test_a_lease_is_the_shortest_of_a_connector_and_what_is_in_it(connector, extra, lease) -> None:
    config = SimpleNamespace(kv_connector=connector, kv_connector_extra_config=extra)
    assert lease_ms(config, connector) == lease
    assert lease_ms(None, "") == 0.0


def test_what_does_not_fit_is_no_hand_off() -> None:
    import random

    noise = random.Random(1).randbytes(200_000).hex()
    with pytest.raises(HandOffError, match=f"allowed are {MOST_BYTES}"):
        pack(HandOff({"noise": noise}))
    with pytest.raises(HandOffError, match="no JSON"):
        pack(HandOff({"blocks": b"bytes"}))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b"x",
        zlib.compress(b"[1]"),
        zlib.compress(b"{}")[:-3],
        b'{"params":[1],"age_ms":0,"lease_ms":0}',
        b'{"params":null,"age_ms":"x","lease_ms":0}',
    ],
)
def test_bytes_that_are_none_are_refused(payload) -> None:
    with pytest.raises(HandOffError):
        unpack(payload)


def test_a_bomb_is_not_unpacked() -> None:
    with pytest.raises(HandOffError, match="too long"):
        unpack(zlib.compress(b'{"a":"' + b"x" * 50_000_000 + b'"}'))
