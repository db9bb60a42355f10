"""The models behind the router of these tests."""

SIM, MOCK, CALLER, CODER = "sim", "mock", "caller", "coder"
"""A worker with the simulated engine, one that can be told what to do wrong, and two that can be
told what to say: their models can call tools, one as Hermes does and one as Qwen3-Coder."""
