"""A worker's log: lines of Python and of Rust code in one form, that of the router's."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from kvmesh._router import start_logging as start_native_logging

_NAMES = {"WARNING": "WARN", "CRITICAL": "ERROR"}


def start_logging(level: str) -> None:
    """Sends log lines to stderr. `level`: the setting `log_level`.

    At debug only code of this project tells more: HTTP/2 has lines for every frame, and
    a token is one.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(told)5s %(name)s: %(message)s"))
    # By force: a library that logged first has set up lines of its own.
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    start_native_logging("info,kvmesh=debug" if level == "debug" else level)


class _Lines(logging.Formatter):
    """Times in UTC with microseconds, and the levels' names as in Rust."""

    def format(self, record: logging.LogRecord) -> str:
        record.told = _NAMES.get(record.levelname, record.levelname)
        return super().format(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
