"""What can break: each fault is a small class that injects itself and heals itself.

A fault is drawn from a seed and changes nothing but its `hosts`. `may_lose` are the workers
that a router may give up for its sake; a router that gives up any other one is at fault itself.
"""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, fields
from typing import ClassVar, Self

from mesh import ETCD, PROXIED, ROLES, ROUTERS, Mesh
from network import both_ways

WORKERS = tuple(ROLES)
PREFILL = tuple(name for name, role in ROLES.items() if role == "prefill")
DECODE = tuple(name for name, role in ROLES.items() if role == "decode")
EVERYTHING = "ip version 4"


@dataclass(frozen=True)
class Fault:
    """Something that breaks on a host for a time."""

    among: ClassVar[tuple[str, ...]] = WORKERS
    """Hosts that it is drawn from."""
    hold: ClassVar[tuple[float, float]] = (0.5, 4.5)
    """Least and longest time that it lasts, seconds."""
    silent: ClassVar[bool] = True
    """Whether only silence tells of it: streams then wait until that is noticed. Such
    faults come one at a time, else a stream may wait for two of them, one after the other."""
    loses: ClassVar[bool] = True
    """Whether a router may give its worker up."""

    host: str
    hold_s: float

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        """One of this kind."""
        return cls(rng.choice(cls.among), rng.uniform(*cls.hold), **cls.more(rng))

    @classmethod
    def more(cls, rng: random.Random) -> dict[str, object]:
        """What else it is made of."""
        return {}

    @property
    def kind(self) -> str:
        """Its name."""
        return type(self).__name__

    @property
    def hosts(self) -> frozenset[str]:
        """Whom it touches."""
        return frozenset({self.host})

    @property
    def may_lose(self) -> frozenset[str]:
        """Workers that may be given up for it."""
        return frozenset({self.host} if self.loses else ())

    def inject(self, mesh: Mesh) -> None:
        """It begins."""
        raise NotImplementedError

    def heal(self, mesh: Mesh) -> int:
        """It is over. Returns how many packets it dropped."""
        raise NotImplementedError

    def __str__(self) -> str:
        rest = (f"{f.name}={getattr(self, f.name)}" for f in fields(self)[2:])
        return " ".join([self.kind, self.host, f"for {self.hold_s:.1f} s", *rest])


# -- processes -------------------------------------------------------------


class Killed(Fault):
    """kill -9 of a worker; a new process comes at its address."""

    silent = False
    hold = (0.0, 2.0)

    def inject(self, mesh: Mesh) -> None:
        mesh.kill(self.host)

    def heal(self, mesh: Mesh) -> int:
        mesh.start_worker(self.host)
        return 0


class Frozen(Fault):
    """A worker's process stands still, then goes on with what it had."""

    def inject(self, mesh: Mesh) -> None:
        mesh.signal(self.host, signal.SIGSTOP)

    def heal(self, mesh: Mesh) -> int:
        mesh.signal(self.host, signal.SIGCONT)
        return 0


class Stuck(Fault):
    """A worker's engine ends no step, while its port goes on beating."""

    def inject(self, mesh: Mesh) -> None:
        mesh.stuck_file(self.host).touch()

    def heal(self, mesh: Mesh) -> int:
        mesh.stuck_file(self.host).unlink()
        return 0


class Drained(Fault):
    """SIGTERM: a worker hands its streams over, or gives them back, and a new process comes."""

    silent = False
    hold = (0.0, 1.0)

    def inject(self, mesh: Mesh) -> None:
        mesh.drain(self.host)

    def heal(self, mesh: Mesh) -> int:
        mesh.start_worker(self.host)
        return 0


class RouterKilled(Fault):
    """kill -9 of a router; its clients go on at the other one."""

    among = ROUTERS
    silent = loses = False
    hold = (0.2, 3.0)

    def inject(self, mesh: Mesh) -> None:
        mesh.kill(self.host)

    def heal(self, mesh: Mesh) -> int:
        mesh.start_router(self.host)
        return 0


@dataclass(frozen=True)
class RouterAndWorkerKilled(RouterKilled):
    """Both at once: nobody is left who knows of a stream, but its client."""

    worker: str

    @classmethod
    def more(cls, rng: random.Random) -> dict[str, object]:
        return {"worker": rng.choice(WORKERS)}

    @property
    def hosts(self) -> frozenset[str]:
        return super().hosts | {self.worker}

    @property
    def may_lose(self) -> frozenset[str]:
        return frozenset({self.worker})

    def inject(self, mesh: Mesh) -> None:
        super().inject(mesh)
        mesh.kill(self.worker)

    def heal(self, mesh: Mesh) -> int:
        mesh.start_worker(self.worker)
        return super().heal(mesh)


class RouterPaused(Fault):
    """A router stands still: nobody but itself is to be held guilty of it."""

    among = ROUTERS
    loses = False
    hold = (0.5, 3.5)

    def inject(self, mesh: Mesh) -> None:
        mesh.signal(self.host, signal.SIGSTOP)

    def heal(self, mesh: Mesh) -> int:
        mesh.signal(self.host, signal.SIGCONT)
        return 0


class EtcdKilled(Fault):
    """kill -9 of etcd; it comes back with its data."""

    among = (ETCD,)
    silent = loses = False

    def inject(self, mesh: Mesh) -> None:
        mesh.kill(self.host)

    def heal(self, mesh: Mesh) -> int:
        mesh.start_etcd()
        return 0


# -- the network -----------------------------------------------------------


class Unreachable(Fault):
    """Packets of a host are dropped, both ways."""

    leaving: ClassVar[str] = EVERYTHING
    arriving: ClassVar[str] = EVERYTHING

    @property
    def table(self) -> str:
        """Name of its rules."""
        return f"fault_{self.host}"

    def inject(self, mesh: Mesh) -> None:
        host = mesh.network.hosts[self.host]
        mesh.network.drop(self.table, host, leaving=self.leaving, arriving=self.arriving)

    def heal(self, mesh: Mesh) -> int:
        return mesh.network.pass_on(self.table, mesh.network.hosts[self.host])


class Mute(Unreachable):
    """One way: nothing that a host sends arrives."""

    arriving = ""


class Deaf(Unreachable):
    """The other way: nothing arrives at it."""

    leaving = ""


class EtcdUnreachable(Unreachable):
    """Nobody reaches etcd; leases end."""

    among = (ETCD,)
    silent = loses = False


class HalfOpen(Unreachable):
    """The connections that there are carry nothing more; new ones would."""

    def inject(self, mesh: Mesh) -> None:
        host = mesh.network.hosts[self.host]
        leaving, arriving = both_ways(mesh.network.connections(host))
        mesh.network.drop(self.table, host, leaving=leaving, arriving=arriving)


class Vanished(Unreachable):
    """A machine is gone: it drops out of the network and dies, and nobody is told."""

    def inject(self, mesh: Mesh) -> None:
        super().inject(mesh)
        mesh.kill(self.host)

    def heal(self, mesh: Mesh) -> int:
        dropped = super().heal(mesh)
        mesh.start_worker(self.host)
        return dropped


@dataclass(frozen=True)
class PairParted(Unreachable):
    """A prefill and a decode worker do not reach each other; routers reach both."""

    among = PREFILL
    silent = loses = False

    other: str

    @classmethod
    def more(cls, rng: random.Random) -> dict[str, object]:
        return {"other": rng.choice(DECODE)}

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset({self.host, self.other})

    def inject(self, mesh: Mesh) -> None:
        host, other = (mesh.network.hosts[name] for name in (self.host, self.other))
        both = f"{{ {other.address}, {other.alias} }}"
        mesh.network.drop(self.table, host, leaving=f"ip daddr {both}", arriving=f"ip saddr {both}")


@dataclass(frozen=True)
class Lossy(Unreachable):
    """Each packet is lost with a probability, both ways."""

    percent: int

    @classmethod
    def more(cls, rng: random.Random) -> dict[str, object]:
        return {"percent": rng.choice((1, 3, 10, 20))}

    def inject(self, mesh: Mesh) -> None:
        host = mesh.network.hosts[self.host]
        lost = f"numgen random mod 100 < {self.percent}"
        mesh.network.drop(self.table, host, leaving=lost, arriving=lost)


@dataclass(frozen=True)
class Narrow(Fault):
    """A host's link carries little, each way."""

    bits_per_s: int

    @classmethod
    def more(cls, rng: random.Random) -> dict[str, object]:
        return {"bits_per_s": rng.choice((500_000, 1_000_000, 5_000_000))}

    def inject(self, mesh: Mesh) -> None:
        mesh.network.narrow(mesh.network.hosts[self.host], self.bits_per_s)

    def heal(self, mesh: Mesh) -> int:
        mesh.network.widen(mesh.network.hosts[self.host])
        return 0


# -- connections, by the fault proxies -------------------------------------


@dataclass(frozen=True)
class SessionFault(Fault):
    """The proxy before a worker's sessions does something to their bytes."""

    among = PROXIED
    path: ClassVar[str] = "sessions"
    how: ClassVar[tuple[str, ...]] = ()
    """What it is told; N is `number`."""
    numbers: ClassVar[tuple[int, int]] = (0, 0)

    number: int

    @classmethod
    def more(cls, rng: random.Random) -> dict[str, object]:
        return {"number": rng.randint(*cls.numbers)}

    def inject(self, mesh: Mesh) -> None:
        lines = [line.replace("N", str(self.number)) for line in self.how]
        getattr(mesh, self.path)[self.host].tell(*lines)

    def heal(self, mesh: Mesh) -> int:
        getattr(mesh, self.path)[self.host].tell("heal")
        return 0


class SessionSlow(SessionFault):
    """Each byte comes later."""

    how = ("up delay N", "down delay N")
    numbers = (5, 250)
    loses = False


class SessionStalled(SessionFault):
    """Nothing is passed on, connections stay open."""

    how = ("up stall on", "down stall on")


class SessionCutInFrame(SessionFault):
    """Sessions are closed somewhere in a frame, new ones too."""

    how = ("down cut N",)
    numbers = (1, 4_000)
    hold = (0.1, 1.5)
    silent = False


class SessionResetInFrame(SessionCutInFrame):
    """The same with a reset, on the way to the worker."""

    how = ("up reset N",)
    numbers = (1, 2_000)


class SessionRefused(SessionFault):
    """Sessions are reset and new ones refused."""

    how = ("refuse on", "reset")
    hold = (0.1, 3.0)
    silent = False


class KvTorn(SessionFault):
    """Connections that carry KV are closed somewhere in a block."""

    path = "kv"
    how = ("down cut N",)
    numbers = (1, 20_000)
    silent = loses = False


class KvFlipped(SessionFault):
    """A bit of what carries KV is flipped on each connection."""

    path = "kv"
    how = ("down flip N",)
    numbers = (0, 20_000)
    silent = loses = False


class KvStalled(SessionFault):
    """KV that is asked for does not come."""

    path = "kv"
    how = ("up stall on", "down stall on")
    silent = loses = False


KINDS: tuple[type[Fault], ...] = (
    Killed, Frozen, Stuck, Drained, RouterKilled, RouterAndWorkerKilled, RouterPaused, EtcdKilled,
    Unreachable, Mute, Deaf, EtcdUnreachable, HalfOpen, Vanished, PairParted, Lossy, Narrow,
    SessionSlow, SessionStalled, SessionCutInFrame, SessionResetInFrame, SessionRefused,
    KvTorn, KvFlipped, KvStalled,
)  # fmt: skip
