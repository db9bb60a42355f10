"""A transfer between two nodes: what is moved, refused, discarded and kept."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import threading

import numpy as np
import pytest

from kvmesh import _router
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

WAYS = pytest.mark.parametrize("shared_memory", [True, False], ids=["shm", "tcp"])


def hand_off(sender, receiver, slots_from, slots_to, *, tokens, from_token=0, **commit):
    transfer_id = os.urandom(16)
    receiver.pull(transfer_id, sender, from_token, slots_to)
    sender.node.offer(transfer_id, len(slots_from))
    full = tokens // 16
    sender.node.ready(transfer_id, 0, slots_from[:full])
    partial = (full, slots_from[full]) if tokens % 16 else None
    sender.node.commit(transfer_id, tokens, partial, **commit)
    event = receiver.expect(_router.Committed, transfer_id)
    sender.expect(_router.SenderReleased, transfer_id)
    return event


@WAYS
@pytest.mark.parametrize("block_bytes", [1, 240, 1000, 1024, 65536, 753664])
def test_blocks_arrive_as_they_were(nodes, shared_memory, block_bytes):
    a = nodes("a", block_bytes=block_bytes, shared_memory=shared_memory)
    b = nodes("b", block_bytes=block_bytes)
    a.fill()
    logprobs = [inference.TokenLogprobs().SerializeToString()]
    event = hand_off(
        a, b, [3, 1, 9, 15], [0, 7, 4], tokens=53, from_token=16, output_ids=[42], logprobs=logprobs
    )
    assert event.shared_memory is shared_memory
    assert (event.kv_tokens, event.output_ids, event.logprobs) == (53, [42], logprobs)
    assert (event.blocks, event.bytes) == (3, 3 * block_bytes)
    assert (b.content[[0, 7, 4]] == a.content[[1, 9, 15]]).all()
    assert a.idle()
    assert b.idle()


@WAYS
def test_chunks_flow_while_later_ones_are_made(nodes, shared_memory):
    a, b = nodes("a", shared_memory=shared_memory), nodes("b")
    transfer_id = os.urandom(16)
    b.pull(transfer_id, a, 0, list(range(12)))
    a.node.offer(transfer_id, 12)
    a.expect(_router.Pulled)
    for chunk in range(3):
        slots = list(range(4 * chunk, 4 * chunk + 4))
        a.content[slots] = chunk + 1
        a.node.ready(transfer_id, 4 * chunk, slots)
        while b.expect(_router.Verified).upto_block < 4 * chunk + 4:
            pass
        assert (b.content[slots] == chunk + 1).all()
    a.node.commit(transfer_id, 192)
    assert b.expect(_router.Committed).kv_tokens == 192


def test_a_pull_waits_for_its_offer_but_not_for_ever(nodes):
    a, b = nodes("a", offer_timeout_s=0.2), nodes("b")
    transfer_id = os.urandom(16)
    b.pull(transfer_id, a, 0, [0])
    assert b.expect(_router.ReceiveFailed).reason == "unknown"
    assert a.idle()
    assert b.idle()


def test_an_id_that_the_receiver_aborted_refuses_a_later_offer(nodes):
    a, b = nodes("a", offer_timeout_s=60), nodes("b")
    transfer_id = os.urandom(16)
    b.pull(transfer_id, a, 0, [0])
    a.until("awaited")
    assert b.node.abort(transfer_id)
    assert b.expect(_router.ReceiveFailed).reason == "cancelled"
    a.until("remembered")
    with pytest.raises(_router.TransferError) as refused:
        a.node.offer(transfer_id)
    assert refused.value.args[0] == "cancelled"


@WAYS
@pytest.mark.parametrize("state", ["reserved", "flowing", "partly"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_cancel_in_each_state_frees_both_sides(nodes, shared_memory, state, side):
    a, b = nodes("a", shared_memory=shared_memory), nodes("b")
    a.fill()
    transfer_id = os.urandom(16)
    a.node.offer(transfer_id, 4)
    b.pull(transfer_id, a, 0, [0, 1, 2, 3])
    a.expect(_router.Pulled)
    if state != "reserved":
        a.node.ready(transfer_id, 0, [4, 5])
    if state == "partly":
        while b.expect(_router.Verified).upto_block < 2:
            pass
    who = a if side == "sender" else b
    assert who.node.abort(transfer_id, "finished", "the first token ended it")
    failed = b.expect(_router.ReceiveFailed)
    assert failed.reason == "finished"
    if state == "partly":
        assert failed.verified_blocks == 2
    assert (b.content[: failed.verified_blocks] == a.content[4 : 4 + failed.verified_blocks]).all()
    if side == "receiver":
        aborted = a.expect(_router.SenderAborted)
        assert (aborted.reason, aborted.commit_sent) == ("finished", False)
    assert a.idle()
    assert b.idle()
    # Another request takes the same blocks at once, on both sides.
    a.pool.raise_versions([4, 5])
    a.content[[4, 5]] = 77
    hand_off(a, b, [4, 5], [0, 1], tokens=32)
    assert (b.content[[0, 1]] == 77).all()


@WAYS
def test_a_slot_used_anew_is_discarded(nodes, shared_memory):
    a, b = nodes("a", shared_memory=shared_memory), nodes("b")
    a.fill()
    transfer_id = os.urandom(16)
    a.node.offer(transfer_id)
    a.node.ready(transfer_id, 0, [0, 1, 2])
    # The version is that of the announcement; re-use comes before the pull.
    a.pool.raise_versions([1])
    a.content[1] = 0
    b.pull(transfer_id, a, 0, [0, 1, 2])
    failed = b.expect(_router.ReceiveFailed)
    assert failed.reason == "mismatch"
    assert failed.verified_blocks <= 1
    assert a.expect(_router.SenderAborted).reason == "mismatch"
    assert b.node.figures()["mismatches"] == 1


class FlippingProxy:
    """Passes TCP on, and flips one bit of the n-th byte that the server sends."""

    def __init__(self, target: str, position: int) -> None:
        host, port = target.rsplit(":", 1)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = socket.create_connection((host, int(port)))
        self.position = position
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        client, _ = self.listener.accept()
        self.listener.close()
        self.client = client
        up = threading.Thread(target=self.pipe, args=(client, self.server, -1))
        up.start()
        self.pipe(self.server, client, self.position)
        up.join()
        client.close()
        self.server.close()

    def pipe(self, source, target, flip) -> None:
        at = 0
        try:
            while data := source.recv(65536):
                if at <= flip < at + len(data):
                    changed = bytearray(data)
                    changed[flip - at] ^= 1
                    data = bytes(changed)
                at += len(data)
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_bit_flipped_on_the_way_is_found(nodes):
    a, b = nodes("a", shared_memory=False), nodes("b")
    a.fill()
    # Far behind the frames, inside block 2 of 4.
    proxy = FlippingProxy(a.address, 2 * 65536 + 32768)
    transfer_id = os.urandom(16)
    a.node.offer(transfer_id)
    a.node.ready(transfer_id, 0, [0, 1, 2, 3])
    b.pull(transfer_id, a, 0, [4, 5, 6, 7], address=proxy.address)
    failed = b.expect(_router.ReceiveFailed)
    assert failed.reason == "mismatch"
    assert failed.verified_blocks <= 2
    assert (b.content[4 : 4 + failed.verified_blocks] == a.content[: failed.verified_blocks]).all()
    b.node.close()
    proxy.thread.join()


def test_pairs_that_do_not_fit_are_refused(nodes):
    a = nodes("a", compatibility=wire.KvCompatibility(dtype="float32").SerializeToString())
    others = [
        nodes("b", compatibility=wire.KvCompatibility(dtype="float16").SerializeToString()),
        nodes(
            "c",
            compatibility=wire.KvCompatibility(dtype="float32").SerializeToString(),
            block_tokens=32,
        ),
        nodes(
            "d",
            compatibility=wire.KvCompatibility(dtype="float32").SerializeToString(),
            block_bytes=1024,
        ),
    ]
    for other in others:
        transfer_id = os.urandom(16)
        a.node.offer(transfer_id)
        other.pull(transfer_id, a, 0, [0])
        assert other.expect(_router.ReceiveFailed).reason == "incompatible"
        assert a.expect(_router.SenderAborted).reason == "incompatible"


def test_another_incarnation_is_refused(nodes):
    a, b = nodes("a"), nodes("b")
    b.node.pull(os.urandom(16), a.address, "a", 2, 0, [0])
    assert b.expect(_router.ReceiveFailed).reason == "unknown"
    assert hand_off(a, b, [0], [0], tokens=16).kv_tokens == 16


@WAYS
def test_without_the_clusters_token_nothing_is_given_and_nothing_is_taken(
    nodes, tmp_path, shared_memory
):
    def token(name: str, *lines: str) -> _router.ClusterToken:
        file = tmp_path / name
        file.write_text("\n".join(line * 16 for line in lines))
        return _router.ClusterToken(str(file))

    own = nodes("own", token=token("own", "s"), shared_memory=shared_memory)
    # One that was changed where the other was not yet: each accepts what the other shows.
    changed = nodes("changed", token=token("changed", "n", "s"), shared_memory=shared_memory)
    both = nodes("both", token=token("both", "s", "n"), shared_memory=shared_memory)
    for other in (nodes("guesses", token=token("guess", "g")), nodes("has none")):
        for receiver, sender in ((other, own), (own, other)):
            receiver.pull(os.urandom(16), sender, 0, [0])
            # Never who asks, never what is asked for: the connection is closed.
            assert receiver.expect(_router.ReceiveFailed).reason == "lost"
    assert hand_off(own, both, [0], [0], tokens=16).kv_tokens == 16
    assert hand_off(changed, both, [0], [0], tokens=16).kv_tokens == 16
    own.node.pull(os.urandom(16), changed.address, "changed", 1, 0, [0])
    assert own.expect(_router.ReceiveFailed).reason == "lost"


@WAYS
def test_a_prefix_is_pulled_from_any_holder(nodes, shared_memory):
    a, b = nodes("a", shared_memory=shared_memory), nodes("b")
    a.fill()
    transfer_id, ids = os.urandom(16), list(range(64))
    b.node.pull_prefix(
        transfer_id, a.address, "a", 1, 16, [5, 6, 7], ids, "lora", "salt", "00-trace", "req", "5e"
    )
    wanted = a.expect(_router.PrefixWanted)
    assert wanted.adapter_digest == "5e"
    assert (wanted.adapter, wanted.cache_salt, wanted.token_ids) == ("lora", "salt", ids)
    assert (wanted.from_token, wanted.traceparent, wanted.request_id) == (16, "00-trace", "req")
    a.node.offer_prefix(transfer_id, 48, [0, 1, 2])
    assert b.expect(_router.PrefixFound).tokens == 48
    assert b.expect(_router.Committed).kv_tokens == 48
    assert (b.content[[5, 6]] == a.content[[1, 2]]).all()
    a.expect(_router.SenderReleased)
    # And one who has nothing.
    transfer_id = os.urandom(16)
    b.node.pull_prefix(transfer_id, a.address, "a", 1, 0, [5], ids)
    a.expect(_router.PrefixWanted)
    a.node.offer_prefix(transfer_id, 0, [])
    assert b.expect(_router.ReceiveFailed).reason == "unknown"
    assert a.idle()
    assert b.idle()


def test_the_lease_ends_without_a_word_and_lives_by_heartbeats(nodes):
    a, b = nodes("a", lease_s=2.0), nodes("b", lease_s=2.0)
    kept, left = os.urandom(16), os.urandom(16)
    b.pull(kept, a, 0, [0])
    a.until("awaited")
    a.node.offer(kept, 3)
    a.node.offer(left, 3)
    a.expect(_router.Pulled)
    aborted = a.expect(_router.SenderAborted)
    assert (aborted.transfer_id, aborted.reason) == (left, "lease_expired")
    # The pulled one outlives two leases of an offer that nobody pulls.
    for _ in range(2):
        left = os.urandom(16)
        a.node.offer(left, 3)
        assert a.expect(_router.SenderAborted).transfer_id == left
    a.node.ready(kept, 0, [0])
    a.node.commit(kept, 16)
    assert b.expect(_router.Committed).transfer_id == kept


def test_wrong_calls_are_refused_by_name(nodes):
    a, b = nodes("a"), nodes("b")
    transfer_id = os.urandom(16)
    with pytest.raises(ValueError, match="16 bytes"):
        a.node.offer(b"short")
    with pytest.raises(_router.TransferError, match="no such transfer"):
        a.node.ready(transfer_id, 0, [0])
    a.node.offer(transfer_id)
    with pytest.raises(_router.TransferError, match="offered already"):
        a.node.offer(transfer_id)
    with pytest.raises(_router.TransferError, match="slot 99"):
        a.node.ready(transfer_id, 0, [99])
    a.node.ready(transfer_id, 0, [0])
    with pytest.raises(_router.TransferError, match="announced after"):
        a.node.ready(transfer_id, 2, [0])
    with pytest.raises(_router.TransferError, match="partial"):
        a.node.commit(transfer_id, 17)
    a.node.commit(transfer_id, 16)
    with pytest.raises(_router.TransferError, match="committed"):
        a.node.ready(transfer_id, 1, [1])
    with pytest.raises(_router.TransferError, match="inside a block"):
        b.node.pull(os.urandom(16), a.address, "a", 1, 5, [0])
    with pytest.raises(_router.TransferError, match="slot 99"):
        b.node.pull(os.urandom(16), a.address, "a", 1, 0, [99])
    assert not a.node.abort(os.urandom(16))


def test_garbage_on_the_port_changes_nothing(nodes):
    a, b = nodes("a", connect_timeout_s=2.0), nodes("b")
    host, port = a.address.rsplit(":", 1)
    rng = np.random.default_rng(5)
    for data in [
        b"",
        b"\xff" * 64,
        b"\x04\x00\x00\x00junk",
        rng.bytes(100_000),
        b"GET / HTTP/1.1\r\n\r\n",
    ]:
        with socket.create_connection((host, int(port))) as stream:
            try:
                stream.sendall(data)
                stream.shutdown(socket.SHUT_WR)
                while stream.recv(4096):
                    pass
            except OSError:
                pass
    # One who says nothing is cut off.
    with socket.create_connection((host, int(port))) as stream:
        assert stream.recv(1) == b""
    assert hand_off(a, b, [0], [0], tokens=16).kv_tokens == 16


def test_a_silent_peer_is_cut_off_however_often_signals_come(nodes):
    a = nodes("a", connect_timeout_s=1.0)
    host, port = a.address.rsplit(":", 1)
    tgkill = ctypes.CDLL(None, use_errno=True).tgkill
    # Stays: one that came late would find no handler.
    signal.signal(signal.SIGURG, lambda *_: None)
    with socket.create_connection((host, int(port))) as stream:
        # Each thread of the node is woken many times a second.
        for _ in range(1_000):
            if select.select([stream], [], [], 0.02)[0]:
                break
            for thread in map(int, os.listdir("/proc/self/task")):
                if thread != os.getpid():
                    tgkill(os.getpid(), thread, signal.SIGURG)
        else:
            raise AssertionError("it is waited for still")
        assert stream.recv(1) == b""


def test_wait_ends_by_wake_from_another_thread(nodes):
    a = nodes("a")
    assert not a.node.wait(0.0)
    waker = threading.Thread(target=a.node.wake)
    waker.start()
    assert a.node.wait(20.0)
    waker.join()
    a.node.wake()
    a.node.wake()
    assert a.node.wait(0.0)
    assert not a.node.wait(0.0)


def test_views_outlive_the_pool_and_the_node(nodes):
    a, b = nodes("a"), nodes("b")
    a.fill(3)
    hand_off(a, b, [2], [1], tokens=16)
    view = b.content
    expected = a.content[2].copy()
    b.node.close()
    b.pool.close()
    pool_of_b = b.pool
    with pytest.raises(BufferError):
        memoryview(pool_of_b)
    del pool_of_b, b.pool
    assert (view[1] == expected).all()
