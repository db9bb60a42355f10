"""Names of prefixes for routers (proto/HASHES.md)."""

import json
from array import array
from pathlib import Path

import pytest

from kvmesh.engine.core.chain import Chain

VECTORS = Path(__file__).parents[2] / "proto" / "hash_vectors.json"


def test_an_adapter_is_known_by_its_digest_not_by_its_name() -> None:
    here = Chain("m" * 64, {"formal": "1" * 64, "casual": "2" * 64})
    there = Chain("m" * 64, {"polite": "1" * 64, "formal": "2" * 64})
    assert here.root("formal", "s") == there.root("polite", "s")
    assert here.root("formal", "s") != there.root("formal", "s")
    assert here.root("", "s") == there.root("", "s")


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text())["cases"], ids=lambda c: c["name"])
def test_names_are_the_published_ones(case) -> None:
    adapters = {"its name": case["adapter"]} if case["adapter"] else {}
    chain = Chain(case["model_digest"], adapters)
    root = chain.root("its name" if adapters else "", case["salt"])
    assert root == int(case["root"], 16)
    ids = array("I", case["ids"]).tobytes()
    assert list(chain.hashes(root, ids)) == [int(value, 16) for value in case["chain"]]


def test_a_name_that_the_model_does_not_have_is_no_other() -> None:
    chain = Chain("m" * 64, {"formal": "1" * 64})
    assert len({chain.root(name, "") for name in ("", "formal", "unknown", "other")}) == 4
