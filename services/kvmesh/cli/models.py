"""`kvmesh models`."""

from __future__ import annotations

import argparse
import sys
import time

from kvmesh.cli.client import CONNECTION, DEFAULT_ENDPOINT, client_settings, connect, explain
from kvmesh.cli.settings import UsageError, add_settings

_EPILOG = """\
examples:
  kvmesh models                         what the mesh at --endpoint serves
  kvmesh models pull smollm2-135m       a small chat model, 270 MB to 540 MB
  kvmesh models pull ./my-model         check a folder in Hugging Face form
  kvmesh models pull owner/model        from the Hugging Face hub
  kvmesh models cached                  what is in ~/.cache/kvmesh (KVMESH_CACHE)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which model."""
    parser.epilog = _EPILOG
    actions = ("served", "cached", "pull")
    parser.add_argument("action", nargs="?", choices=actions, default="served")
    parser.add_argument("name", nargs="?", help="with pull: a name, a folder or a hub id")
    add_settings(parser, CONNECTION)


def run(args: argparse.Namespace) -> int:
    """Lists or pulls."""
    if (args.action == "pull") != (args.name is not None):
        raise UsageError("pull needs the name of a model; nothing else takes one")
    if args.action == "served":
        return _served(args)
    try:
        import kvmesh.models
    except ModuleNotFoundError as error:
        text = f"models need the package {error.name}: pip install 'kvmesh[torch]'"
        raise UsageError(text) from error
    if args.action == "cached":
        for model in kvmesh.models.list_cached():
            print(f"{model.name}  {model.size / 1e6:.0f} MB  {model.source}  {model.path}")
        return 0
    try:
        print(kvmesh.models.pull(args.name, ProgressLine()))
    except kvmesh.models.ModelError as error:
        print(f"kvmesh models: {error}", file=sys.stderr)
        return 1
    return 0


def _served(args: argparse.Namespace) -> int:
    import kvmesh

    values = client_settings(args, CONNECTION)
    with connect(values) as client:
        try:
            models = client.models(timeout=values.get("timeout_s", 10.0))
        except kvmesh.MeshError as error:
            endpoint = values.get("endpoint") or DEFAULT_ENDPOINT
            print(f"kvmesh models: {explain(error, endpoint)}", file=sys.stderr)
            return 1
    for model in models:
        state = "ready" if model.ready else "not ready"
        print(f"{model.name}  {state}  context {model.context_length} tokens")
    return 0


class ProgressLine:
    """Shows progress on standard error: one line that grows, or a line a step."""

    def __init__(self) -> None:
        self._interactive = sys.stderr.isatty()
        self._step = ""
        self._shown = 0.0

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """As kvmesh.models.Progress."""
        new, whole = step != self._step, total is not None and done >= total
        now = time.monotonic()
        if not self._interactive:
            # A log gets a line at the start of a step, then one every 10 s.
            if not new and now - self._shown < 10.0:
                return
        elif not new and not whole and now - self._shown < 0.1:
            return
        self._step, self._shown = step, now
        text = f"{step}: {done / 1e6:.0f} MB" if done or total else step
        if total:
            text = f"{step}: {done / 1e6:.0f} of {total / 1e6:.0f} MB ({100 * done / total:.0f} %)"
        if self._interactive:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if whole or total is None else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
