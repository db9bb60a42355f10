"""Settings from a file, the environment and flags, in that order of weakness."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import os
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmesh.cli.errors import CommandError


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --config."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=os.environ.get("KVMESH_CONFIG"),
        help="TOML file with a table a command, such as [worker] (KVMESH_CONFIG)",
    )


def add_setting_flags(parser: argparse.ArgumentParser, settings: type, prefix: str) -> None:
    """Adds a flag for each field of a settings class, with its own description."""
    described = _descriptions(settings)
    for field in dataclasses.fields(settings):
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = f" [{default}]" if default not in ("", (), {}) else ""
        note = f"{described.get(field.name, '')}{shown} ({prefix}{field.name.upper()})"
        flag = "--" + field.name.replace("_", "-")
        note = note.replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(
                flag,
                dest=field.name,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=note,
            )
        elif isinstance(default, tuple | dict):
            parser.add_argument(flag, dest=field.name, action="append", default=None, help=note)
        else:
            parser.add_argument(flag, dest=field.name, default=None, help=note)


def merge(table: str, prefix: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Values for `names`: from the file's table, then PREFIX_NAME, then flags."""
    merged: dict[str, Any] = dict(read_table(options.config, table))
    for name in names:
        if (value := os.environ.get(prefix + name.upper())) is not None:
            merged[name] = value
    for name in names:
        value = getattr(options, name, None)
        if value is not None:
            merged[name] = ",".join(value) if isinstance(value, list) else value
    return merged


def read_table(path: str | None, table: str) -> Mapping[str, Any]:
    """One table of a settings file; empty without a file or a table."""
    if not path:
        return {}
    try:
        content = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise CommandError(f"config {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise CommandError(f"config {path}: {error}") from error
    found = content.get(table, {})
    if not isinstance(found, dict):
        raise CommandError(f"config {path}: {table} is {found!r}; allowed is a table")
    return found


def _descriptions(settings: type) -> dict[str, str]:
    """The text under each field of a class: one place says what a setting is."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(settings)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    described: dict[str, str] = {}
    for field, text in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            described[field.target.id] = " ".join(str(text.value.value).split())
    return described
