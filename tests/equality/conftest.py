"""SmolLM2 in transformers, what it says to the prompts, and clusters that answer them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
import transformers

HERE = Path(__file__).parent
# Modules beside these tests, and the clusters of real processes.
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e")]

from cluster import Cluster  # noqa: E402
from streams import MODEL, Ledger  # noqa: E402
from transformers_reference import Reference  # noqa: E402

import kvmesh  # noqa: E402
from kvmesh import models  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
"""Where the workers compute, as torch names it (`make test-cuda`)."""

Start = Callable[..., AbstractContextManager[Cluster]]


@pytest.fixture(scope="session")
def reference() -> Reference:
    torch.set_num_threads(1)
    return Reference(models.pull(MODEL))


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    """What all arrangements said, for the rule about all of them together."""
    return Ledger()


@pytest.fixture
def start(tmp_path) -> Start:
    """Starts etcd, a router and torch workers, given as name -> role."""

    @contextmanager
    def started(*, arguments: tuple[str, ...] = (), **roles: str) -> Iterator[Cluster]:
        cluster = Cluster(tmp_path / "cluster")
        try:
            # All prompts are asked at once: that they wait is not too much here.
            endpoint = cluster.start_router("--queue-timeout", "30m")
            for name, role in roles.items():
                chosen = ("--model", MODEL, "--device", DEVICE, *arguments)
                cluster.begin_worker(name, role, *chosen, engine="torch")
            cluster.wait_live(endpoint, *roles)
            with kvmesh.Client(endpoint) as client:
                # The model is there once the router has its tokeniser.
                while not any(model.ready for model in client.models()):
                    cluster.children.wait(0.05)
            yield cluster
        finally:
            cluster.close()

    return started
