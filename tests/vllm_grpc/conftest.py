"""A router that others take for one vLLM engine, SMG in front of it, workers behind."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

from cluster import Cluster
from figures import wait_quiet
from front import ENGINE, Front, Stubs, smg_program, start_smg

PREFILL, DECODE = "p", "d"


@pytest.fixture(scope="session")
def program() -> Path:
    """SMG's; where it is missing, its tests are skipped, and fail in CI."""
    found = smg_program()
    if found is not None:
        return found
    text = "SMG is not installed: pip install smg"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{text}; with CI=true these tests may not be skipped", pytrace=False)
    pytest.skip(text)


@pytest.fixture(scope="session")
def running(tmp_path_factory) -> Iterator[tuple[Cluster, str]]:
    """Prefill and decode with the small chat model, and a router."""
    cluster = Cluster(tmp_path_factory.mktemp("vllm-grpc"))
    try:
        target = cluster.start_router()
        cluster.start_worker(PREFILL, "prefill", engine="torch")
        cluster.start_worker(DECODE, "decode", engine="torch")
        cluster.wait_live(target, PREFILL, DECODE)
        yield cluster, target
    finally:
        cluster.close()


@pytest.fixture
def behind(running) -> Iterator[tuple[Cluster, str]]:
    """The same for all, and empty at the end of each test."""
    yield running
    cluster, target = running
    wait_quiet(cluster, target, PREFILL, DECODE)


@pytest.fixture(scope="session")
def smg_url(running, program) -> str:
    cluster, target = running
    return start_smg(cluster, target, program)


@pytest.fixture
def front(behind, smg_url) -> Front:
    return Front(*behind, smg_url)


@pytest.fixture
def engine(behind) -> Iterator[Stubs]:
    """Stubs of VllmEngine for calls to the router itself."""
    stubs = Stubs(behind[1], ENGINE)
    yield stubs
    stubs.close()
