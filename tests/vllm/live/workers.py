"""Workers with vLLM, as real processes."""

from contextlib import contextmanager

from cluster import Cluster

MODEL = "smollm2-135m"
ARGUMENTS = {
    "max_model_len": "512",
    "enforce_eager": "true",
    "max_num_seqs": "8",
    "max_num_batched_tokens": "256",
}
POOL_TOKENS = 4096


def flags(**more):
    given = {**ARGUMENTS, **more}
    arguments = [part for key, text in given.items() for part in ("--vllm-arg", f"{key}={text}")]
    return ("--kv-pool-tokens", str(POOL_TOKENS), "--log-level", "warn", *arguments)


@contextmanager
def two_workers(folder, **arguments):
    """A router, a prefill and a decode worker; by default KV goes by NIXL."""
    cluster = Cluster(folder)
    try:
        endpoint = cluster.start_router("--queue-timeout", "10m")
        for name, role in (("p", "prefill"), ("d", "decode")):
            cluster.begin_worker(name, role, *flags(**arguments), engine="vllm")
        for name in ("p", "d"):
            # Until it says that it serves: minutes, on a busy machine.
            cluster.worker_address(name)
        cluster.wait_live(endpoint, "p", "d")
        yield cluster
    finally:
        cluster.close()
