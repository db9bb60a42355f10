"""The models behind the router of these tests."""

SIM, MOCK, CALLER = "sim", "mock", "caller"
"""A worker with the simulated engine, one that can be told what to do wrong, and one that can be
told what to say and whose model can call tools."""
