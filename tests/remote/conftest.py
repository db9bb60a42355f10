"""Servers that are no kvmesh, made by the tests, and what these share with others."""

import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(_TESTS / name) for name in ("e2e", "engine", "vllm", "remote")]


@pytest.fixture
def folder(tmp_path):
    """The tokeniser of the servers that speak for a `FakeModel`."""
    # Found only with the paths above.
    from fake_model import files

    for name, content in files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path
