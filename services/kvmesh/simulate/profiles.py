"""Profiles: hardware and model, every figure with its source."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Profile = Mapping[str, Any]
"""A profile as its file has it; fields and units are in docs/simulator.md."""

_FOLDER = Path(__file__).with_name("profiles")


class ProfileError(ValueError):
    """There is no such profile, or it cannot be read."""


def profile_names() -> list[str]:
    """Names of the profiles that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """A profile by its name, or of a file. Raises ProfileError."""
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(profile_names())
        raise ProfileError(f"profile is {name!r}; allowed are {known} or a .toml file") from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"profile {name}: {error}") from error
