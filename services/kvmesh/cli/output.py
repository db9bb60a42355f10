"""How an answer looks in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from kvmesh.client.events import Event, Finished, Result, ResultBuilder, Tokens


def stream_answer(events: Iterable[Event]) -> Result:
    """Prints tokens as they come; returns the whole."""
    builder = ResultBuilder()
    for event in events:
        builder.add(event)
        if isinstance(event, Tokens | Finished) and event.text:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    return builder.result()


def timings_line(result: Result) -> str:
    """One line: queue, prefill, transfer, first token, tokens/s, cached tokens."""
    t, usage = result.timings, result.usage
    rate = (usage.output_tokens - 1) / (t.decode_ms / 1000) if t.decode_ms > 0 else 0.0
    return (
        f"queue {t.queue_ms:.0f} ms · prefill {t.prefill_ms:.0f} ms · "
        f"transfer {t.transfer_ms:.0f} ms ({t.transferred_bytes / 1e6:.1f} MB) · "
        f"first token {t.first_token_ms:.0f} ms · {rate:.1f} tokens/s · "
        f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached"
    )
