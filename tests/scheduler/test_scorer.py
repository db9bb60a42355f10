"""A Python function that scores plans: what it gets, and what it may give."""

import argparse

import numpy as np
import pytest

from kvmesh._router import Router, measure_scorer
from kvmesh.cli import router
from kvmesh.cli.settings import UsageError

PLANS = 72


def test_it_gets_a_column_a_name_and_a_number_a_plan() -> None:
    seen = {}

    def score(columns):
        seen.update(columns)
        return columns["ttft"] + 0.2 * columns["others_stretch"]

    assert all(seconds > 0 for seconds in measure_scorer(score, PLANS, 3))
    assert {"prefill_worker", "decode_worker", "total", "wait", "cached_tokens"} <= set(seen)
    for name, column in seen.items():
        assert column.shape == (PLANS,), name
        assert column.dtype == np.float64, name
    assert not np.array_equal(seen["ttft"], seen["wait"])


def test_a_list_of_numbers_does_as_well() -> None:
    assert len(measure_scorer(lambda columns: [0.0] * len(columns["ttft"]), PLANS, 2)) == 2


@pytest.mark.parametrize("wrong", [lambda _: 1 / 0, lambda _: None, lambda _: ["a"]])
def test_what_is_no_scorer_is_told(wrong) -> None:
    with pytest.raises(ValueError, match="the scorer failed"):
        measure_scorer(wrong, PLANS, 1)


def test_a_router_takes_one() -> None:
    started = Router('{"listen": "127.0.0.1:0", "workers": []}', lambda columns: columns["total"])
    started.close()


@pytest.mark.parametrize("name", ["nothing_of_this_name:f", "kvmesh:nothing", "kvmesh", "sys:path"])
def test_a_function_that_is_not_there_is_told_by_name(name, monkeypatch) -> None:
    parser = argparse.ArgumentParser()
    router.add_arguments(parser)
    args = parser.parse_args(["--scorer", name])
    with pytest.raises(UsageError, match=name):
        router.run(args)
