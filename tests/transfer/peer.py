"""A transfer node in a process of its own, told what to do by lines of JSON.

Started as a program by the tests: a peer that can be killed, frozen, run as
another user or in another mount namespace. Answers each line with one.
"""

import json
import os
import sys

import numpy as np

from kvmesh import _router


def filled(pool: _router.KvPool, seed: int) -> None:
    content = np.frombuffer(pool, dtype=np.uint64)
    content[:] = np.arange(content.size, dtype=np.uint64) * np.uint64(2 * seed + 1)


def main() -> None:
    settings = json.loads(sys.argv[1])
    if uid := settings.pop("uid", 0):
        # Here and not around the program: nobody else may read where it lies.
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    blocks, block_bytes = settings.pop("blocks"), settings.pop("block_bytes")
    pool = _router.KvPool(blocks, block_bytes)
    filled(pool, settings.pop("seed", 1))
    node = _router.TransferNode(pool, compatibility=b"", block_tokens=16, **settings)
    print(json.dumps({"address": node.address}), flush=True)
    verified = 0
    for line in sys.stdin:
        command = json.loads(line)
        name, arguments = command["call"], command.get("with", [])
        if name == "event":
            while not (events := node.poll()):
                node.wait(10.0)
            answer: object = [type(event).__name__ for event in events]
            for event in events:
                if isinstance(event, _router.Verified):
                    verified = event.upto_block
                elif isinstance(event, _router.ReceiveFailed):
                    verified = event.verified_blocks
        elif name == "verified":
            # Blocks of the last receive, as far as events told.
            answer = verified
        elif name == "fill":
            filled(pool, arguments[0])
            answer = None
        elif name == "sums":
            words = np.frombuffer(pool, dtype=np.uint64).reshape(blocks, -1)
            answer = [int(words[slot].sum(dtype=np.uint64)) for slot in arguments[0]]
        elif name == "raise_versions":
            pool.raise_versions(arguments[0])
            answer = None
        else:
            if arguments:
                arguments[0] = bytes.fromhex(arguments[0])
            try:
                result = getattr(node, name)(*arguments)
                answer = result if not isinstance(result, bytes) else result.hex()
            except _router.TransferError as refused:
                answer = {"refused": str(refused)}
        print(json.dumps({"answer": answer}), flush=True)


if __name__ == "__main__":
    main()
