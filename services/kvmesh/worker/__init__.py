"""A worker: one engine behind the Worker service."""
