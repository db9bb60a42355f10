"""Servers that are no kvmesh, made by the tests, and what these share with others."""

import sys
from pathlib import Path

_TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(_TESTS / name) for name in ("e2e", "engine", "vllm", "remote")]
