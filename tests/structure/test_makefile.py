"""What make says where the machine lacks something."""

import os
import subprocess

import pytest


@pytest.mark.parametrize(
    ("version", "status"),
    [("1.80.1", 2), ("1.94.9", 2), ("1.95.0", 0), ("1.100.0", 0), ("2.0.0", 0)],
)
def test_a_rust_that_is_too_old_is_told(root, tmp_path, version, status):
    cargo = tmp_path / "cargo"
    cargo.write_text(f"#!/bin/sh\necho 'cargo {version} (a date)'\n")
    cargo.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "rust"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    said = f"cargo is {version}; Rust 1.95 or newer is needed (rustup update)"
    assert (said in done.stderr) == bool(status)
