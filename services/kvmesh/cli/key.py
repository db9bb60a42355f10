"""`kvmesh key`."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
import sys

from kvmesh.cli.settings import UsageError

_EPILOG = """\
Prints the lines for the file that routers read (setting api_keys), and the key to standard
error: the file holds digests only, so that the key itself is nowhere but with its owner.

  kvmesh key shop >> keys.toml

Clients send it with `kvmesh.Client(target, token=KEY)`, --token or KVMESH_TOKEN. Routers see
a changed file within seconds. A tenant may have several keys, so that one can take another's
place: add the new digest to the list that its section has.
"""

_BARE = re.compile("[A-Za-z0-9_-]+")
_LONGEST = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whose key it is."""
    parser.epilog = _EPILOG
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("tenant", nargs="?", metavar="TENANT", help="name of the tenant")
    whose.add_argument(
        "--operator",
        action="store_true",
        help="a key for the Admin service; with one in the file nobody operates without",
    )


def run(args: argparse.Namespace) -> int:
    """Makes a key."""
    section = "operators" if args.operator else f"tenants.{_toml_key(args.tenant)}"
    key = "kvmesh-" + secrets.token_urlsafe(32)
    print(f"key, shown only now: {key}", file=sys.stderr)
    print(f"[{section}]")
    print(f'keys_sha256 = ["{hashlib.sha256(key.encode()).hexdigest()}"]')
    return 0


def _toml_key(name: str) -> str:
    """A name as TOML has it; JSON's quoted strings are TOML's, too."""
    if not name or len(name.encode()) > _LONGEST or not name.isprintable():
        raise UsageError(
            f"TENANT is {name!r}; allowed are 1 to {_LONGEST} bytes of printable characters"
        )
    return name if _BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False)
