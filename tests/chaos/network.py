"""A network of its own for one program: hosts on a bridge, and links that can be broken.

The program runs in namespaces (network and mounts) that `enter` makes for it, and its hosts are
namespaces beside these. The kernel takes all of it away with the last process in it, so
nothing is left however the program ends, and the machine's own network is never touched.

Rules drop on the wire: where a packet leaves a host's device and where it arrives at one, and
never in the stack that sends it, which would be told. They take IPv4 only: addresses go on
being resolved, as they do behind a switch that works.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

HUB = "10.77.0.1"
"""Address of the program itself, on the bridge that joins all hosts."""
_OUTER = "CHAOS_OUTER_NETWORK"
_NAMESPACES = "/run/netns"


def enter() -> None:
    """Starts this program anew with a network of its own, unless it has one already.

    Without root it takes a user namespace, where the kernel allows these.
    """
    if is_private():
        return
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *as_root, "--net", "--mount", "--propagation", "private"]
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": path, _OUTER: _namespace()}
    os.execvpe(command[0], [*command, sys.executable, *sys.argv], environment)


def is_private() -> bool:
    """Whether this program has a network of its own."""
    return os.environ.get(_OUTER, _namespace()) != _namespace()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/net")


@dataclass(frozen=True)
class Host:
    """One host: a namespace with a link to the bridge."""

    name: str
    address: str
    alias: str
    """A second address of the same host, for what stands before its services."""

    def within(self, *command: str) -> list[str]:
        """A command line that runs there. The process is that of the command itself."""
        return ["nsenter", f"--net={_NAMESPACES}/{self.name}", *command]

    @property
    def link(self) -> str:
        """The bridge's end of its link."""
        return f"v-{self.name}"


class Network:
    """The bridge and its hosts."""

    def __init__(self, names: Sequence[str]) -> None:
        if not is_private():
            raise RuntimeError("needs a network of its own: call network.enter first")
        # Seen here alone, as all mounts from here on.
        _run("mount", "-t", "tmpfs", "chaos", "/run")
        os.mkdir(_NAMESPACES)
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", "hub", "type", "bridge")
        _run("ip", "addr", "add", f"{HUB}/16", "dev", "hub")
        _run("ip", "link", "set", "hub", "up")
        self.hosts = {
            name: Host(name, f"10.77.0.{number}", f"10.77.1.{number}")
            for number, name in enumerate(names, start=2)
        }
        for host in self.hosts.values():
            self._add(host)

    def _add(self, host: Host) -> None:
        _run("ip", "netns", "add", host.name)
        _run(
            "ip", "link", "add", host.link, "type", "veth",
            "peer", "name", "eth0", "netns", host.name,
        )  # fmt: skip
        _run("ip", "link", "set", host.link, "master", "hub", "up")
        for address in (host.address, host.alias):
            _run("ip", "-n", host.name, "addr", "add", f"{address}/16", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", host.name, "link", "set", device, "up")

    def drop(self, table: str, host: Host, *, leaving: str = "", arriving: str = "") -> None:
        """Drops packets of a host that match nftables expressions. Empty: none."""
        for match, device, within in (
            (leaving, host.link, []),
            (arriving, "eth0", host.within()),
        ):
            if match:
                rules = (
                    f"table netdev {table} {{\n"
                    "  chain wire {\n"
                    f'    type filter hook ingress device "{device}" priority 0;\n'
                    f"    meta protocol ip {match} counter drop\n"
                    "  }\n"
                    "}\n"
                )
                _run(*within, "nft", "-f", "-", said=rules)

    def pass_on(self, table: str, host: Host) -> int:
        """Takes the rules of a table away. Returns how many packets they dropped."""
        dropped = 0
        for within in ([], host.within()):
            tables = _run(*within, "nft", "-j", "list", "ruleset")
            for entry in json.loads(tables)["nftables"]:
                if entry.get("rule", {}).get("table") == table:
                    dropped += sum(
                        part["counter"]["packets"]
                        for part in entry["rule"]["expr"]
                        if "counter" in part
                    )
                if entry.get("table", {}).get("name") == table:
                    _run(*within, "nft", "delete", "table", "netdev", table)
        return dropped

    def narrow(self, host: Host, bits_per_s: int) -> None:
        """Bounds what a link carries, each way (token bucket, at most 400 ms of queue)."""
        for within, device in (([], host.link), (["-n", host.name], "eth0")):
            _run(
                "tc", *within, "qdisc", "add", "dev", device, "root",
                "tbf", "rate", str(bits_per_s), "burst", "16kb", "latency", "400ms",
            )  # fmt: skip

    def widen(self, host: Host) -> None:
        """Takes that bound away."""
        for within, device in (([], host.link), (["-n", host.name], "eth0")):
            _run("tc", *within, "qdisc", "del", "dev", device, "root")

    def connections(self, host: Host) -> list[tuple[str, str, str, str]]:
        """Established TCP connections with other hosts: own address and port, theirs."""
        found = []
        listed = _run(*host.within("ss", "--no-header", "-tn", "state", "established"))
        for line in listed.splitlines():
            own, peer = line.split()[2:4]
            ends = (*own.rsplit(":", 1), *peer.rsplit(":", 1))
            if ends[2] not in (host.address, host.alias, "127.0.0.1"):
                found.append(ends)
        return found


def both_ways(ends: Sequence[tuple[str, str, str, str]]) -> tuple[str, str]:
    """Matches for the packets of connections: those that leave, those that arrive."""
    leaving = ", ".join(" . ".join(one) for one in ends)
    arriving = ", ".join(" . ".join((*one[2:], *one[:2])) for one in ends)
    fields = "ip saddr . tcp sport . ip daddr . tcp dport"
    return f"{fields} {{ {leaving} }}", f"{fields} {{ {arriving} }}"


def _run(*command: str, said: str = "") -> str:
    done = subprocess.run(command, input=said, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{said}")
    return done.stdout
