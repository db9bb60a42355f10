"""What the checks of the workspace share."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def metadata() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("cargo", "metadata", "--format-version=1", "--locked"))
    return found


@pytest.fixture(scope="session")
def cargo():
    return run
