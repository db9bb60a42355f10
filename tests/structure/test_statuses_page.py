"""docs/protocols.md has every reason that a status can carry, with its code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERRORS = ROOT / "router_rs/gateway/src/error.rs"
ADMIN = ROOT / "router_rs/gateway/src/serve/admin.rs"
PAGE = ROOT / "docs/protocols.md"

CODES = {
    "InvalidArgument": "INVALID_ARGUMENT",
    "ResourceExhausted": "RESOURCE_EXHAUSTED",
    "Unimplemented": "UNIMPLEMENTED",
    "NotFound": "NOT_FOUND",
    "FailedPrecondition": "FAILED_PRECONDITION",
    "PermissionDenied": "PERMISSION_DENIED",
    "Unauthenticated": "UNAUTHENTICATED",
    "Unavailable": "UNAVAILABLE",
    "Aborted": "ABORTED",
    "DeadlineExceeded": "DEADLINE_EXCEEDED",
    "Cancelled": "CANCELLED",
    "Internal": "INTERNAL",
}


def documented() -> dict[str, str]:
    rows = re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+|the worker's own) \|", PAGE.read_text(), re.M)
    assert len(rows) == len(dict(rows)), "a reason has two rows"
    return dict(rows)


def test_each_reason_of_the_router_has_its_row() -> None:
    said = re.findall(r"\(Code::(\w+), \"([A-Z_]+)\"\)", ERRORS.read_text())
    assert len(said) > 15, "the table of the code is not found any more"
    assert {reason: CODES[code] for code, reason in said}.items() <= documented().items()


def test_the_reasons_for_operators_have_theirs() -> None:
    said = re.findall(r"reason: \"([A-Z_]+)\"", ADMIN.read_text())
    assert said
    assert set(said) <= documented().keys()
