"""`--vllm-arg KEY=VALUE`: what vLLM's engine is started with."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

OURS = {
    "model": "set model",
    "served_model_name": "set served_name",
    "kv_events_config": "kvmesh reads vLLM's cache events itself",
    "disable_log_stats": "load reports are made from vLLM's statistics",
    "enable_logging_iteration_details": "step times are learnt from these",
}
"""Arguments that kvmesh sets, and what to do instead."""

_TEXTS: Mapping[str, Any] = {"True": True, "False": False, "None": None}


class ArgumentError(ValueError):
    """An argument cannot be. The text names it and says what is allowed."""


def typed(text: str) -> Any:
    """A value as vLLM takes it: JSON where it is JSON, else the text itself."""
    if text in _TEXTS:
        return _TEXTS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse(given: Mapping[str, str], known: Collection[str]) -> dict[str, Any]:
    """Arguments by the names of vLLM's EngineArgs. Raises ArgumentError.

    Names may be written as vLLM's flags are, with dashes.
    """
    found: dict[str, Any] = {}
    for key, text in given.items():
        name = key.lstrip("-").replace("-", "_")
        if name in OURS:
            raise ArgumentError(f"vllm_arg {key} cannot be given: {OURS[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1)
            meant = f" (meant {close[0]}?)" if close else ""
            raise ArgumentError(f"vllm_arg {key} is no argument of vLLM's engine{meant}")
        found[name] = typed(text)
    if int(found.get("data_parallel_size") or 1) != 1:
        raise ArgumentError(
            f"vllm_arg data_parallel_size is {found['data_parallel_size']}; allowed is 1: "
            "start a worker for each replica, the router balances them"
        )
    return found


def kv_transfer(given: Any, *, on_cpu: bool, hands_off: bool) -> dict[str, Any] | None:
    """The connector's configuration, with what kvmesh needs filled in; None: no connector.

    Without one given, a worker that hands prompts off (role prefill or decode) gets
    NixlConnector. Raises ArgumentError.
    """
    if given is None and not hands_off:
        return None
    if given is not None and not isinstance(given, dict):
        raise ArgumentError(f"vllm_arg kv_transfer_config is {given!r}; allowed is a JSON object")
    config: dict[str, Any] = {"kv_connector": "NixlConnector"} if given is None else dict(given)
    if not config.get("kv_connector"):
        raise ArgumentError("vllm_arg kv_transfer_config lacks kv_connector")
    # Roles can be changed at run time: both directions stay open.
    config.setdefault("kv_role", "kv_both")
    # What does not come is computed here: the stream goes on.
    config.setdefault("kv_load_failure_policy", "recompute")
    if on_cpu:
        config.setdefault("kv_buffer_device", "cpu")
    return config
