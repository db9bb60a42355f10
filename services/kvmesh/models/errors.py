"""What can go wrong with a model before it runs."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be had or cannot be run. The text is for people."""


class ModelNotFoundError(ModelError):
    """No such model in the cache, on disk or at its source."""


class UnsupportedModelError(ModelError):
    """The model exists, but this release cannot run it."""


class ChecksumError(ModelError):
    """What was downloaded is not what its source promised."""


class SourceUnreachableError(ModelError):
    """The place that has the model does not answer."""
