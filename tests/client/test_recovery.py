"""What a client does when its stream is cut off."""

import grpc
import pytest

from kvmesh.client.errors import (
    MeshError,
    MeshUnavailableError,
    ModelNotFoundError,
    OverloadedError,
)
from kvmesh.client.events import Accepted, Tokens
from kvmesh.client.recovery import Recovery
from kvmesh.client.request import build_request

ACCEPTED = Accepted("00" * 16, 77, 1, 8, "m")
GONE = MeshUnavailableError(grpc.StatusCode.UNAVAILABLE, "gone")


def begun(recover_s: float = 30.0) -> Recovery:
    recovery = Recovery(build_request({"prompt": "a"}), None, recover_s)
    assert recovery.take(ACCEPTED)
    return recovery


def test_it_goes_on_from_what_came_with_the_seed_in_force() -> None:
    recovery = begun()
    assert recovery.take(Tokens(0, (5, 6), "x"))
    assert recovery.take(Tokens(2, (7,), "y"))
    assert recovery.pause(GONE) > 0
    asked = recovery.request
    assert asked.prompt == "a"
    assert list(asked.continue_from.token_ids) == [5, 6, 7]
    assert asked.continue_from.seed == 77
    # That it was admitted again is nothing new to the caller.
    assert not recovery.take(ACCEPTED)


def test_one_that_is_resumable_is_resumed_first() -> None:
    recovery = Recovery(build_request({"prompt": "a", "resumable": True}), None, 30.0)
    assert recovery.take(ACCEPTED)
    recovery.take(Tokens(0, (5, 6), "x"))
    assert recovery.resume is None
    recovery.pause(GONE)
    asked = recovery.resume
    assert asked is not None
    assert (asked.generation_id, asked.next_index) == ("00" * 16, 2)
    assert list(asked.token_ids) == [5, 6]
    # A router that does not answer says nothing of the generation.
    recovery.pause(GONE)
    assert recovery.resume is not None
    # One that does, does: what the client holds is gone on from, at once.
    unknown = ModelNotFoundError(grpc.StatusCode.NOT_FOUND, "unknown generation")
    assert recovery.pause(unknown) == 0.0
    assert recovery.resume is None
    assert list(recovery.request.continue_from.token_ids) == [5, 6]
    # That is another generation.
    recovery.take(Accepted("11" * 16, 77, 1, 8, "m"))
    recovery.take(Tokens(2, (7,), "y"))
    recovery.pause(GONE)
    assert recovery.resume is not None
    assert (recovery.resume.generation_id, recovery.resume.next_index) == ("11" * 16, 3)


UNSAID = MeshUnavailableError(grpc.StatusCode.UNAVAILABLE, "not yet", "NOT_YET", retry_after_s=0.1)


def lost_at(
    monkeypatch: pytest.MonkeyPatch, now: list[float], timeout: float | None, recover_s: float
) -> Recovery:
    """One that is to be resumed from now on, by a clock that is set."""
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    recovery = Recovery(build_request({"prompt": "a", "resumable": True}), timeout, recover_s)
    recovery.take(ACCEPTED)
    recovery.take(Tokens(0, (5, 6), "x"))
    recovery.pause(GONE)
    return recovery


@pytest.mark.parametrize(
    ("timeout", "half", "answer"),
    [(None, 5.0, GONE), (4.0, 2.0, GONE), (4.0, 2.0, UNSAID)],
    ids=["its own time", "a deadline", "a deadline where nobody can say"],
)
def test_who_does_not_say_is_asked_for_half_of_the_time_and_the_rest_is_for_the_other_way(
    monkeypatch: pytest.MonkeyPatch, timeout: float | None, half: float, answer: MeshError
) -> None:
    now = [100.0]
    recovery = lost_at(monkeypatch, now, timeout, 10.0)
    now[0] += half - 0.1
    assert recovery.pause(answer) > (answer.retry_after_s or 0.0)
    assert recovery.resume is not None
    now[0] += 0.1
    recovery.pause(answer)
    assert recovery.resume is None
    assert list(recovery.request.continue_from.token_ids) == [5, 6]


def test_routers_that_cannot_say_are_asked_as_long_as_one_silent_worker_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    recovery = lost_at(monkeypatch, now, None, 60.0)
    # No router answers for a while: that says nothing of the generation.
    now[0] += 8.0
    asked = now[0] + recovery.pause(GONE)
    now[0] = asked + 1.0  # The call has waited for a worker.
    while now[0] < asked + 3.0:
        assert recovery.resume is not None
        pause = recovery.pause(UNSAID)
        assert 0.1 < pause <= 0.1 + 0.5, "a router that answers is soon asked again"
        now[0] += pause
    # Another worker may have fallen silent meanwhile: it is not waited for as well.
    assert recovery.pause(UNSAID) == 0.0
    assert recovery.resume is None
    assert list(recovery.request.continue_from.token_ids) == [5, 6]
    # What was in vain does not put that call off.
    assert recovery.pause(GONE) <= 0.05


@pytest.mark.parametrize(("silent", "asked_for"), [(0.0, 3.0), (1.5, 1.5), (8.0, 1.0)])
def test_a_worker_that_was_silent_before_its_router_was_lost_is_not_waited_for_anew(
    monkeypatch: pytest.MonkeyPatch, silent: float, asked_for: float
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("random.uniform", lambda least, _: 0.0)
    recovery = Recovery(build_request({"prompt": "a", "resumable": True}), None, 60.0)
    recovery.take(ACCEPTED)
    recovery.take(Tokens(0, (5, 6), "x"))
    now[0] += silent
    recovery.pause(GONE)
    now[0] += asked_for - 0.01
    assert recovery.pause(UNSAID) > 0.0
    assert recovery.resume is not None
    now[0] += 0.02
    assert recovery.pause(UNSAID) == 0.0
    assert recovery.resume is None


def test_a_long_prompt_is_waited_for_from_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("random.uniform", lambda least, _: 0.0)
    recovery = Recovery(build_request({"prompt": "a", "resumable": True}), None, 60.0)
    recovery.take(ACCEPTED)
    now[0] += 20.0
    recovery.pause(GONE)
    now[0] += 2.9
    assert recovery.pause(UNSAID) > 0.0
    assert recovery.resume is not None


def test_what_another_call_took_over_is_over() -> None:
    recovery = Recovery(build_request({"prompt": "a", "resumable": True}), None, 30.0)
    recovery.take(ACCEPTED)
    with pytest.raises(MeshError):
        recovery.pause(MeshError(grpc.StatusCode.ABORTED, "taken over", "TAKEN_OVER"))


def test_what_never_began_or_is_no_loss_is_the_callers() -> None:
    with pytest.raises(MeshUnavailableError):
        Recovery(build_request({"prompt": "a"}), None, 30.0).pause(GONE)
    for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED):
        with pytest.raises(MeshError):
            begun().pause(MeshError(code, "no"))


def test_one_that_was_lost_waits_for_room_elsewhere_as_long_as_it_is_told() -> None:
    full = OverloadedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=4.0)
    with pytest.raises(OverloadedError):
        begun().pause(full)
    recovery = begun()
    recovery.pause(GONE)
    assert 4.0 < recovery.pause(full) <= 4.0 + 0.1
    # Nobody waits for what would come too late.
    far = OverloadedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=31.0)
    with pytest.raises(MeshUnavailableError):
        recovery.pause(far)
    # Without a time there is nothing to wait for.
    with pytest.raises(OverloadedError):
        recovery.pause(OverloadedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "slow client"))


def test_it_can_be_turned_off() -> None:
    with pytest.raises(MeshUnavailableError):
        begun(recover_s=0.0).pause(GONE)


def test_pauses_grow_until_something_comes() -> None:
    recovery = begun()
    bounds = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    for bound in bounds:
        assert bound / 4 <= recovery.pause(GONE) <= bound
    recovery.take(Tokens(0, (5,), ""))
    assert recovery.pause(GONE) <= bounds[0]


def test_when_nothing_helps_the_first_loss_is_told() -> None:
    recovery = begun(recover_s=0.02)
    first = MeshUnavailableError(grpc.StatusCode.UNAVAILABLE, "lost", metadata={"next_index": "3"})
    recovery.pause(first)

    def try_on() -> None:
        while True:
            recovery.pause(GONE)

    with pytest.raises(MeshUnavailableError) as caught:
        try_on()
    assert caught.value.next_index == 3
