"""`kvmesh worker`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
from functools import cache

from kvmesh.cli.announce import add_announce, announcer
from kvmesh.cli.settings import Setting, UsageError, add_settings, merged

_TIME = " Allowed: a time with its unit (ms, s, m, h); bare: seconds."

_EPILOG = """\
examples:
  kvmesh worker --role both --model smollm2-135m --etcd 127.0.0.1:2379
  kvmesh worker --role prefill --engine sim --etcd 127.0.0.1:2379
  kvmesh worker --config kvmesh.toml      # section [worker]

SIGTERM drains: no new work, what runs has --grace to finish. Before it serves it ends at once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a worker."""
    parser.epilog = _EPILOG
    add_settings(parser, settings())
    add_announce(parser)


def run(args: argparse.Namespace) -> int:
    """Runs a worker until it is told to stop."""
    values = merged("worker", settings(), args)
    try:
        from kvmesh.worker.settings import SettingError, WorkerSettings
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    try:
        chosen = WorkerSettings.from_mapping(values)
        from kvmesh._router import WorkerIdTakenError
        from kvmesh.worker.log import start_logging
        from kvmesh.worker.serve import main
    except SettingError as error:
        raise UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    start_logging(chosen.log_level)
    try:
        return main(chosen, announcer(args.announce_fd))
    except SettingError as error:
        raise UsageError(str(error)) from error
    except WorkerIdTakenError as error:
        raise UsageError(f"worker_id: {error}; allowed is a name that no worker has") from error


def _missing(error: ModuleNotFoundError) -> UsageError:
    return UsageError(f"a worker needs the package {error.name}: pip install 'kvmesh[torch]'")


@cache
def settings() -> tuple[Setting, ...]:
    """The worker's settings, with what their docstrings say."""
    from kvmesh.worker.settings import WorkerSettings

    source = ast.parse(textwrap.dedent(inspect.getsource(WorkerSettings)))
    docs = _attribute_docs(source.body[0])
    found = []
    for field in dataclasses.fields(WorkerSettings):
        default = field.default if field.default is not dataclasses.MISSING else ""
        is_time = field.type == "Seconds"
        found.append(
            Setting(
                field.name,
                docs.get(field.name, "") + (_TIME if is_time else ""),
                is_switch=isinstance(default, bool),
                repeated=bool(field.metadata.get("repeated")),
                default=_default(default, is_time),
            )
        )
    return tuple(found)


def _default(value: object, is_time: bool) -> str:
    from kvmesh.setting_values import written

    if is_time and isinstance(value, float | int):
        return written(value)
    return "" if value in ("", (), False) else str(value)


def _attribute_docs(node: ast.AST) -> dict[str, str]:
    docs: dict[str, str] = {}
    if not isinstance(node, ast.ClassDef):
        return docs
    for field, following in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(following.value.value).split())
    return docs
