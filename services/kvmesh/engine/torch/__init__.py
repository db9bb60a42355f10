"""The reference engine: Llama-family models in torch, written to be read."""
