"""Settings of a worker. Every bound has a name and a unit."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from kvmesh.etcd_access import ETCD_ACCESS, EtcdAccess
from kvmesh.roles import ROLES
from kvmesh.setting_values import Seconds, ValueNotAllowedError, boolean, duration_s, written

ENGINES = ("torch", "sim", "vllm", "remote")
LIKE = ("kvmesh", "vllm")
LOG_LEVELS = ("error", "warn", "info", "debug")
DType = Literal["float32", "float16", "bfloat16"]

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class SettingError(ValueError):
    """A setting is wrong. The text names the key and what is allowed."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How a worker runs. Defaults are what ships."""

    role: str = "both"
    """What it takes: prefill, decode or both. Can be changed at run time."""
    engine: str = "torch"
    """What computes: torch, sim, vllm, or remote: a server of its own (`kvmesh attach`)."""
    model: str = "smollm2-135m"
    """Name of a known model, or a folder in Hugging Face's form."""
    served_name: str = ""
    """Name that clients ask for. Empty: the model's own name."""
    worker_id: str = ""
    """Name of the worker, stable over restarts. Empty: made from host and role."""
    listen: str = "127.0.0.1:0"
    """Address of the gRPC port; port 0 takes a free one."""
    transfer_listen: str = "127.0.0.1:0"
    """Address of the transfer port; port 0 takes a free one."""
    transfer_tcp: bool = False
    """Move KV by TCP also between workers of one host, not by shared memory."""
    transfer_lease: Seconds = 10.0
    """How long offered KV stays pinned after the receiver's last sign of life."""
    offer_timeout: Seconds = 2.0
    """How long a pull of KV waits for its offer."""
    advertise_host: str = ""
    """Host that others reach this worker by. Empty: the host of `listen`."""
    insecure: bool = False
    """Allow addresses that other machines can reach without anything to show: who reaches
    them can read prompts and take over generations."""
    cluster_token_file: str = ""
    """File of the token that this cluster's routers and workers show each other, a line of
    16 characters or more; read again when it changes. Of several lines the first is shown
    and each is accepted."""
    tls_cert: str = ""
    """PEM file of this worker's certificate chain, with URI:kvmesh://CLUSTER/worker/ID
    among its names. Given: the gRPC port speaks TLS and takes what moves requests from
    certificates of role router or admin alone, and the transfer port speaks it with other
    workers. Needs tls_key and tls_ca; the three are read again when they change."""
    tls_key: str = ""
    """PEM file of that certificate's key."""
    tls_ca: str = ""
    """PEM file of the authorities that certificates of routers, administrators and other
    workers must come from."""
    etcd: tuple[str, ...] = ()
    """etcd endpoints, "host:port". Empty: not registered; routers must be told."""
    etcd_ca: str = ""
    """PEM file of the authorities that etcd's certificate must come from. Given: etcd is
    spoken to over TLS. Read again when it changes, as etcd_cert and etcd_key are."""
    etcd_cert: str = ""
    """PEM file of this worker's certificate for etcd. Needs etcd_key and etcd_ca."""
    etcd_key: str = ""
    """PEM file of that certificate's key."""
    etcd_server_name: str = ""
    """Name that etcd's certificate has, where it is not the one in etcd's address."""
    etcd_user: str = ""
    """User at etcd. Needs etcd_password."""
    etcd_password: str = field(default="", repr=False)
    """Password at etcd. Best given by its variable: flags can be read by everyone on the
    machine."""
    cluster: str = "default"
    """Name of the cluster: part of the keys in etcd."""
    etcd_ttl: Seconds = 10.0
    """Time that a record outlives its last sign of life."""
    grace: Seconds = 30.0
    """Time for running work after SIGTERM or a drain that names no other. What
    still runs then goes back to its routers."""
    kv_pool_tokens: int = 32_768
    """Size of the KV pool, in tokens."""
    huge_pages: bool = True
    """Ask the kernel for huge pages for the KV pool. It takes no privilege; what the
    kernel refuses lies in small pages, and the log says how much."""
    populate_kv_pool: bool = True
    """Take the memory of the KV pool at the start, as the torch engine does. Else it is taken
    as blocks first come into use, while the machine computes: streams are slower for that time."""
    threads: int = 1
    """Threads that compute."""
    dtype: DType = "float32"
    """Number type of weights and KV: float32, float16 or bfloat16."""
    device: str = "cpu"
    """Where torch computes: cpu, cuda or cuda:N."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Free labels, told to routers."""
    step_lane_bytes: int = 8 * 1024 * 1024
    """Step output that may wait for one router, bytes; beyond it the session is closed."""
    step_lane_age: Seconds = 10.0
    """Age that waiting step output may reach; beyond it the session is closed."""
    replay_bytes: int = 4 * 1024 * 1024
    """Step output kept for a router whose session broke, bytes; what it lacks from
    before that is computed anew."""
    orphan_ttl: Seconds = 10.0
    """How long streams of a router whose session broke go on without it, and what has
    ended is kept for routers that resume it."""
    resume_bytes: int = 64 * 1024 * 1024
    """What is kept of generations for routers that resume them (prompt, settings, output
    ids), bytes; beyond it those go that ended first, then the newest."""
    cache_ring_events: int = 65_536
    """Cache events kept for routers that come back."""
    cache_coalesce: Seconds = 0.02
    """Longest time that cache events wait for others."""
    snapshot_interval: Seconds = 0.005
    """Shortest time between two frames of a snapshot of the cache."""
    load_interval: Seconds = 0.25
    """Longest time between two load reports."""
    load_coalesce: Seconds = 0.005
    """Shortest time between two load reports."""
    keep_alive_interval: Seconds = 10.0
    """A router's connection is pinged this often."""
    keep_alive_timeout: Seconds = 10.0
    """A router's connection that answers no ping for this long is closed."""
    log_level: str = "info"
    """Level of log lines: error, warn, info, debug. An attempt that goes wrong here is
    a line of info or above, any other attempt's end one of debug."""
    load_delay: Seconds = 0.0
    """How much later than it was true each load report goes. For trials."""
    switch_interval: Seconds = 0.001
    """Python's thread switch interval: engine thread and others share the GIL."""
    like: str = ""
    """Whose behaviour the engine sim has: kvmesh or vllm. Empty: kvmesh."""
    engine_arguments: Mapping[str, str] = field(default_factory=dict)
    """Further settings of the engine, by name."""
    vllm_arg: Mapping[str, str] = field(default_factory=dict, metadata={"repeated": True})
    """An argument of vLLM's engine (its EngineArgs) as KEY=VALUE, may be given again and
    again; values as JSON where they are no plain text. In the file a table, in the
    environment a JSON object."""

    def __post_init__(self) -> None:
        self._one_of("role", self.role, ROLES)
        self._one_of("engine", self.engine, ENGINES)
        self._one_of("dtype", self.dtype, get_args(DType))
        self._one_of("log_level", self.log_level, LOG_LEVELS)
        self._check_etcd()
        if self.like:
            self._one_of("like", self.like, LIKE)
            if self.engine != "sim":
                raise SettingError(f"like is {self.like!r}; allowed is none but with engine sim")
        if self.vllm_arg and self.engine != "vllm":
            raise SettingError("vllm_arg is given; allowed is none but with engine vllm")
        for name in ("worker_id", "cluster"):
            value = getattr(self, name)
            if value and not _ID.fullmatch(value):
                raise SettingError(
                    f"{name} is {value!r}; allowed are 1 to 128 characters of A-Z a-z 0-9 . _ -"
                )
        self._check_trust()
        positive = (
            "kv_pool_tokens", "threads", "step_lane_bytes", "replay_bytes", "resume_bytes",
            "cache_ring_events",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise SettingError(f"{name} is {getattr(self, name)}; allowed is more than 0")
        times = (f.name for f in dataclasses.fields(self) if f.type == "Seconds")
        for name in times:
            if getattr(self, name) <= 0 and name not in ("grace", "load_delay"):
                found = written(getattr(self, name))
                raise SettingError(f"{name} is {found}; allowed is more than 0s")

    def _check_trust(self) -> None:
        tls = [bool(getattr(self, name)) for name in ("tls_cert", "tls_key", "tls_ca")]
        if any(tls) and not all(tls):
            raise SettingError("tls_cert, tls_key and tls_ca go together; not all of them are set")
        for name in ("listen", "transfer_listen"):
            host, _ = split_address(name, getattr(self, name))
            if all(tls) or self.cluster_token_file or self.insecure or is_loopback(host):
                continue
            raise SettingError(
                f"{name} is {getattr(self, name)!r}, which is not loopback: anyone who reaches "
                "it can read prompts and take over generations. Set cluster_token_file, for "
                "routers as well, or tls_cert, tls_key and tls_ca, or bind to 127.0.0.1, or "
                "set insecure if the network is trusted"
            )

    def _check_etcd(self) -> None:
        try:
            self.etcd_access()
        except ValueError as error:
            raise SettingError(str(error)) from error

    def etcd_access(self) -> EtcdAccess:
        """How etcd is reached. Raises ValueError."""
        return EtcdAccess(**{name: getattr(self, name) for name in ETCD_ACCESS})

    @staticmethod
    def _one_of(name: str, value: str, allowed: Any) -> None:
        if value not in allowed:
            raise SettingError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> WorkerSettings:
        """Settings from a file, the environment or flags, already merged.

        Text is turned into each setting's type. Raises `SettingError` naming
        an unknown key or a value that has no place.
        """
        hints = get_type_hints(cls, include_extras=True)
        known = {f.name for f in dataclasses.fields(cls)}
        converted: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise SettingError(
                    f"{key} is no setting of a worker; allowed are {', '.join(sorted(known))}"
                )
            read = _named_values if key == "vllm_arg" else _convert
            converted[key] = read(key, value, hints[key])
        return cls(**converted)

    def resolved_worker_id(self) -> str:
        """The worker's name; without a given one, one that no other start has."""
        if self.worker_id:
            return self.worker_id
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]
        return f"{self.role}-{host}-{secrets.token_hex(3)}"


def split_address(name: str, address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port"."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65_535 or not host:
        raise SettingError(f'{name} is {address!r}; allowed is "host:port" with port 0 to 65535')
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a host names this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _named_values(key: str, value: Any, hint: Any) -> dict[str, str]:
    """Values by name, of which a text may hold commas: KEY=VALUE each, or a mapping."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("{") else [value]
        except ValueError as error:
            raise SettingError(f"{key} is {value!r}, which is no JSON object: {error}") from error
    if isinstance(value, Mapping):
        return {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
    pairs = [str(part).partition("=") for part in value]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise SettingError(f"{key} is {name!r}; allowed is KEY=VALUE")
    return {name: text for name, _, text in pairs}


def _convert(key: str, value: Any, hint: Any) -> Any:
    text = str(hint)
    try:
        if hint is bool:
            return boolean(key, value)
        if hint == Seconds:
            return duration_s(key, value)
        if hint in (int, float):
            return hint(value)
        if text.startswith("tuple"):
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(str(part).strip() for part in parts if str(part).strip())
        if "Mapping" in text:
            if isinstance(value, str):
                return dict(part.split("=", 1) for part in value.split(",") if part)
            return {str(k): str(v) for k, v in value.items()}
    except ValueNotAllowedError as error:
        raise SettingError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        allowed = getattr(hint, "__name__", text)
        raise SettingError(f"{key} is {value!r}; allowed is {allowed}") from error
    return str(value)
