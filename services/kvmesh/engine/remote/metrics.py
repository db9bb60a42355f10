"""Load and pool of a server, from what it tells Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvmesh.engine.remote.server import Load

_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{([^}]*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs",
            "llamacpp:requests_processing")  # fmt: skip
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs",
            "llamacpp:requests_deferred")  # fmt: skip
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage",
          "llamacpp:kv_cache_usage_ratio")  # fmt: skip
_CONFIG = "vllm:cache_config_info"
_POOL = "sglang:max_total_num_tokens"


def _samples(text: str) -> Iterator[tuple[str, str, float]]:
    for line in text.splitlines():
        if (found := _LINE.match(line)) is not None:
            try:
                yield found[1], found[2] or "", float(found[3])
            except ValueError:
                continue


def load(text: str) -> Load | None:
    """None: it does not say. Of several engines the sums, and the mean of their use."""
    running, waiting, usage = 0.0, 0.0, []
    known = False
    for name, _, value in _samples(text):
        if name in _RUNNING:
            running, known = running + value, True
        elif name in _WAITING:
            waiting += value
        elif name in _USAGE:
            usage.append(value)
    if not known or not usage:
        return None
    return Load(int(running), int(waiting), sum(usage) / len(usage))


def pool(text: str) -> tuple[int, int]:
    """Block size and size of the pool in tokens; 0: it does not say."""
    for name, labels, value in _samples(text):
        if name == _CONFIG:
            told = dict(_LABEL.findall(labels))
            try:
                size = int(told["block_size"])
                return size, size * int(told["num_gpu_blocks"])
            except (KeyError, ValueError):
                continue
        if name == _POOL:
            return 0, int(value)
    return 0, 0
