"""Settings from a file, the environment and flags, in that order of weakness.

A setting has one name, `kv_pool_tokens` say: the key in the file's section of
the command, the variable KVMESH_KV_POOL_TOKENS and the flag --kv-pool-tokens.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.setting_values import ValueNotAllowedError, boolean

SECTIONS = ("router", "worker", "attach", "up", "client")
"""Sections of a file."""

OTHER_VARIABLES = frozenset(
    f"KVMESH_{name}"
    for name in ("CONFIG", "CACHE", "VENV", "ETCD_BIN", "ETCD", "CLUSTER", "HISTORIES", "TRACES")
)
"""Variables that are no setting of a command: of the model cache, of `up`, of the
Makefile, of tests and of benchmarks."""


class UsageError(Exception):
    """What the user gave cannot be. The text names it and says what is allowed."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a command."""

    name: str
    help: str
    metavar: str = ""
    flag_only: bool = False
    """Neither in the file nor in the environment."""
    is_switch: bool = False
    repeated: bool = False
    """The flag may be given again and again."""
    default: str = ""
    """For `--help`; empty: nothing is said."""

    @property
    def flag(self) -> str:
        """As on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """As in the environment."""
        return "KVMESH_" + self.name.upper()

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Makes the flag. Absent flags are None, so that they hide nothing."""
        text = self.help.replace("%", "%%")
        if self.default:
            text += f" (default {self.default})".replace("%", "%%")
        if self.is_switch:
            switch = argparse.BooleanOptionalAction
            parser.add_argument(self.flag, dest=self.name, action=switch, default=None, help=text)
        else:
            metavar = self.metavar or self.name.rpartition("_")[2].upper()
            action = "append" if self.repeated else "store"
            parser.add_argument(
                self.flag, dest=self.name, metavar=metavar, help=text, action=action
            )


def add_settings(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """Adds the flags of settings, and --config."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings as TOML, a section for each command (also KVMESH_CONFIG)",
    )
    group = parser.add_argument_group("settings (each also KVMESH_<NAME> or a key in the file)")
    for setting in settings:
        setting.add_to(group)


def merged(
    section: str,
    settings: Iterable[Setting],
    args: argparse.Namespace,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The settings that were given, the strongest source of each; switches as bool.

    Raises `UsageError` for a file that cannot be read, for a section or a key that
    nobody has, and for a switch that is neither on nor off. A variable that nobody has is
    warned of: it may be another program's.
    """
    known = {setting.name: setting for setting in settings}
    values = _from_file(section, known, args, environment)
    environment = os.environ if environment is None else environment
    for text in unknown_variables(environment, known.values()):
        print(f"kvmesh {getattr(args, 'command', section)}: {text}", file=sys.stderr)
    for name, setting in known.items():
        if not setting.flag_only and environment.get(setting.variable):
            values[name] = environment[setting.variable]
    for name in known:
        value = getattr(args, name, None)
        if value is not None:
            values[name] = value
    try:
        for name, setting in known.items():
            if setting.is_switch and name in values:
                values[name] = boolean(name, values[name])
    except ValueNotAllowedError as error:
        raise UsageError(str(error)) from error
    return values


def config_file(
    args: argparse.Namespace, environment: Mapping[str, str] | None = None
) -> str | None:
    """The file of settings that was named, by flag or variable."""
    environment = os.environ if environment is None else environment
    return getattr(args, "config", None) or environment.get("KVMESH_CONFIG") or None


def _from_file(
    section: str,
    known: Mapping[str, Setting],
    args: argparse.Namespace,
    environment: Mapping[str, str] | None,
) -> dict[str, Any]:
    name = config_file(args, environment)
    if not name:
        return {}
    try:
        content = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config is {name!r}, which cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config is {name!r}, which is not TOML: {error}") from error
    _check_sections(name, content)
    found = content.get(section, {})
    if not isinstance(found, dict):
        raise UsageError(f"{name}: {section} is {found!r}; allowed is a section [{section}]")
    own = {key for key, setting in known.items() if not setting.flag_only}
    if strangers := [key for key in found if key not in own]:
        allowed = sorted(own | _of_section(section))
        for key in strangers:
            if key not in allowed:
                raise UsageError(
                    f"{name}: {key} is no setting of [{section}]{_guess(key, allowed)}; "
                    f"allowed are {', '.join(allowed)}"
                )
    return {key: value for key, value in found.items() if key in own}


def _of_section(section: str) -> set[str]:
    """The keys of all commands that share a section, as the client's do."""
    from kvmesh.cli.reference import sections

    found = (settings for name, _, settings in sections() if name == section)
    return {s.name for settings in found for s in settings if not s.flag_only}


def _check_sections(name: str, content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if key in SECTIONS:
            continue
        sections = ", ".join(f"[{section}]" for section in SECTIONS)
        if isinstance(value, dict):
            raise UsageError(
                f"{name}: [{key}] is no section{_guess(key, SECTIONS)}; allowed are {sections}"
            )
        raise UsageError(f"{name}: {key} stands in no section; allowed are {sections}")


def unknown_variables(
    environment: Mapping[str, str], settings: Iterable[Setting] = ()
) -> list[str]:
    """A sentence for each variable KVMESH_* that no command has. Of `settings` it is known."""
    own = {setting.variable for setting in settings} | OTHER_VARIABLES
    strangers = [name for name in environment if name.startswith("KVMESH_") and name not in own]
    if not strangers:
        # As it is nearly always: then the other commands' settings need not be loaded.
        return []
    from kvmesh.cli.reference import sections

    known = own | {s.variable for _, _, others in sections() for s in others}
    return [
        f"{name} is no setting of any command{_guess(name, known)}; it is not used"
        for name in sorted(strangers)
        if name not in known
    ]


def _guess(key: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(allowed), n=1)
    return f" (meant {close[0]}?)" if close else ""


def endpoints(value: Any) -> list[str]:
    """A list of addresses from "a:1,b:2" or a list."""
    parts = value.split(",") if isinstance(value, str) else value
    return [str(part).strip() for part in parts if str(part).strip()]
