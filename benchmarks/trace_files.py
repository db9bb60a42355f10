"""Where benchmarks that replay traces find them, and what they say where there are none."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from run_all import INPUT_MISSING


def add_traces(parser: argparse.ArgumentParser) -> None:
    """Adds --traces: else KVMESH_TRACES, else `shared/traces` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "traces"
    parser.add_argument(
        "--traces",
        type=Path,
        metavar="DIR",
        default=Path(os.environ.get("KVMESH_TRACES") or beside),
        help="folder of the traces (also KVMESH_TRACES)",
    )


def need_traces(folder: Path, names: Iterable[str]) -> None:
    """Ends the run by its own status where a trace is missing, and says how to give it."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        print(
            f"needs {', '.join(missing)}, which {folder} has not: no part of the repository; "
            "--traces DIR or KVMESH_TRACES says where they are",
            file=sys.stderr,
        )
        raise SystemExit(INPUT_MISSING)
