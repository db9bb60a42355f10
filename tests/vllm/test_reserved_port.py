"""The port where vLLM's NIXL listens is its own, though it listens long after it was chosen."""

import socket

import pytest

from kvmesh.engine.vllm.served import reserved_port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_reserved_port_is_given_to_nobody_but_who_says_that_it_shares(host) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with reserved_port(host) as port:
        with socket.socket(family) as other, pytest.raises(OSError, match="in use"):
            other.bind((host, port))
        with socket.socket(family) as nixl:
            # As libzmq does before it binds.
            nixl.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            nixl.bind((host, port))
            nixl.listen()
            with socket.create_connection((host, port)):
                pass
