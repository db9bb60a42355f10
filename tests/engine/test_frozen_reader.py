"""A decode worker that is stopped past the lease, and thawed when others have its blocks."""

import asyncio
import json
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from engine_harness import VOCABULARY, mesh_from, prompt, running, sim, until

from kvmesh.engine.contract import AttemptId, Stage
from kvmesh.engine.sim.content import reference_tokens

SCRIPT = Path(__file__).with_name("decode_process.py")
LEASE_S = 2.0


class Decoder:
    """The other process."""

    def __init__(self, process) -> None:
        self._process = process

    def signal(self, number) -> None:
        self._process.send_signal(number)

    async def stopped(self) -> None:
        """Until every thread of it stands still, as /proc tells."""
        await until(lambda: stands_still(self._process.pid))

    def place(self, ids, number, hand_off=None, max_tokens=16) -> None:
        asked = {"prompt": ids, "id": number.to_bytes(16, "big").hex(), "max_tokens": max_tokens}
        if hand_off is not None:
            asked["hand_off"] = hand_off.SerializeToString().hex()
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")

    async def said(self) -> tuple[str, list[int]]:
        async with asyncio.timeout(60):
            word, tokens = json.loads(await self._process.stdout.readline())
        return word, tokens


@asynccontextmanager
async def decoder(lease_s=LEASE_S):
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), str(lease_s),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        other = Decoder(process)
        assert await other.said() == ("ready", [])
        yield other
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("shared_memory", [True, False])
async def test_blocks_used_anew_under_a_frozen_reader_never_reach_its_tokens(shared_memory) -> None:
    node = {"lease_s": LEASE_S, "shared_memory": shared_memory, "offer_timeout_s": 60.0}
    # Room for one prompt: who comes next gets the blocks that were offered.
    sender = sim(
        blocks=24, transfer=True, worker_id="p", incarnation=11, node=node,
        profile="step-10ms", speed=1.0,
    )  # fmt: skip
    async with running(sender) as p, decoder() as d:
        ids, hand_off = prompt(320), mesh_from(sender, "p", 11)
        d.place(ids, 1, hand_off)
        assert (await d.said())[0] == "reserved"
        await asked_for(sender)
        # Now it stands still.
        d.signal(signal.SIGSTOP)
        await d.stopped()
        prefill = p.place(
            ids, Stage.PREFILL, id=AttemptId((1).to_bytes(16, "big"), 1, 1), hand_off=hand_off
        )
        assert await prefill.ended() in ("handed_off", "transfer_failed")
        # Its lease ends, and other prompts get every block of the pool.
        await p.idle()
        for seed in (1, 2):
            other = p.place(prompt(350, seed), max_tokens=30)
            assert await other.ended() == "finished"
            assert other.tokens == reference_tokens(prompt(350, seed), 30, VOCABULARY)
        await p.idle()
        d.signal(signal.SIGCONT)
        end, tokens = await d.said()
        assert end in ("transfer_failed", "finished")
        assert tokens == reference_tokens(ids, 16, VOCABULARY)[: len(tokens)]
        # Both serve on: what is left of the old prefix is right, or computed anew.
        d.place(ids, 2)
        assert await d.said() == ("reserved", [])
        assert await d.said() == ("finished", reference_tokens(ids, 16, VOCABULARY))


async def test_a_killed_reader_gives_the_senders_blocks_back_at_once() -> None:
    node = {"lease_s": 600.0, "offer_timeout_s": 60.0}
    sender = sim(
        blocks=24, transfer=True, worker_id="p", incarnation=11, node=node,
        profile="step-10ms", speed=0.05,
    )  # fmt: skip
    async with running(sender) as p, decoder(600.0) as d:
        ids, hand_off = prompt(320), mesh_from(sender, "p", 11)
        d.place(ids, 1, hand_off)
        assert (await d.said())[0] == "reserved"
        await asked_for(sender)
        prefill = p.place(
            ids, Stage.PREFILL, id=AttemptId((1).to_bytes(16, "big"), 1, 1), hand_off=hand_off
        )
        await prefill.opened()
        d.signal(signal.SIGKILL)
        assert await prefill.ended() in ("transfer_failed", "handed_off")
        await p.idle()
        other = p.place(prompt(350, 1), max_tokens=3)
        assert await other.ended() == "finished"
        assert other.tokens == reference_tokens(prompt(350, 1), 3, VOCABULARY)


async def asked_for(sender) -> None:
    """Until the reader's pull has come."""
    await until(lambda: sender._node.residue()["awaited"])


def stands_still(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)
