"""The verdict counts what it is there to count, and calls what it never saw none."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from faults import Drained, Fault, Frozen, Killed, RouterKilled, SessionSlow
from mesh import LIVE, PATIENT, STEP_MS, SUSPECT_MS, works
from player import Played
from verdict import AFTER_S, Verdict, falsely_lost, figures

from kvmesh.v1 import admin_pb2

BEGAN = 1_000.0


def played(fault: Fault, begin: float, end: float) -> Played:
    """A fault that was there from one second of the run to another."""
    return Played(fault, BEGAN + begin, BEGAN + end - 0.1, BEGAN + end)


def verdict(*gaps: tuple[float, float]) -> Verdict:
    """After streams with these gaps."""
    return Verdict(attempt_tokens=False, gaps=[(BEGAN + begin, BEGAN + end) for begin, end in gaps])


def line(at: float, **fields: str) -> dict[str, object]:
    """What a router logs at a time of time.monotonic."""
    told = datetime.fromtimestamp(at + time.time() - time.monotonic(), UTC)
    return {"timestamp": told.isoformat(), "level": "WARN", **fields}


def silent(at: float, worker: str) -> dict[str, object]:
    return line(at, event="worker_lost", worker=worker, why="Silent")


def cost(at: float, worker: str, loss: str) -> dict[str, object]:
    return line(at, message="worker lost", worker=worker, loss=loss, streams="3")


# -- who was given up ------------------------------------------------------


def test_an_idle_worker_that_was_given_up_for_nothing_counts() -> None:
    """It had no streams, so that its loss cost none: the session's state alone tells of it."""
    (false,) = falsely_lost({"r1": [silent(BEGAN, "d1")]}, [])
    assert false.startswith("r1 at 1000.")
    assert "d1 lost (Silent)" in false


def test_a_loss_counts_once_whether_it_cost_streams_or_not() -> None:
    both = [cost(BEGAN, "d1", "Silent"), silent(BEGAN, "d1")]
    assert len(falsely_lost({"r1": both}, [])) == 1
    # Of these the state says nothing but that it is dialled again.
    for loss in ("Broken", "Died"):
        assert len(falsely_lost({"r1": [cost(BEGAN, "d1", loss)]}, [])) == 1


def test_a_loss_counts_at_each_router_that_told_of_it() -> None:
    assert len(falsely_lost({name: [silent(BEGAN, "d1")] for name in ("r1", "r2")}, [])) == 2


@pytest.mark.parametrize(
    ("fault", "at", "falsely"),
    [
        (Frozen("d1", 1.0), 3.0, False),
        (Frozen("d1", 1.0), 5.0 + AFTER_S / 2, False),
        (Frozen("d1", 1.0), 5.0 + AFTER_S * 2, True),
        (Frozen("d1", 1.0), 1.0, True),
        (Frozen("d2", 1.0), 3.0, True),
        (SessionSlow("d1", 1.0, 100), 3.0, True),
        (RouterKilled("r1", 1.0), 3.0, True),
    ],
    ids=["it", "a moment later", "later", "before", "another", "a harmless one", "a router's"],
)
def test_a_loss_needs_a_fault_that_explains_it(fault, at, falsely) -> None:
    logs = {"r1": [silent(BEGAN + at, "d1")]}
    assert bool(falsely_lost(logs, [played(fault, 2.0, 5.0)])) == falsely


def test_other_lines_of_a_log_are_no_losses() -> None:
    others = [
        line(BEGAN, event="worker_suspect", worker="d1", why="Silent"),
        line(BEGAN, event="worker_half_open", worker="d1"),
        line(BEGAN, message="session ended", worker="d1", why="closed by the worker"),
    ]
    assert falsely_lost({"r1": others}, []) == []


# -- how long streams stood still ------------------------------------------


def test_a_gap_belongs_to_the_one_kind_of_fault_that_explains_it() -> None:
    faults = [played(Killed("d1", 0.0), 1, 2), played(Frozen("d2", 3.0), 10, 14)]
    run = figures(verdict((1.0, 1.5), (10.1, 13.2), (13.9, 14.6)), faults, [])
    assert run["longest_gap_kill_s"] == pytest.approx(0.5)
    assert run["longest_gap_freeze_s"] == pytest.approx(3.1)
    # For more than half of this one nothing was amiss any more.
    assert run["longest_unexplained_gap_s"] == pytest.approx(0.7)
    assert run["longest_gap_s"] == pytest.approx(3.1)


def test_a_gap_under_faults_of_two_kinds_is_explained_but_belongs_to_neither() -> None:
    faults = [played(Killed("d1", 0.0), 1, 9), played(Frozen("d2", 3.0), 1, 9)]
    run = figures(verdict((2.0, 8.0)), faults, [])
    assert run["longest_gap_kill_s"] is run["longest_gap_freeze_s"] is None
    assert run["longest_unexplained_gap_s"] is None
    assert run["longest_gap_s"] == pytest.approx(6.0)


def test_what_was_never_seen_is_none_and_not_zero() -> None:
    run = figures(verdict(), [played(Killed("d1", 0.0), 1, 2)], [])
    names = [name for name in run if "gap" in name]
    assert len(names) == 6
    assert {run[name] for name in names} == {None}
    assert run["by_kind"]["Killed"]["longest_gap_s"] is None


def test_drains_with_time_to_hand_over_are_told_from_those_without() -> None:
    patient, hurried = PATIENT[0], next(name for name in ("d1", "d2") if name not in PATIENT)
    faults = [played(Drained(patient, 0.0), 1, 2), played(Drained(hurried, 0.0), 5, 6)]
    run = figures(verdict((1.0, 1.1), (5.0, 5.4)), faults, [])
    assert run["drain_gap_steps"] == pytest.approx(100 / STEP_MS)
    assert run["give_back_gap_steps"] == pytest.approx(400 / STEP_MS)
    assert run["by_kind"]["Drained"]["longest_gap_s"] == pytest.approx(0.4)
    assert run["by_kind"]["Drained"]["longest_gap_began"] == BEGAN + 5.0


# -- when a fault is over --------------------------------------------------


def test_a_session_on_probation_is_in_order_only_while_its_worker_is_heard_of() -> None:
    """Else a fault that begins then is over at once, and the loss that it causes is false."""

    def status(state: admin_pb2.SessionState, silent_ms: float) -> admin_pb2.WorkerStatus:
        return admin_pb2.WorkerStatus(state=state, silent_ms=silent_ms)

    half_open, live = admin_pb2.SESSION_STATE_HALF_OPEN, admin_pb2.SESSION_STATE_LIVE
    assert works(status(live, 0.0))
    assert works(status(half_open, SUSPECT_MS - 1.0))
    assert not works(status(half_open, SUSPECT_MS))
    assert not works(status(half_open, 0.0), LIVE)
    assert not works(status(admin_pb2.SESSION_STATE_SUSPECT, 0.0))
