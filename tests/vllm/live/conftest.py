"""vLLM itself: one engine in this process, and a cluster with prefill and decode.

An engine takes 3 GB and up to a minute to start, so there are few, and never more than two.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Modules of the other tests: clusters, the harness of engines, and the reference.
sys.path[:0] = [str(ROOT / name) for name in ("vllm/live", "e2e", "engine", "equality")]

from in_process import Engine  # noqa: E402
from workers import MODEL, two_workers  # noqa: E402

from kvmesh import models  # noqa: E402


@pytest.fixture(scope="session")
def folder():
    return models.pull(MODEL)


@pytest.fixture(scope="session")
def reference(folder):
    import torch
    from transformers_reference import Reference

    torch.set_num_threads(1)
    return Reference(folder)


@pytest.fixture(scope="module")
def one():
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
async def driver(one):
    async with one.driven() as driver:
        yield driver


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with two_workers(tmp_path_factory.mktemp("pair")) as cluster:
        yield cluster


@pytest.fixture(scope="session", autouse=True)
def _offline():
    # The model is here; nothing is looked up.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
