"""The models behind the router of these tests."""

SIM, MOCK = "sim", "mock"
"""A worker with the simulated engine, and one that can be told what to do wrong."""
