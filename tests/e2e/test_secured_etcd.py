"""Workers and operators where etcd asks for a password, or for a certificate."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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
        [binary, f"--endpoints={endpoint}", "--dial-timeout=60s", *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "ETCDCTL_API": "3"},
    )


def missing(text: str) -> None:
    """Skips; in CI it is a failure, so that nobody believes in what was never checked."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{text}; with CI=true this may not be skipped", pytrace=False)
    pytest.skip(text)


def certificates(folder: Path) -> None:
    """An authority, and a certificate for both sides that it has signed."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def key(name: str) -> tuple[str, ...]:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        return (*curve, "-keyout", f"{name}.key")

    openssl("req", "-x509", *key("ca"), "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    for name in ("server", "client"):
        # etcd is reached by its address; the certificate has a name.
        extensions = folder / f"{name}.ext"
        extensions.write_text(
            "subjectAltName=DNS:etcd.test\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        openssl("req", *key(name), "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", f"{name}.pem",
        )  # fmt: skip


@pytest.fixture(params=["password", "TLS"])
def secured(request, tmp_path) -> Iterator[Secured]:
    client, peer = free_ports([0, 0])
    endpoint = f"127.0.0.1:{client}"
    command = etcd_command(client, peer, tmp_path / "etcd", durable=False)
    friends = {"etcd-user": "root", "etcd-password": PASSWORD}
    if request.param == "TLS":
        if shutil.which("openssl") is None:
            missing("openssl is not installed")
        certificates(tmp_path)
        command = [part.replace(f"http://{endpoint}", f"https://{endpoint}") for part in command]
        command += [
            "--client-cert-auth", f"--trusted-ca-file={tmp_path}/ca.pem",
            f"--cert-file={tmp_path}/server.pem", f"--key-file={tmp_path}/server.key",
        ]  # fmt: skip
        friends = {
            "etcd-ca": f"{tmp_path}/ca.pem",
            "etcd-cert": f"{tmp_path}/client.pem",
            "etcd-key": f"{tmp_path}/client.key",
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
