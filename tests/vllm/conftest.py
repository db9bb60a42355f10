"""What needs vLLM itself is under live/, which is looked at only where it is installed."""

import sys
from pathlib import Path

from kvmesh.engine.vllm.border import VllmError, installed_version

# The harness of the engine contract's tests, and what these tests share.
sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
sys.path.insert(0, str(Path(__file__).parent))

try:
    installed_version()
    collect_ignore = []
except VllmError:
    collect_ignore = ["live"]
