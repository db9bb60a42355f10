"""`kvmesh planner`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from kvmesh.cli.admin import call_options
from kvmesh.cli.client import CONNECTION, DEFAULT_ENDPOINT, client_settings, connect, explain
from kvmesh.cli.settings import UsageError, add_settings
from kvmesh.roles import role_name

if TYPE_CHECKING:
    from kvmesh.v1 import admin_pb2

_EPILOG = """\
Watches how long first tokens and steps are predicted to take, against what the classes
are held to, and says which worker should change its role (docs/scheduling.md, the pool
controller). It only recommends, unless --apply is given; no role is ever left empty.
Looking changes nothing: any number may watch, and a flip is recommended until somebody
does it. Apply from one place, at the router that has most of the load: each router knows
what came to itself. A line is printed when the advice changes, and for each flip.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom to ask, and whether to do what it says."""
    parser.epilog = _EPILOG
    parser.add_argument("--apply", action="store_true", help="change the roles, too")
    parser.add_argument(
        "--interval-s", type=float, default=1.0, metavar="S", help="ask this often (1)"
    )
    parser.add_argument("--once", action="store_true", help="ask once, and say what it says")
    add_settings(parser, CONNECTION)


def run(args: argparse.Namespace) -> int:
    """Asks until it is told to stop."""
    if not args.interval_s > 0:
        raise UsageError(f"--interval-s is {args.interval_s}; allowed is more than 0")
    values = client_settings(args, CONNECTION)
    with connect(values) as client:
        planner = _Planner(client.channel, values, apply=args.apply)
        try:
            while True:
                answered = planner.look()
                if args.once:
                    return 0 if answered else 1
                time.sleep(args.interval_s)
        except KeyboardInterrupt:
            return 0


class _Planner:
    """Asks a router, tells what changed, and flips roles where it may."""

    def __init__(self, channel: Any, values: dict[str, Any], *, apply: bool) -> None:
        from kvmesh.v1 import admin_pb2_grpc as rpc

        self._stub = rpc.AdminStub(channel)
        self._how = call_options(values)
        self._endpoint = values.get("endpoint") or DEFAULT_ENDPOINT
        self._apply = apply
        self._told: dict[str, str] = {}

    def look(self) -> bool:
        """One look. False: the router did not answer; the next look may find it."""
        import grpc

        from kvmesh.v1 import admin_pb2 as admin

        try:
            answer = self._stub.AdvisePools(admin.AdvisePoolsRequest(), **self._how)
        except grpc.RpcError as error:
            self._failed("", error)
            return False
        for advice in answer.models:
            if advice.HasField("flip"):
                self._flip(advice)
            else:
                self._tell(advice.model, _outlook(advice.now), f"no flip: {advice.hold}")
        return True

    def _flip(self, advice: admin_pb2.PoolAdvice) -> None:
        import grpc

        from kvmesh.v1 import admin_pb2 as admin

        flip = advice.flip
        what = f"{flip.worker_id} from {role_name(flip.from_role)} to {role_name(flip.to_role)}"
        verb = "flips" if self._apply else "recommended: flip"
        after = f"; then {_outlook(flip.after)}"
        self._tell(advice.model, _outlook(advice.now), f"{verb} {what}", after)
        if not self._apply:
            return
        request = admin.SetWorkerRoleRequest(worker_id=flip.worker_id, role=flip.to_role)
        try:
            self._stub.SetWorkerRole(request, **self._how)
        except grpc.RpcError as error:
            # The controller sees that the role did not change, and goes on.
            self._failed(advice.model, error)

    def _failed(self, model: str, error: Any) -> None:
        from kvmesh.client.errors import error_from_rpc

        what = explain(error_from_rpc(error), self._endpoint)
        self._tell(model, "", what, to=sys.stderr)

    def _tell(self, model: str, now: str, advice: str, after: str = "", to: Any = None) -> None:
        # What is expected changes at each look: only another advice is news.
        if self._told.get(model) == advice:
            return
        self._told[model] = advice
        text = f"{now}; {advice}{after}" if now else advice
        print(f"{model}: {text}" if model else f"kvmesh planner: {text}", file=to, flush=True)


def _outlook(outlook: admin_pb2.PoolOutlook) -> str:
    pools = f"{outlook.prefill} prefill, {outlook.decode} decode"
    if outlook.both:
        pools += f", {outlook.both} both"
    ttft = " / ".join(
        f"{ms:.0f}" if ms else "-"
        for ms in (outlook.interactive_ttft_ms, outlook.standard_ttft_ms, outlook.batch_ttft_ms)
    )
    return (
        f"{pools}: first token {ttft} ms, between tokens {outlook.itl_ms:.0f} ms, "
        f"pressure {outlook.prefill_pressure:.2f} and {outlook.decode_pressure:.2f}"
    )
