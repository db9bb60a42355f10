"""A stream outlives its workers: each token once, in order, as if nothing had
happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import pytest
from cluster import Cluster
from figures import figures, wait_figures, wait_quiet
from many_streams import Streams, prompts, undisturbed

STEPS = ("--engine-arguments", "profile=step-10ms")
COUNT = 12
OWNER = 1 << 32
"""What the first router adds to an attempt's number, where tokens depend on it."""


def start(cluster: Cluster, *workers: str, arguments: Sequence[str] = ()) -> str:
    """A router and workers, named for their roles: p1, d2, b1. Prompts are prefill's."""
    endpoint = cluster.start_router("--local-prefill", "without-prefill-workers")
    roles = {"p": "prefill", "d": "decode", "b": "both"}
    for name in workers:
        cluster.begin_worker(name, roles[name[0]], *cluster.steps(*arguments))
    cluster.wait_live(endpoint, *workers)
    return endpoint


def stop_process(cluster: Cluster, name: str, number: signal.Signals) -> None:
    """Signals a worker's own process, and not what ties it to the test."""
    os.kill(cluster.workers[name].process.pid, number)


def busiest(cluster: Cluster, endpoint: str, *names: str) -> str:
    """The worker that decodes the most streams."""
    table = cluster.table(endpoint)
    return max(names, key=lambda name: table[name].load.own.decoding)


def test_a_killed_decode_worker_ends_no_stream(fresh) -> None:
    endpoint = start(fresh, "p1", "d1", "d2")
    fresh.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 250)
    streams.wait(20)
    killed = busiest(fresh, endpoint, "d1", "d2")
    fresh.kill(killed)
    fresh.speed_up()
    streams.assert_undisturbed()
    now = figures(endpoint)
    moved = now['migrations_total{cause="died"}']
    assert moved > 0
    assert sum(attempts > 1 for attempts in streams.attempts()) == moved
    assert now["moved_gaps_total"] == moved
    assert now["recomputed_tokens_total"] > 0
    assert now["failed_total"] == now["violations_total"] == 0
    wait_quiet(fresh, endpoint, *fresh.workers)


def test_a_prefill_worker_killed_while_it_computes_ends_no_stream(fresh) -> None:
    endpoint = start(fresh, "p1", "p2", "d1", arguments=["speed=0.1"])
    fresh.slow_down()
    streams = Streams(endpoint, prompts(COUNT, tokens=3_000), 10)
    table = fresh.wait_table(
        endpoint, lambda table: any(table[p].load.own.running_prefill_tokens for p in ("p1", "p2"))
    )
    computing = max(("p1", "p2"), key=lambda p: table[p].load.own.running_prefill_tokens)
    fresh.kill(computing)
    fresh.speed_up()
    streams.assert_undisturbed()
    assert max(streams.attempts()) > 1
    assert figures(endpoint)["failed_total"] == 0
    wait_quiet(fresh, endpoint, *fresh.workers)


def test_all_workers_killed_one_after_the_other_end_no_stream(fresh) -> None:
    endpoint = start(fresh, "b1", "b2")
    streams = Streams(endpoint, prompts(COUNT), 600)
    for number, victim in enumerate(("b1", "b2", "b3", "b4"), start=1):
        streams.wait(60 * number)
        fresh.kill(victim)
        fresh.start_worker(f"b{number + 2}", "both", *STEPS)
    streams.assert_undisturbed()
    # Nobody was held guilty of so many deaths.
    now = figures(endpoint)
    assert now["failed_total"] == now["quarantined_total"] == 0
    wait_quiet(fresh, endpoint, *fresh.workers)


def test_a_frozen_worker_loses_its_streams_and_its_late_tokens_change_nothing(fresh) -> None:
    # Tokens depend on the attempt: one that was mixed in would show.
    endpoint = start(fresh, "b1", "b2", arguments=["attempt_tokens=true"])
    fresh.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 400)
    streams.wait(20)
    frozen = busiest(fresh, endpoint, "b1", "b2")
    held = fresh.table(endpoint)[frozen].load.own.decoding
    assert held > 0
    stop_process(fresh, frozen, signal.SIGSTOP)
    wait_figures(fresh, endpoint, {"moved_gaps_total": held})
    stop_process(fresh, frozen, signal.SIGCONT)
    fresh.speed_up()
    outputs = streams.join()
    now = figures(endpoint)
    assert now['migrations_total{cause="silent"}'] == held
    # What it had on its way came when it was thawed, and was of no use.
    assert now["stale_frames_total"] > 0
    assert now["failed_total"] == now["violations_total"] == 0
    assert sorted(set(streams.attempts())) == [1, 2]
    for prompt, output, attempts in zip(streams.asked, outputs, streams.attempts(), strict=True):
        assert_attempts(prompt, output, attempts)
    # Its old attempts were cancelled there.
    wait_quiet(fresh, endpoint, "b1", "b2")
    fresh.assert_alive()


def assert_attempts(prompt: list[int], output: list[int], attempts: int) -> None:
    """Each attempt's tokens follow from what was delivered before them."""
    first = undisturbed(prompt, len(output), tag=OWNER | 1)
    own = next((i for i, (a, b) in enumerate(zip(output, first, strict=True)) if a != b), None)
    assert (own is None) == (attempts == 1)
    if own is not None:
        rest = undisturbed(prompt + output[:own], len(output) - own, tag=OWNER | 2)
        assert output[own:] == rest


def test_a_stuck_engine_under_a_beating_port_loses_its_streams(fresh, tmp_path) -> None:
    stuck = tmp_path / "stuck"
    endpoint = fresh.start_router()
    fresh.start_worker("b1", "both", *fresh.steps(f"stuck_while={stuck}"))
    fresh.wait_live(endpoint, "b1")
    fresh.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 600)
    streams.wait(20)
    fresh.start_worker("b2", "both", *fresh.steps())
    fresh.wait_live(endpoint, "b2")
    stuck.touch()
    wait_figures(fresh, endpoint, {"moved_gaps_total": COUNT})
    assert "step takes far longer" in fresh.table(endpoint)["b1"].state_detail
    stuck.unlink()
    fresh.speed_up()
    streams.assert_undisturbed()
    wait_quiet(fresh, endpoint, "b1", "b2")
    fresh.assert_alive()


def test_long_steps_are_no_stuck_ones(fresh) -> None:
    """Chunks of some seconds each, as predicted: nobody is given up."""
    endpoint = fresh.start_router()
    slow = "profile=cpu-135m,speed=0.1"
    for name in ("b1", "b2"):
        fresh.begin_worker(name, "both", "--engine-arguments", slow)
    fresh.wait_live(endpoint, "b1", "b2")
    streams = Streams(endpoint, prompts(2, tokens=250), 2)
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now.total("migrations_total") == 0
    assert streams.attempts() == [1, 1]


@pytest.mark.slow
def test_a_worker_frozen_for_ten_seconds_changes_nothing_when_it_is_thawed(fresh) -> None:
    """The clock here is the freeze itself."""
    # Tokens depend on the attempt: a late one of another attempt would show.
    endpoint = start(fresh, "b1", "b2", arguments=["attempt_tokens=true"])
    streams = Streams(endpoint, prompts(COUNT), 1_500)
    streams.wait(20)
    frozen = busiest(fresh, endpoint, "b1", "b2")
    held = fresh.table(endpoint)[frozen].load.own.decoding
    assert held > 0
    stop_process(fresh, frozen, signal.SIGSTOP)
    fresh.children.wait(10)
    stop_process(fresh, frozen, signal.SIGCONT)
    # What it had is dropped, and what it still said has come.
    fresh.wait_empty(frozen)
    outputs = streams.join()
    now = figures(endpoint)
    assert now['migrations_total{cause="silent"}'] == held
    assert now["violations_total"] == 0
    for prompt, output, attempts in zip(streams.asked, outputs, streams.attempts(), strict=True):
        assert_attempts(prompt, output, attempts)
    wait_quiet(fresh, endpoint, "b1", "b2")
