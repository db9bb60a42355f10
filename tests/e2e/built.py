"""Programs that tests build."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def testkit() -> str:
    """The testkit's binary, built here."""
    # Chosen from the workspace, as the tests are: then nothing is built anew for it.
    chosen = ["--workspace", "--exclude", "kvmesh-python", "--bin", "kvmesh-testkit"]
    subprocess.run(["cargo", "build", "--release", *chosen], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return str(target / "release" / "kvmesh-testkit")
