"""A language that is missing: never an unseen skip where it counts."""

import pytest
from needs import need


@pytest.mark.parametrize(
    ("ci", "end", "says"),
    [("true", pytest.fail.Exception, "may not be skipped"), ("", pytest.skip.Exception, "Go is")],
)
def test_a_missing_language_fails_in_ci_and_is_skipped_elsewhere(monkeypatch, ci, end, says):
    monkeypatch.setenv("CI", ci)
    need("Python", "env")
    with pytest.raises(end, match=says) as told:
        need("Go", "env", "no-such-program")
    assert "Go is not installed: no-such-program not on PATH" in str(told.value)
