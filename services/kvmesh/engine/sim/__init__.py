"""The simulated engine: the timing of a real one, and no weights."""
