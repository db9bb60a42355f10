"""A client whose packets are dropped is noticed, and what it had is given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("lost_client.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's namespaces")


def test_pings_without_an_answer_end_the_stream_of_a_client_that_is_cut_off(tmp_path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(PROGRAM), "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    print(done.stdout, done.stderr)
    # It has waited until no process held anything of the stream, or failed.
    assert done.returncode == 0
    told = json.loads(report.read_text())
    assert told.pop("dropped") > 0
    assert told == {
        "client_waits": True,
        "cancelled": 1,
        # The other one, which was not moved either.
        "finished": 1,
        "attempts_beside": [1],
        "failed": 0,
        # Not the bound on clients that take nothing.
        "slow_clients": 0,
        "violations": 0,
    }
