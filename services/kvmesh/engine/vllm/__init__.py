"""vLLM behind the engine contract (docs/vllm.md)."""
