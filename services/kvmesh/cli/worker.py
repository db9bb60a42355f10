"""`kvmesh worker`: one engine behind the Worker service."""

from __future__ import annotations

import argparse
import dataclasses
import logging

from kvmesh.cli.errors import CommandError
from kvmesh.cli.layers import add_config_flag, add_setting_flags, merge
from kvmesh.cli.ready import announcer
from kvmesh.worker.settings import SettingError, WorkerSettings

_PREFIX = "KVMESH_WORKER_"
_EXAMPLES = """\
examples:
  kvmesh worker --role prefill --etcd 127.0.0.1:2379
  kvmesh worker --role decode --engine sim --etcd 127.0.0.1:2379 --listen 127.0.0.1:9001
  kvmesh worker --role both --model ./my-llama --threads 8
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "worker",
        help="run a worker: an engine that prefills, decodes or both",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_flag(parser)
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning"))
    add_setting_flags(parser, WorkerSettings, _PREFIX)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs a worker until it is told to stop."""
    names = [field.name for field in dataclasses.fields(WorkerSettings)]
    try:
        settings = WorkerSettings.from_mapping(merge("worker", _PREFIX, names, options))
    except SettingError as error:
        raise CommandError(str(error), status=2) from error
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    try:
        from kvmesh.worker.serve import main as serve
    except ModuleNotFoundError as error:
        raise CommandError(
            f"a worker needs the package {error.name}: pip install 'kvmesh[{settings.engine}]'"
        ) from error
    try:
        return serve(settings, announcer())
    except SettingError as error:
        raise CommandError(str(error), status=2) from error
