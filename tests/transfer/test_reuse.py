"""Each side killed or expired in every state, while another request gets the freed blocks.

(Cancelled in every state: test_transfer.py.)
"""

import os
import signal
from typing import Any

import numpy as np
import pytest

from kvmesh import _router

WAYS = pytest.mark.parametrize("shared_memory", [True, False], ids=["shm", "tcp"])
SLOTS = [0, 1, 2, 3]


def content_of(seed: int, pool: np.ndarray) -> np.ndarray:
    """What a peer's pool of this shape holds (peer.py)."""
    words = np.arange(pool.size // 8, dtype=np.uint64) * np.uint64(2 * seed + 1)
    return words.view(np.uint8).reshape(pool.shape)


def to_here(here: Any, there: Any, slots_from: list[int], slots_to: list[int]) -> None:
    """A whole hand-off from a peer; its content is checked."""
    transfer_id = os.urandom(16)
    there.call("offer", transfer_id, len(slots_from))
    there.call("ready", transfer_id, 0, slots_from)
    there.call("commit", transfer_id, 16 * len(slots_from))
    here.pull(transfer_id, there, 0, slots_to)
    here.expect(_router.Committed, transfer_id)


def to_node(sender: Any, receiver: Any, slots_from: list[int], slots_to: list[int]) -> None:
    """A whole hand-off between two nodes of this process."""
    transfer_id = os.urandom(16)
    sender.node.offer(transfer_id, len(slots_from))
    sender.node.ready(transfer_id, 0, slots_from)
    sender.node.commit(transfer_id, 16 * len(slots_from))
    receiver.pull(transfer_id, sender, 0, slots_to)
    receiver.expect(_router.Committed, transfer_id)
    sender.expect(_router.SenderReleased, transfer_id)


def bring_to(state: str, here: Any, there: Any) -> bytes:
    """A hand-off from a peer to here, up to a state. Returns its id."""
    transfer_id = os.urandom(16)
    if state != "awaited":
        there.call("offer", transfer_id, 4)
    here.pull(transfer_id, there, 0, SLOTS)
    if state in ("reserved", "flowing"):
        assert there.call("event") == ["Pulled"]
    if state == "flowing":
        there.call("ready", transfer_id, 0, SLOTS[:2])
        while here.expect(_router.Verified).upto_block < 2:
            pass
    if state in ("commit sent", "committed"):
        there.call("ready", transfer_id, 0, SLOTS)
        there.call("commit", transfer_id, 64)
    return transfer_id


@WAYS
@pytest.mark.parametrize("state", ["awaited", "reserved", "flowing", "commit sent", "committed"])
def test_blocks_that_a_killed_sender_was_to_fill(nodes, peers, shared_memory, state):
    b = nodes("b")
    a = peers("a", shared_memory=shared_memory, offer_timeout_s=60, seed=1)
    c = peers("c", shared_memory=shared_memory, seed=2)
    transfer_id = bring_to(state, b, a)
    if state == "committed":
        b.expect(_router.Committed, transfer_id)
    a.signal(signal.SIGKILL)
    if state == "commit sent":
        # All of it came, or the loss is told; never something else.
        end = b.expect((_router.Committed, _router.ReceiveFailed), transfer_id)
        if isinstance(end, _router.Committed):
            assert (b.content[SLOTS] == content_of(1, b.content)[SLOTS]).all()
    elif state == "committed":
        assert (b.content[SLOTS] == content_of(1, b.content)[SLOTS]).all()
    else:
        assert b.expect(_router.ReceiveFailed, transfer_id).reason == "lost"
    assert b.idle()
    # Told means free: the next request's blocks are nobody else's.
    to_here(b, c, [4, 5, 6, 7], SLOTS)
    assert (b.content[SLOTS] == content_of(2, b.content)[4:8]).all()
    assert b.idle()


@WAYS
@pytest.mark.parametrize("state", ["before the offer", "reserved", "flowing", "committing"])
def test_blocks_that_a_killed_receiver_was_to_read(nodes, peers, shared_memory, state):
    a = nodes("a", shared_memory=shared_memory, offer_timeout_s=60)
    b, c = peers("b"), nodes("c")
    a.fill()
    transfer_id = os.urandom(16)
    if state != "before the offer":
        a.node.offer(transfer_id, 4)
    b.call("pull", transfer_id, a.address, "a", 1, 0, SLOTS)
    if state == "before the offer":
        a.until("awaited")
    else:
        a.expect(_router.Pulled)
    if state == "flowing":
        a.node.ready(transfer_id, 0, [0, 1])
        assert "Verified" in b.call("event")
    if state == "committing":
        b.signal(signal.SIGSTOP)
        a.node.ready(transfer_id, 0, SLOTS)
        a.node.commit(transfer_id, 64)
    b.signal(signal.SIGKILL)
    if state == "before the offer":
        while a.node.residue()["awaited"]:
            a.node.wait(0.01)
    else:
        assert a.expect(_router.SenderAborted, transfer_id).reason == "lost"
    assert a.idle()
    # Another request gets them at once, and hands them on.
    a.pool.raise_versions(SLOTS)
    a.content[SLOTS] = 77
    to_node(a, c, SLOTS, SLOTS)
    assert (c.content[SLOTS] == 77).all()
    assert a.idle()
    assert c.idle()


@WAYS
@pytest.mark.parametrize("state", ["reserved", "flowing", "sending"])
def test_blocks_that_a_frozen_sender_was_to_fill(nodes, peers, shared_memory, state):
    """Given up after the lease, used anew, and the sender thawed: nothing late arrives."""
    b = nodes("b", lease_s=3.0)
    a = peers("a", shared_memory=shared_memory, seed=1)
    c = peers("c", shared_memory=shared_memory, seed=2)
    transfer_id = bring_to("reserved" if state == "sending" else state, b, a)
    if state == "sending":
        # It freezes while it sends: what it says may stand anywhere on the way.
        a.begin("ready", transfer_id, 0, SLOTS)
        b.expect(_router.Verified)
    a.signal(signal.SIGSTOP)
    assert b.expect(_router.ReceiveFailed, transfer_id).reason == "lease_expired"
    assert b.idle()
    to_here(b, c, [4, 5, 6, 7], SLOTS)
    a.signal(signal.SIGCONT)
    if state == "sending":
        a.result()
    # Once it knows that it is over, it has said all that it will say.
    while "SenderAborted" not in a.call("event"):
        pass
    assert (b.content[SLOTS] == content_of(2, b.content)[4:8]).all()
    assert b.idle()


@WAYS
@pytest.mark.parametrize("state", ["reserved", "flowing", "committing"])
def test_blocks_that_a_frozen_receiver_was_to_read(nodes, peers, shared_memory, state):
    """Used anew after the lease, and the reader thawed: it never has the new content."""
    a = nodes("a", shared_memory=shared_memory, lease_s=3.0)
    b, c = peers("b", seed=3), nodes("c")
    a.fill()
    before = a.content[SLOTS].copy()
    transfer_id = os.urandom(16)
    b.call("pull", transfer_id, a.address, "a", 1, 0, SLOTS)
    a.until("awaited")
    a.node.offer(transfer_id, 4)
    a.expect(_router.Pulled)
    if state == "flowing":
        a.node.ready(transfer_id, 0, [0, 1])
        # It may be told of one at a time.
        while b.call("verified") < 2:
            assert "Verified" in b.call("event")
    b.signal(signal.SIGSTOP)
    if state == "committing":
        a.node.ready(transfer_id, 0, SLOTS)
        a.node.commit(transfer_id, 64)
    assert a.expect(_router.SenderAborted, transfer_id).reason == "lease_expired"
    a.pool.raise_versions(SLOTS)
    a.content[SLOTS] = 99
    to_node(a, c, SLOTS, SLOTS)
    assert (c.content[SLOTS] == 99).all()
    b.signal(signal.SIGCONT)
    told = b.call("event")
    while not {"Committed", "ReceiveFailed"} & set(told):
        told += b.call("event")
    if "Committed" in told:
        # By TCP all of it may have been on the way already.
        assert state == "committing"
        assert b.call("sums", SLOTS) == sums(before)
    else:
        # What was copied after that is discarded; what counts is what was there before.
        verified = b.call("verified")
        if state != "committing":
            assert verified == (2 if state == "flowing" else 0)
        assert b.call("sums", SLOTS)[:verified] == sums(before)[:verified]
    assert a.idle()


def sums(blocks: np.ndarray) -> list[int]:
    """As peer.py has them."""
    return [int(block.view(np.uint64).sum(dtype=np.uint64)) for block in blocks]
