"""Workers and operators where etcd asks for a password, or for a certificate."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from authority import Authority

from kvmesh.cli import main
from kvmesh.cli.children import Child, Children
from kvmesh.cli.etcd import etcd_command, find_etcd, free_ports

PASSWORD = "a-secret-of-etcd"


@dataclass
class Secured:
    """An etcd that refuses strangers, and what its friends say."""

    endpoint: str
    friends: dict[str, str]
    children: Children

    def flags(self) -> list[str]:
        return [part for name, value in self.friends.items() for part in (f"--{name}", value)]

    def start(self, name: str, *arguments: str) -> Child:
        """Starts a part of kvmesh; what makes it a friend comes by the environment."""
        return self.children.spawn(
            name,
            [sys.executable, "-m", "kvmesh.cli", *arguments, "--etcd", self.endpoint],
            announce=True,
            environment={
                "KVMESH_" + key.replace("-", "_").upper(): value
                for key, value in self.friends.items()
            },
        )


def etcdctl(endpoint: str, *arguments: str) -> None:
    """Waits for etcd, and does one thing there."""
    binary = Path(find_etcd() or "etcd").with_name("etcdctl")
    subprocess.run(
        [
            binary,
            f"--endpoints={endpoint}",
            "--dial-timeout=60s",
            "--command-timeout=60s",
            *arguments,
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "ETCDCTL_API": "3"},
    )


@pytest.fixture(params=["password", "TLS"])
def secured(request, tmp_path) -> Iterator[Secured]:
    client, peer = free_ports([0, 0])
    endpoint = f"127.0.0.1:{client}"
    command = etcd_command(client, peer, tmp_path / "etcd", durable=False)
    friends = {"etcd-user": "root", "etcd-password": PASSWORD}
    if request.param == "TLS":
        # etcd is reached by its address; the certificate has a name.
        authority = Authority(tmp_path / "certificates")
        server, client_side = (authority.issue(name, "DNS:etcd.test") for name in ("s", "c"))
        command = [part.replace(f"http://{endpoint}", f"https://{endpoint}") for part in command]
        command += [
            "--client-cert-auth", f"--trusted-ca-file={authority.ca}",
            f"--cert-file={server.certificate}", f"--key-file={server.key}",
        ]  # fmt: skip
        friends = {
            "etcd-ca": str(authority.ca),
            "etcd-cert": str(client_side.certificate),
            "etcd-key": str(client_side.key),
            "etcd-server-name": "etcd.test",
        }
    with Children(tmp_path / "logs", lambda *_: None) as children:
        children.spawn("etcd", command)
        if request.param == "password":
            etcdctl(endpoint, "user", "add", f"root:{PASSWORD}")
            etcdctl(endpoint, "user", "grant-role", "root", "root")
            etcdctl(endpoint, "auth", "enable")
        yield Secured(endpoint, friends, children)


def test_a_worker_registers_and_is_found_by_routers_and_operators(secured, capsys) -> None:
    router = secured.start("router", "router", "--listen", "127.0.0.1:0")
    worker = secured.start("w", "worker", "--worker-id", "w", "--engine", "sim", "--model", "sim")
    where = secured.children.wait_for(router, "listening on ")
    secured.children.wait_for(worker, "worker w: serving")
    # By etcd, and by the router, who had it from etcd.
    for asked in (["--etcd", secured.endpoint, *secured.flags()], ["--endpoint", where]):
        while main(["workers", *asked]) != 0 or " both " not in capsys.readouterr().out:
            secured.children.wait(0.05)
    logs = "".join(child.log.read_text() for child in (router, worker))
    assert "serving" in logs
    assert PASSWORD not in logs


def test_a_stranger_is_told_that_etcd_refuses(secured, capsys) -> None:
    assert main(["workers", "--etcd", secured.endpoint]) == 2
    assert f"etcd is {secured.endpoint}: " in capsys.readouterr().err
