"""A decode engine in a process of its own, which a test can stop and thaw.

Reads placements as lines of JSON, and says what became of each as a line.
"""

import asyncio
import json
import sys

from engine_harness import running, sim

from kvmesh.engine.contract import AttemptId, Stage
from kvmesh.v1 import worker_pb2 as wire


async def main(lease_s: float) -> None:
    engine = sim(
        blocks=64, transfer=True, worker_id="d", incarnation=22, node={"lease_s": lease_s},
        profile="step-10ms",
    )  # fmt: skip
    async with running(engine) as driver:
        say("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            hand_off = asked.get("hand_off")
            attempt = driver.place(
                asked["prompt"],
                Stage.DECODE if hand_off else Stage.WHOLE,
                id=AttemptId(bytes.fromhex(asked["id"]), 1, 1),
                hand_off=wire.HandOff.FromString(bytes.fromhex(hand_off)) if hand_off else None,
                max_tokens=asked["max_tokens"],
            )
            await attempt.opened()
            say("refused" if attempt.refused else "reserved")
            end = await attempt.ended()
            await driver.idle()
            say(end, attempt.tokens)


def say(word: str, tokens: list[int] | None = None) -> None:
    print(json.dumps([word, tokens or []]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
