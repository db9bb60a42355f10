"""`kvmesh models`: get models, and see which are here."""

from __future__ import annotations

import argparse
import sys
import time

from kvmesh.cli.errors import CommandError

_EXAMPLES = """\
examples:
  kvmesh models pull smollm2-135m
  kvmesh models pull ./my-llama
  kvmesh models pull HuggingFaceTB/SmolLM2-360M-Instruct
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "models",
        help="get models and list them",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    pull = actions.add_parser("pull", help="get a model into the cache (~/.cache/kvmesh)")
    pull.add_argument("name", help="a known name, a folder, or a Hugging Face id")
    pull.set_defaults(run=run_pull)
    listing = actions.add_parser("list", help="list the cached models")
    listing.set_defaults(run=run_list)


def run_pull(options: argparse.Namespace) -> int:
    """Gets a model."""
    from kvmesh.models import ModelError, pull

    progress = ProgressLine()
    try:
        path = pull(options.name, progress)
    except ModelError as error:
        raise CommandError(str(error)) from error
    except ModuleNotFoundError as error:
        raise CommandError(
            f"converting a model needs the package {error.name}: pip install 'kvmesh[torch]'"
        ) from error
    finally:
        progress.finish()
    print(path)
    return 0


def run_list(_options: argparse.Namespace) -> int:
    """Lists cached models."""
    from kvmesh.models import cache_folder, list_cached

    cached = list_cached()
    for model in cached:
        print(f"{model.name}  {model.size / 1e6:.0f} MB  {model.source}  {model.path}")
    if not cached:
        print(f"no models in {cache_folder()}: kvmesh models pull smollm2-135m", file=sys.stderr)
    return 0


class ProgressLine:
    """Progress as one line on standard error: redrawn on a terminal, else a
    line at the start and the end of each step."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._step = ""
        self._drawn_at = 0.0
        self._open = False

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """See kvmesh.models.Progress."""
        now = time.monotonic()
        finished = total is not None and done >= total
        changed = step != self._step
        if changed:
            self.finish()
            self._step = step
        if not changed and not finished and (not self._terminal or now - self._drawn_at < 0.1):
            return
        self._drawn_at = now
        size = f"{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else "")
        text = f"{step}: {size}" if done or total else step
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
            self._open = True
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def finish(self) -> None:
        """Ends the line that is being redrawn."""
        if self._open:
            sys.stderr.write("\n")
            self._open = False
