"""TLS and password of etcd: settings that workers and operators' commands share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict


class EtcdArguments(TypedDict, total=False):
    """Arguments of the native registry."""

    ca_file: str
    certificate_file: str
    key_file: str
    server_name: str
    user: str
    password: str


@dataclass(frozen=True, slots=True)
class EtcdAccess:
    """How etcd is reached. Files are read when they are needed, and again when they change."""

    etcd_ca: str = ""
    etcd_cert: str = ""
    etcd_key: str = ""
    etcd_server_name: str = ""
    etcd_user: str = ""
    etcd_password: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError where one setting needs another."""
        if bool(self.etcd_cert) != bool(self.etcd_key):
            raise ValueError("etcd_cert and etcd_key go together; one of them is not set")
        if not self.etcd_ca and (self.etcd_cert or self.etcd_server_name):
            raise ValueError(
                "etcd_cert and etcd_server_name need etcd_ca: without it there is no TLS"
            )
        if bool(self.etcd_user) != bool(self.etcd_password):
            raise ValueError("etcd_user and etcd_password go together; one of them is not set")

    def arguments(self) -> EtcdArguments:
        """Of `WorkerRegistration` and `list_workers`. Raises ValueError naming a file."""
        found = EtcdArguments()
        if self.etcd_ca:
            found["ca_file"] = _readable("etcd_ca", self.etcd_ca)
            found["server_name"] = self.etcd_server_name
        if self.etcd_cert:
            found["certificate_file"] = _readable("etcd_cert", self.etcd_cert)
            found["key_file"] = _readable("etcd_key", self.etcd_key)
        if self.etcd_user:
            found["user"], found["password"] = self.etcd_user, self.etcd_password
        return found


ETCD_ACCESS = tuple(each.name for each in dataclasses.fields(EtcdAccess))
"""Names of the settings."""


def _readable(name: str, file: str) -> str:
    path = Path(file).expanduser()
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name} is {file!r}, which cannot be read: {error.strerror}") from error
    return str(path)
