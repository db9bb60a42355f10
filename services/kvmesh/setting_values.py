"""Values of settings as text has them: what is allowed, and what is said of anything else."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

Seconds = Annotated[float, "seconds"]
"""A setting that is a time: given with its unit, held in seconds."""

_BOOLEANS = {
    "true": True, "1": True, "yes": True, "on": True,
    "false": False, "0": False, "no": False, "off": False,
}  # fmt: skip
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|)")


class ValueNotAllowedError(ValueError):
    """The text names the key, the value and what is allowed."""

    def __init__(self, name: str, value: Any, allowed: str) -> None:
        super().__init__(f"{name} is {value!r}; allowed is {allowed}")


def boolean(name: str, value: Any) -> bool:
    """True or false, however it is spelt. Raises `ValueNotAllowedError`."""
    found = value if isinstance(value, bool) else _BOOLEANS.get(str(value).strip().lower())
    if found is None:
        raise ValueNotAllowedError(name, value, "true or false (also 1, 0, yes, no, on, off)")
    return found


def duration_s(name: str, value: Any) -> float:
    """Seconds of "30s", "500ms", "2m", "1h" or a bare number, which is seconds.

    Raises `ValueNotAllowedError`.
    """
    found = None if isinstance(value, bool) else _DURATION.fullmatch(str(value).strip())
    if found is None or not math.isfinite(seconds := float(found[1]) * _UNITS_S[found[2]]):
        raise ValueNotAllowedError(name, value, "a time with its unit (ms, s, m, h); bare: seconds")
    return seconds


def written(seconds: float) -> str:
    """A time as settings have it: "30s", "500ms"."""
    return f"{seconds:g}s" if seconds == 0 or seconds >= 1 else f"{seconds * 1000:g}ms"
