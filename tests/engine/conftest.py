"""Fixtures that these tests share."""

import sys
from pathlib import Path

import pytest

# The harness beside these tests, and the authority of the end-to-end tests; tests are no package.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "e2e")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A tiny random model that the torch engine loads."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tiny_torch import write_model

    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    return str(folder)
