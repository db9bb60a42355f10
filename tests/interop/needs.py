"""What the clients of other languages need on this machine."""

import os
import shutil

import pytest


def need(language: str, *programs: str) -> None:
    """Skips where a language is missing; in CI that is a failure, so that nobody
    believes in clients that were never run."""
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return
    text = f"{language} is not installed: {', '.join(missing)} not on PATH"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{text}; with CI=true the interop tests may not be skipped", pytrace=False)
    pytest.skip(text)
