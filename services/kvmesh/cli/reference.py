"""The settings page of the documentation, made from the settings themselves.

`python -m kvmesh.cli.reference` prints it (make docs).
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.cli import attach, client, router, up, worker, workers
from kvmesh.cli.settings import Setting

_HEAD = """\
# Settings

Made from the code by `make docs`.

A setting has one name. It is the key in its command's section of a TOML file
(`--config FILE` or `KVMESH_CONFIG`), the variable `KVMESH_<NAME>`, and the flag
`--<name>`; the later of these wins. A wrong key or value is named, with what is allowed.

```toml
[router]
listen = "127.0.0.1:7440"
etcd = ["127.0.0.1:2379"]

[worker]
role = "decode"
kv_pool_tokens = 65536
```

The program `kvmesh-router` takes the same router settings, from the section `[router]` or
from a file without sections.
"""

_UP = """\
`kvmesh up`: section `[up]`.

Its file's sections `[router]` and `[worker]`, and variables that are no setting of `up`,
hold for the router and the workers that it starts. Variables of the settings below are its
own alone: `KVMESH_THREADS` are the threads of each worker and no router's, `KVMESH_LISTEN`
is the router's address and no worker's. It decides, whatever the file says: `listen`,
`etcd`, `cluster` and `insecure` of them all, and of workers `role`, `engine`, `model`,
`worker_id`, `grace` and `transfer_listen`."""


def sections() -> tuple[tuple[str, str, Iterable[Setting]], ...]:
    """Each section: name, who uses it, and its settings."""
    return (
        ("router", "`kvmesh router`: section `[router]`.", router.settings()),
        ("worker", "`kvmesh worker`: section `[worker]`.", worker.settings()),
        ("attach", "`kvmesh attach`: section `[attach]`.", attach.settings()),
        ("up", _UP, up.SETTINGS),
        (
            "client",
            "`kvmesh chat`, `generate`, `models`, `workers`, `drain`, `role`, `planner`, "
            "`explain`: section `[client]`. Each takes from it what it has.",
            client.CONNECTION + client.SAMPLING + workers.REGISTRY,
        ),
    )


def page() -> str:
    """The whole page."""
    parts = [_HEAD, *(_section(*section) for section in sections())]
    return "\n".join(parts)


def _section(name: str, text: str, settings: Iterable[Setting]) -> str:
    rows = [f"## {name}", "", text, "", "| setting | default | meaning |", "|---|---|---|"]
    for setting in settings:
        default = f"`{setting.default}`" if setting.default else ""
        meaning = setting.help.replace("|", "\\|")
        if setting.flag_only:
            meaning += " (a flag only)"
        rows.append(f"| `{setting.name}` | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
