"""The checker finds what it is there for."""

from __future__ import annotations

import pytest
from checker import first_wrong, first_wrong_of_attempts
from many_streams import prompts, undisturbed

OWNER = 1 << 32
(PROMPT,) = prompts(1, tokens=40)
WHOLE = undisturbed(PROMPT, 60)


def output(*attempts: tuple[int, int]) -> list[int]:
    """What attempts give one after the other: (attempt, up to which index)."""
    text = []
    for attempt, end in attempts:
        text += undisturbed(PROMPT + text, end - len(text), tag=OWNER | attempt)
    return text


def test_the_models_own_output_is_right() -> None:
    assert first_wrong(PROMPT, WHOLE) is None


@pytest.mark.parametrize("index", [0, 1, 30, 59])
def test_another_token_is_found_where_it_is(index) -> None:
    assert first_wrong(PROMPT, [*WHOLE[:index], WHOLE[index] ^ 1, *WHOLE[index + 1 :]]) == index


def test_a_token_twice_or_left_out_is_found() -> None:
    assert first_wrong(PROMPT, [*WHOLE[:20], *WHOLE[19:]]) == 20
    assert first_wrong(PROMPT, [*WHOLE[:20], *WHOLE[21:]]) == 20


@pytest.mark.parametrize(
    "attempts",
    [[(1, 60)], [(1, 20), (2, 60)], [(2, 60)], [(1, 1), (3, 40), (4, 60)]],
    ids=["one", "two", "the first came to nothing", "three"],
)
def test_attempts_that_follow_each_other_are_right(attempts) -> None:
    assert first_wrong_of_attempts(PROMPT, output(*attempts), routers_lost=0) is None


def test_an_attempt_that_was_over_is_found() -> None:
    """Where the second has begun, one token of the first."""
    late = output((1, 20), (2, 30), (1, 31))
    assert first_wrong_of_attempts(PROMPT, late, routers_lost=0) == 30


def test_attempts_begin_again_where_a_router_was_lost_and_only_there() -> None:
    resumed = output((1, 20), (2, 30), (1, 60))
    assert first_wrong_of_attempts(PROMPT, resumed, routers_lost=0) == 30
    assert first_wrong_of_attempts(PROMPT, resumed, routers_lost=1) is None


def test_another_owner_goes_on_with_higher_attempts_where_a_router_was_lost() -> None:
    """The attempt that was found goes on under its own name; the next one is the owner's."""
    resumed = output((1, 30))
    resumed += undisturbed(PROMPT + resumed, 30, tag=2 * OWNER | 2)
    assert first_wrong_of_attempts(PROMPT, resumed, routers_lost=0) == 30
    assert first_wrong_of_attempts(PROMPT, resumed, routers_lost=1) is None
    # The old owner's attempts are over then.
    late = resumed + undisturbed(PROMPT + resumed, 10, tag=OWNER | 3)
    assert first_wrong_of_attempts(PROMPT, late, routers_lost=1) == 60


def test_what_a_router_places_of_a_stream_that_it_took_over_has_the_next_owner() -> None:
    """One router was lost: the second one claims under 2 and places under 3; 5 is a third one's."""
    for owner, wrong in ((3, None), (5, 30)):
        moved = output((1, 30))
        moved += undisturbed(PROMPT + moved, 30, tag=owner * OWNER | 2)
        assert first_wrong_of_attempts(PROMPT, moved, routers_lost=1) == wrong, owner


def test_what_an_attempt_made_of_another_text_is_found() -> None:
    """Right for the attempt, but not after what was delivered."""
    mixed = output((1, 20)) + output((2, 60))[20:]
    assert first_wrong_of_attempts(PROMPT, mixed, routers_lost=0) == 20
