"""How long work on models tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called often while a model is fetched, converted or checked."""

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """`step` in words ("download model.safetensors"); bytes done and in all.

        `total` None: not known. The last call of a step has done == total where
        the total is known.
        """


def silent(step: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""
