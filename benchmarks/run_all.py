"""Runs every benchmark, one after the other, and says at the end which failed.

    python benchmarks/run_all.py [--quick] [--results DIR] [FILE...]

A benchmark whose input is missing ends with status 77: it is skipped, by name. One that
fails stops no other; the status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

INPUT_MISSING = 77
"""Status of a benchmark that lacks what it needs and the repository does not have."""

HERE = Path(__file__).resolve()


def benchmarks() -> list[Path]:
    """The programs of this folder; other files are parts of these."""
    files = sorted(HERE.parent.glob("*.py"))
    return [file for file in files if file != HERE and "__main__" in file.read_text()]


def main() -> int:
    """Runs them; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute each; not evidence")
    results = HERE.parent / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of the figures")
    parser.add_argument("files", nargs="*", type=Path, help="only these")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    skipped, failed = [], []
    for file in args.files or benchmarks():
        print(f"== {file.stem}", flush=True)
        command = [sys.executable, str(file), "--json", str(args.results / f"{file.stem}.json")]
        status = subprocess.run([*command, *(["--quick"] if args.quick else [])]).returncode
        if status == INPUT_MISSING:
            skipped.append(file.stem)
        elif status:
            failed.append(f"{file.stem} (status {status})")
    if skipped:
        print(f"skipped, their input is missing (see above): {', '.join(skipped)}")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
