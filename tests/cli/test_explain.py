"""What `kvmesh explain` says of a request's wait in the router."""

import pytest

from kvmesh.cli import explain, main
from kvmesh.v1 import admin_pb2 as admin


@pytest.fixture
def said(monkeypatch, capsys):
    """What is printed of an answer."""

    def of(answer):
        monkeypatch.setattr(explain, "call_admin", lambda *_: answer)
        assert main(["explain", "0" * 32]) == 0
        return capsys.readouterr().out.splitlines()

    return of


def test_one_that_waits_still_is_told_why_and_for_how_long(said):
    waiting = admin.RouterWait(ms=120.25, tries=3, reason="no worker has room")
    assert said(admin.ExplainResponse(predicted_wait_ms=90, waiting=waiting)) == [
        "waits 120.2 ms in the router, put off 3 times, the last time since no worker has room; "
        "admission predicted 90.0 ms until its prompt starts"
    ]


def test_a_wait_is_told_before_its_decision_and_not_where_there_was_none(said):
    waited = admin.RouterWait(ms=40, tries=1, reason="nobody is ready")
    behind = admin.RouterWait(ms=7)
    decisions = [
        admin.Decision(attempt=number, policy="cost", waited=wait)
        for number, wait in enumerate([admin.RouterWait(ms=0.02), waited, behind], 1)
    ]
    lines = said(admin.ExplainResponse(predicted_wait_ms=5, decisions=decisions))
    told = [line for line in lines if line.startswith(("attempt", "waited"))]
    assert [line.split(",")[0].split(";")[0] for line in told] == [
        "attempt 1",
        "waited 40.0 ms in the router",
        "attempt 2",
        "waited 7.0 ms in the router",
        "attempt 3",
    ]
    assert "put off once, the last time since nobody is ready" in told[1]
