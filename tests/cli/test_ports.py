"""Ports that a cluster on this machine gets."""

import socket

import pytest

from kvmesh.cli import etcd
from kvmesh.cli.etcd import free_ports


def test_no_socket_gets_one_by_chance_before_it_is_bound(monkeypatch, tmp_path):
    told = tmp_path / "range"
    told.write_text("20000\t60999\n")
    monkeypatch.setattr(etcd, "_GIVEN", told)
    ports = free_ports([0] * 20)
    assert len(set(ports)) == 20
    assert all(10_000 <= port < 20_000 for port in ports)


def test_one_that_is_wanted_is_given_where_it_is_free_and_another_where_it_is_not():
    (wanted,) = free_ports([0])
    assert free_ports([wanted]) == [wanted]
    with socket.create_server(("127.0.0.1", wanted)):
        (other,) = free_ports([wanted])
    assert other != wanted


@pytest.mark.parametrize("text", ["1024 65535", "nothing of that kind", None])
def test_where_the_system_gives_all_of_them_or_does_not_say_there_is_one(
    monkeypatch, tmp_path, text
):
    told = tmp_path / "range"
    if text is not None:
        told.write_text(text)
    monkeypatch.setattr(etcd, "_GIVEN", told)
    (port,) = free_ports([0])
    with socket.create_server(("127.0.0.1", port)):
        pass
