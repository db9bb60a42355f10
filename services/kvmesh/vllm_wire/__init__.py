"""Generated from proto/vllm by `make wire`."""
