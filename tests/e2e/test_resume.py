"""A client goes on with a stream that it lost, at any router, with nothing computed again."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import grpc
import pytest
from cluster import Cluster
from figures import figures, wait_figures, wait_quiet
from many_streams import Streams, prompts, undisturbed
from raw_http2 import RawHttp2, message

import kvmesh
from kvmesh.cli import main
from kvmesh.client.errors import error_from_rpc
from kvmesh.v1 import inference_pb2 as wire
from kvmesh.v1 import inference_pb2_grpc as rpc

BY_ATTEMPT = "attempt_tokens=true"
FIRST_ATTEMPT = 1 << 32 | 1
COUNT = 8


def start(
    fresh: Cluster,
    *decode: str,
    engine: str = "",
    router: Sequence[str] = (),
    worker: Sequence[str] = (),
) -> Cluster:
    """Two routers, a prefill worker, and these decode workers."""
    arguments = (*fresh.steps(*filter(None, [engine])), *worker)
    endpoints = [fresh.start_router(*router) for _ in range(2)]
    fresh.start_worker("p", "prefill", *arguments)
    for name in decode:
        fresh.start_worker(name, "decode", *arguments)
    for endpoint in endpoints:
        fresh.wait_live(endpoint, "p", *decode)
    return fresh


def stub(cluster: Cluster, router: int) -> rpc.InferenceStub:
    return rpc.InferenceStub(cluster.channel(cluster.endpoints[router]))


def request(prompt: Sequence[int], tokens: int, *, resumable: bool = True) -> wire.GenerateRequest:
    return wire.GenerateRequest(
        token_ids=wire.TokenIds(ids=prompt),
        stopping=wire.Stopping(max_tokens=tokens, ignore_end_of_text=True),
        hints=wire.Hints(resumable=resumable),
    )


class Read:
    """What a call brought: each index once, in order."""

    def __init__(self, call, first: int = 0) -> None:
        self.call, self.first = call, first
        self.accepted: wire.Accepted | None = None
        self.finished: wire.Finished | None = None
        self.ids: list[int] = []
        self.texts: list[tuple[int, str]] = []
        self.error: kvmesh.MeshError | None = None

    def until(self, tokens: int | None = None) -> Read:
        """Reads until it has so many tokens, or to its end."""
        try:
            while tokens is None or len(self.ids) < tokens:
                event = next(self.call, None)
                if event is None:
                    break
                if event.HasField("accepted"):
                    self.accepted = event.accepted
                elif event.HasField("tokens"):
                    assert event.tokens.first_index == self.first + len(self.ids)
                    self.ids.extend(event.tokens.ids)
                    self.texts.append((self.first + len(self.ids), event.tokens.text))
                elif event.HasField("finished"):
                    self.finished = event.finished
        except grpc.RpcError as error:
            self.error = error_from_rpc(error)
        return self

    @property
    def text(self) -> str:
        last = self.finished.text if self.finished else ""
        return "".join(text for _, text in self.texts) + last


def resume(
    at: rpc.InferenceStub, generation: str, had: Sequence[int], *, told: bool = True, **how
) -> Read:
    ids = had if told else ()
    asked = wire.ResumeRequest(generation_id=generation, next_index=len(had), token_ids=ids)
    return Read(at.Resume(asked, timeout=60, **how), len(had))


def resumed(endpoint: str) -> dict[str, float]:
    of = figures(endpoint)
    return {
        outcome: count
        for outcome in ("here", "running", "anew", "unknown")
        if (count := of.total("resumed_total", outcome=outcome))
    }


def busy(cluster: Cluster) -> str:
    """The router that has the streams."""
    return next(e for e in cluster.endpoints if figures(e)["open_streams"])


def test_a_killed_router_costs_no_token_twice(fresh) -> None:
    # Tokens depend on the attempt: one of another attempt would show.
    two = start(fresh, "d", engine=BY_ATTEMPT)
    two.slow_down()
    streams = Streams("ipv4:" + ",".join(two.endpoints), prompts(COUNT), 250)
    streams.wait(20)
    two.kill_router(busy(two))
    two.speed_up()
    outputs = streams.join()
    assert outputs == [undisturbed(p, 250, FIRST_ATTEMPT) for p in streams.asked]
    assert streams.attempts() == [1] * COUNT
    (left,) = two.endpoints
    assert resumed(left) == {"running": COUNT}
    assert figures(left)["finished_total"] == COUNT
    assert figures(left).get("recomputed_tokens_total", 0) == 0
    wait_quiet(two, left, "p", "d")


def test_a_router_that_stops_leaves_its_streams_to_others(fresh) -> None:
    two = start(fresh, "d", engine=BY_ATTEMPT, router=("--grace", "0s"))
    two.slow_down()
    streams = Streams("ipv4:" + ",".join(two.endpoints), prompts(COUNT), 400)
    streams.wait(20)
    used = busy(two)
    two.endpoints.remove(used)
    two.children.stop(two.routers.pop(used), 60)
    two.speed_up()
    assert streams.join() == [undisturbed(p, 400, FIRST_ATTEMPT) for p in streams.asked]
    assert streams.attempts() == [1] * COUNT
    (left,) = two.endpoints
    assert resumed(left) == {"running": COUNT}


def test_a_resumed_stream_moves_on_as_any_other(fresh) -> None:
    two = start(fresh, "d", "d2")
    two.slow_down()
    streams = Streams("ipv4:" + ",".join(two.endpoints), prompts(COUNT), 300)
    streams.wait(20)
    two.kill_router(busy(two))
    (left,) = two.endpoints
    wait_figures(two, left, {"resumed_total": COUNT})
    # One is killed, one drained: the attempts go up from those that were found.
    two.kill("d")
    two.start_worker("d3", "decode", *two.steps())
    two.wait_live(left, "d3")
    two.stop("d2")
    two.speed_up()
    streams.assert_undisturbed()
    assert max(streams.attempts()) >= 2
    wait_quiet(two, left, "p", "d3")


def test_a_client_that_moves_takes_its_stream_along(fresh) -> None:
    two = start(fresh, "d", engine=BY_ATTEMPT)
    (prompt,) = prompts(1)
    whole = undisturbed(prompt, 400, FIRST_ATTEMPT)
    two.slow_down()
    old = Read(stub(two, 0).Generate(request(prompt, 400), timeout=60)).until(20)
    had = list(old.ids)
    new = resume(stub(two, 1), old.accepted.generation_id, had).until(20)
    old.until()
    two.speed_up()
    # What the worker made from then on went to one of the two alone.
    assert old.error is not None
    assert (old.error.code, old.error.reason) == (grpc.StatusCode.ABORTED, "TAKEN_OVER")
    assert old.error.next_index == len(old.ids) < 400
    assert old.ids == whole[: len(old.ids)]
    assert had + new.until().ids == whole
    assert new.accepted == old.accepted
    assert new.finished.usage.attempts == 1
    assert new.finished.usage.output_tokens == 400
    assert resumed(two.endpoints[1]) == {"running": 1}
    for endpoint in two.endpoints:
        wait_quiet(two, endpoint, "p", "d")


def test_the_same_router_gives_it_to_whoever_asks_last(fresh) -> None:
    two = start(fresh, "d")
    (prompt,) = prompts(1)
    two.slow_down()
    old = Read(stub(two, 0).Generate(request(prompt, 300), timeout=60)).until(10)
    had = list(old.ids)
    new = resume(stub(two, 0), old.accepted.generation_id, had).until(1)
    two.speed_up()
    new.until()
    assert had + new.ids == undisturbed(prompt, 300)
    old.until()
    assert (old.error.code, old.error.reason) == (grpc.StatusCode.ABORTED, "TAKEN_OVER")
    assert resumed(two.endpoints[0]) == {"here": 1}
    wait_quiet(two, two.endpoints[0], "p", "d")


def test_text_is_the_same_at_every_split(fresh) -> None:
    kept = ("--orphan-ttl", "10m")
    two = start(fresh, "d", router=kept, worker=kept)
    (prompt,) = prompts(1, seed=5)
    asked = request(prompt, 48)
    # Held back at its beginnings, and never whole.
    asked.stopping.stop.extend(["\u20ac never", "aa never"])
    whole = Read(stub(two, 0).Generate(asked, timeout=60)).until()
    said = {0: ""}
    for index, text in whole.texts:
        said[index] = list(said.values())[-1] + text
    generation = whole.accepted.generation_id
    for split in range(49):
        had = whole.ids[:split]
        again = resume(stub(two, split % 2), generation, had, told=split % 3 > 0).until()
        assert again.error is None, f"from {split}: {again.error}"
        assert had + again.ids == whole.ids
        assert whole.text.endswith(again.text)
        if split in said:
            assert said[split] + again.text == whole.text, f"from {split}"
    assert len(said) > 24


def test_a_lost_connection_ends_no_resumable_stream(fresh) -> None:
    two = start(fresh, "d")
    endpoint = two.endpoints[0]
    (prompt,) = prompts(1)
    whole = undisturbed(prompt, 200)
    for router, outcome in ((0, "here"), (1, "running")):
        with RawHttp2(endpoint) as raw:
            events = raw.events(raw.call(message(request(prompt, 200))))
            generation = next(events).accepted.generation_id
            had: list[int] = []
            while len(had) < 10:
                had.extend(next(events).tokens.ids)
            raw.vanish()
        again = resume(stub(two, router), generation, had).until()
        assert had + again.ids == whole
        assert resumed(two.endpoints[router])[outcome] == 1
        for each in two.endpoints:
            wait_quiet(two, each, "p", "d")


def test_a_stream_without_its_connection_makes_room_for_the_call_that_resumes_it(fresh) -> None:
    # It counts for as long as it is kept, which is longer than this takes.
    limits = ("--tenant-concurrency", "1", "--orphan-ttl", "10m")
    two = start(fresh, "d", router=limits)
    endpoint = two.endpoints[0]
    first, other = prompts(2)
    two.slow_down()
    with RawHttp2(endpoint) as raw:
        events = raw.events(raw.call(message(request(first, 300))))
        generation = next(events).accepted.generation_id
        had: list[int] = []
        while len(had) < 10:
            had.extend(next(events).tokens.ids)
        raw.vanish()
    # The tenant has what it may have, and an id that is nobody's makes no room.
    refused = [
        Read(stub(two, 0).Generate(request(other, 3), timeout=60)).until(),
        resume(stub(two, 0), "0" * 32, []).until(),
    ]
    for read in refused:
        assert read.error is not None
        assert read.error.reason == "TENANT_LIMIT"
    again = resume(stub(two, 0), generation, had).until(1)
    two.speed_up()
    assert had + again.until().ids == undisturbed(first, 300)
    assert resumed(endpoint) == {"here": 1}
    # And that gives its place back.
    while Read(stub(two, 0).Generate(request(other, 3), timeout=60)).until().error is not None:
        two.children.wait(0.02)
    wait_quiet(two, endpoint, "p", "d")


@pytest.mark.parametrize("how", ["reset", "reset and gone", "not resumable"])
def test_what_its_client_leaves_for_good_ends_at_once(fresh, how) -> None:
    # Nobody would see the end of that.
    two = start(fresh, "d", router=("--orphan-ttl", "10m"))
    endpoint = two.endpoints[0]
    (prompt,) = prompts(1)
    asked = request(prompt, 20_000, resumable=how != "not resumable")
    with RawHttp2(endpoint) as raw:
        stream = raw.call(message(asked))
        events = raw.events(stream)
        generation = next(events).accepted.generation_id
        next(events)
        if how != "not resumable":
            raw.reset(stream)
        if how == "reset and gone":
            # One read may bring both.
            raw.socket.shutdown(socket.SHUT_WR)
        elif how == "not resumable":
            raw.vanish()
        wait_figures(two, endpoint, {"cancelled_total": 1})
        wait_quiet(two, endpoint, "p", "d")
    for router in (0, 1):
        gone = resume(stub(two, router), generation, []).until()
        assert gone.error.code is grpc.StatusCode.NOT_FOUND


def test_nobody_has_what_is_not_theirs(fresh, tmp_path, capsys) -> None:
    keys, lines = {}, ""
    for tenant in ("shop", "rival"):
        assert main(["key", tenant]) == 0
        made = capsys.readouterr()
        keys[tenant] = (("authorization", f"Bearer {made.err.split()[-1]}"),)
        lines += made.out
    file = tmp_path / "keys.toml"
    file.write_text(lines)
    endpoints = [fresh.start_router("--api-keys", str(file)) for _ in range(2)]
    fresh.start_worker("w", "both", "--orphan-ttl", "500ms", *fresh.steps())
    for endpoint in endpoints:
        models = rpc.InferenceStub(fresh.channel(endpoint))
        asked = wire.ListModelsRequest()
        while not any(m.ready for m in models.ListModels(asked, metadata=keys["shop"]).models):
            fresh.children.wait(0.02)

    (prompt,) = prompts(1)
    fresh.slow_down()
    call = stub(fresh, 0).Generate(request(prompt, 500), timeout=60, metadata=keys["shop"])
    own = Read(call).until(5)
    generation = own.accepted.generation_id

    def refused(router: int, generation: str, had: Sequence[int], who: str):
        read = resume(stub(fresh, router), generation, had, metadata=keys[who]).until()
        assert read.accepted is None
        return read.error.code, read.error.message, read.error.reason, read.error.metadata

    unknown = refused(1, "0" * 32, [], "shop")
    assert unknown[0] is grpc.StatusCode.NOT_FOUND
    for router in (0, 1):
        assert refused(router, generation, [], "rival") == unknown
        # Nor what is not there yet, or was never said.
        assert refused(router, generation, own.ids * 200, "shop") == unknown
        assert refused(router, "no id", [], "shop") == unknown
    # Without a key nothing is looked for.
    assert resume(stub(fresh, 1), generation, []).until().error.code is (
        grpc.StatusCode.UNAUTHENTICATED
    )
    # None of that has disturbed it.
    own.until(len(own.ids) + 5)
    assert own.error is None
    again = resume(stub(fresh, 1), generation, own.ids, metadata=keys["shop"]).until(1)
    fresh.speed_up()
    assert own.ids + again.until().ids == undisturbed(prompt, 500)
    # When its time is over it is as if it had never been.
    while (gone := resume(stub(fresh, 0), generation, [], metadata=keys["shop"])).until().ids:
        fresh.children.wait(0.1)
    assert gone.error.code is grpc.StatusCode.NOT_FOUND
    assert gone.error.message == unknown[1]


def test_another_output_than_the_clients_is_not_gone_on_with(fresh) -> None:
    two = start(fresh, "d")
    (prompt,) = prompts(1)
    old = Read(stub(two, 0).Generate(request(prompt, 300), timeout=60)).until(5)
    other = [*old.ids[:4], old.ids[4] + 1]
    wrong = resume(stub(two, 1), old.accepted.generation_id, other).until()
    assert wrong.error.code is grpc.StatusCode.NOT_FOUND
    # Whoever has it keeps it.
    old.until()
    assert old.error is None
    assert old.ids == undisturbed(prompt, 300)
    uneven = wire.ResumeRequest(generation_id="0" * 32, next_index=2, token_ids=[1])
    with pytest.raises(grpc.RpcError) as invalid:
        list(stub(two, 1).Resume(uneven, timeout=60))
    (violation,) = error_from_rpc(invalid.value).violations
    assert violation.field == "token_ids"


def test_a_client_that_moves_during_its_prompt_gets_all_of_it(fresh) -> None:
    two = start(fresh, "d", engine="speed=0.2")
    (prompt,) = prompts(1, tokens=2_000)
    old = Read(stub(two, 0).Generate(request(prompt, 30), timeout=60))
    old.accepted = next(old.call).accepted
    new = resume(stub(two, 1), old.accepted.generation_id, []).until()
    old.until()
    assert new.error is None
    assert new.ids == undisturbed(prompt, 30)
    for endpoint in two.endpoints:
        wait_quiet(two, endpoint, "p", "d")
