"""What engines do with KV of workers that they have no TLS in common with."""

import pytest
from authority import Authority
from engine_harness import VOCABULARY, mesh_from, prompt, running, sim

from kvmesh._router import PeerTls
from kvmesh.engine.contract import Stage
from kvmesh.engine.sim.content import reference_tokens
from kvmesh.v1 import worker_pb2 as wire


@pytest.mark.parametrize("with_tls", ["p", "d"])
async def test_a_hand_off_fails_with_a_reason_and_a_prefix_is_computed(tmp_path, with_tls) -> None:
    authority = Authority(tmp_path)
    issued = authority.issue(with_tls, f"URI:kvmesh://default/worker/{with_tls}")
    files = map(str, (issued.certificate, issued.key, authority.ca))
    tls = {with_tls: PeerTls(*files, "default", with_tls)}
    engines = [
        sim(transfer=True, worker_id=name, incarnation=1, node={"tls": tls.get(name)})
        for name in ("p", "d")
    ]
    async with running(engines[0]) as p, running(engines[1]) as d:
        ids = prompt(320)
        decode = d.place(ids, Stage.DECODE, hand_off=mesh_from(p.engine, "p"))
        assert await decode.ended() == "transfer_failed"
        said = decode.end.transfer_failed.message
        assert said.startswith("untrusted: ")
        assert "set tls_cert, tls_key and tls_ca at both workers or at neither" in said
        # As an attempt does that follows: it computes here what it could not pull.
        await p.place(ids, max_tokens=1).ended()
        source = wire.PrefixSource(
            worker="p", incarnation=1, address=p.engine.transfer_address, tokens=304
        )
        attempt = d.place(ids, prefix_from=source, max_tokens=9)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == reference_tokens(ids, 9, VOCABULARY)
        await p.idle()
        await d.idle()
