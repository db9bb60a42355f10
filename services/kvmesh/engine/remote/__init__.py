"""Servers that know nothing of kvmesh, behind the engine contract (docs/vllm.md).

A server is taken as one more engine core: `core.py` turns its streams into what
vLLM's own core says a step at a time, and the rest is the loop of engine/vllm. What
a server speaks stands in one file a wire: `smg.py`, `first_party.py`, `openai_http.py`.
"""
