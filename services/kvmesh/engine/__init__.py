"""Engines: what computes tokens behind a worker."""
