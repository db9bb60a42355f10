"""The command line: `kvmesh COMMAND`.

Only the standard library is imported here; each command imports what it needs
when it runs, so that a client needs no engine and `--help` is quick.
"""

from kvmesh.cli.commands import main

__all__ = ["main"]
