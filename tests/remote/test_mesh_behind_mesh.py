"""A router of kvmesh, attached to another mesh as a server that speaks OpenAI's HTTP."""

import sys

import pytest
from cluster import Cluster
from figures import wait_figures

import kvmesh
from kvmesh.engine.sim.settings import SimSettings
from kvmesh.engine.sim.vocabulary import tokenizer_files

PROMPT = [20, 21, 22, 23]
TOKENS = 24


@pytest.fixture
def clusters(tmp_path):
    made: list[Cluster] = []
    try:
        for name in ("inner", "outer"):
            made.append(Cluster(tmp_path / name))
        yield made
    finally:
        for one in reversed(made):
            one.close()


def test_ids_come_through_both(clusters, tmp_path) -> None:
    inner, outer = clusters
    server = inner.start_router()
    inner.start_worker("w", "both")
    inner.wait_live(server, "w")
    model = tmp_path / "model"
    model.mkdir()
    for name, content in tokenizer_files(SimSettings().vocabulary).items():
        (model / name).write_bytes(content)
    outer.workers["mesh"] = outer.children.spawn(
        "mesh",
        [
            sys.executable, "-m", "kvmesh.cli", "attach", f"http://{server}",
            "--worker-id", "mesh",
            "--tokenizer", str(model),
            "--etcd", outer.etcd,
        ],
        announce=True,
    )  # fmt: skip
    endpoint = outer.start_router()
    outer.wait_live(endpoint, "mesh")
    asked = {"token_ids": PROMPT, "max_tokens": TOKENS, "seed": 7}
    with kvmesh.Client(server) as direct, kvmesh.Client(endpoint) as through:
        expected, told = direct.complete(**asked), through.complete(**asked)
    assert len(expected.token_ids) == TOKENS
    assert (told.token_ids, told.text) == (expected.token_ids, expected.text)
    assert told.usage.prompt_tokens == len(PROMPT)
    for cluster, router in ((outer, endpoint), (inner, server)):
        wait_figures(cluster, router, {"open_streams": 0})
