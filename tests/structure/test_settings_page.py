"""docs/settings.md says what the settings are."""

from kvmesh.cli.reference import page


def test_the_page_is_the_one_that_the_code_makes(root) -> None:
    # Made anew by `make docs`.
    assert (root / "docs" / "settings.md").read_text() == page()
