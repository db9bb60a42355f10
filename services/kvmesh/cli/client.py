"""What the commands that ask a mesh share: connecting, printing, failing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kvmesh.cli.settings import Setting, UsageError, merged

if TYPE_CHECKING:
    import kvmesh

DEFAULT_ENDPOINT = "127.0.0.1:7440"

CONNECTION = (
    Setting("endpoint", "router to ask, host:port", default=DEFAULT_ENDPOINT),
    Setting("token", "API key or JWT"),
    Setting("tls", "connect with TLS, trusting the system's roots", is_switch=True),
    Setting("ca_file", "connect with TLS, trusting the roots in this PEM file", metavar="FILE"),
    Setting("timeout_s", "give up after this many seconds"),
)

SAMPLING = (
    Setting("model", "model to ask, where the mesh serves several"),
    Setting("max_tokens", "most tokens to make", metavar="N"),
    Setting("temperature", "0: always the most likely token", metavar="T"),
    Setting("top_k", "keep the K most likely tokens; 0: all", metavar="K"),
    Setting("top_p", "keep the most likely tokens up to this probability", metavar="P"),
    Setting("min_p", "drop tokens below this share of the most likely one", metavar="P"),
    Setting("seed", "equal seeds give equal output", metavar="N"),
)

_NUMBERS: Mapping[str, type[int] | type[float]] = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "seed": int,
    "timeout_s": float,
}


def client_settings(args: argparse.Namespace, settings: Iterable[Setting]) -> dict[str, Any]:
    """The settings of section [client], numbers as numbers."""
    values = merged("client", settings, args)
    for name, kind in _NUMBERS.items():
        if name in values:
            try:
                values[name] = kind(values[name])
            except (TypeError, ValueError) as error:
                allowed = "a whole number" if kind is int else "a number"
                raise UsageError(f"{name} is {values[name]!r}; allowed is {allowed}") from error
    return values


def connect(values: Mapping[str, Any]) -> kvmesh.Client:
    """A client for what the settings say."""
    import grpc

    import kvmesh

    credentials: grpc.ChannelCredentials | bool | None = None
    if values.get("ca_file"):
        try:
            with open(values["ca_file"], "rb") as file:
                credentials = grpc.ssl_channel_credentials(file.read())
        except OSError as error:
            text = f"ca_file is {values['ca_file']!r}, which cannot be read: {error.strerror}"
            raise UsageError(text) from error
    elif values.get("tls"):
        credentials = True
    endpoint = values.get("endpoint") or DEFAULT_ENDPOINT
    return kvmesh.Client(endpoint, credentials=credentials, token=values.get("token"))


def sampling_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` among the settings."""
    names = [setting.name for setting in SAMPLING]
    return {name: values[name] for name in names if name in values}


def print_stream(events: Iterable[kvmesh.Event]) -> tuple[str, kvmesh.Finished | None, float]:
    """Prints text as it comes; the text, the end and seconds between first and last token."""
    import time

    import kvmesh

    text: list[str] = []
    finished = None
    first = last = None
    for event in events:
        if isinstance(event, kvmesh.Tokens):
            last = time.monotonic()
            first = first or last
            piece = event.text
        elif isinstance(event, kvmesh.Finished):
            finished, piece = event, event.text
        else:
            continue
        text.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    print(flush=True)
    return "".join(text), finished, (last - first) if first and last else 0.0


def timings_line(finished: kvmesh.Finished) -> str:
    """Where the time went, on one line."""
    t, u = finished.timings, finished.usage
    later = max(u.output_tokens - 1, 0)
    rate = f"{later / t.decode_ms * 1000:.1f}" if t.decode_ms > 0 and later else "-"
    return (
        f"queue {t.queue_ms:.1f} ms · prefill {t.prefill_ms:.0f} ms · "
        f"transfer {t.transfer_ms:.1f} ms · first token {t.first_token_ms:.0f} ms · "
        f"{rate} tokens/s · {u.cached_tokens} of {u.prompt_tokens} prompt tokens cached"
    )


def explain(error: Exception, endpoint: str) -> str:
    """A failed call, for people, with what to do."""
    import grpc

    code = getattr(error, "code", None)
    if code == grpc.StatusCode.UNAVAILABLE and not getattr(error, "reason", ""):
        return f"no router answers at {endpoint} ({error}); start one with `kvmesh up`"
    return str(error)
