"""What a server's streams show of its steps."""

from kvmesh.engine.remote.steps import Steps, Told


def tokens(*names):
    return [Told(name, first=False) for name in names]


def first(name, computed=0):
    return Told(name, True, computed)


def held(closed):
    step = closed.step
    assert closed.over
    return step and (
        step.num_ctx_tokens, step.num_generation_requests, round(step.elapsed_ms), step.ended_at
    )  # fmt: skip


def test_a_prompt_alone_is_a_step_of_its_own() -> None:
    steps = Steps()
    steps.added(10.0, idle=True)
    assert not steps.told([first("a", 100)], 10.5, 0, 1).over
    # Its next token ends that step, and not yet its own.
    assert held(steps.told(tokens("a"), 10.6, 0, 1)) == (100, 0, 500, 10.5)
    assert held(steps.told(tokens("a"), 10.7, 0, 1)) == (0, 1, 100, 10.6)


def test_streams_that_come_one_by_one_are_one_step() -> None:
    steps = Steps()
    steps.added(0.0, idle=True)
    steps.added(0.0, idle=False)
    steps.told([first("a", 10), first("b", 20)], 1.0, 0, 2)
    assert held(steps.told(tokens("a"), 1.1, 0, 2)) == (30, 0, 1000, 1.0)
    assert not steps.told(tokens("b"), 1.12, 0, 2).over
    assert held(steps.told(tokens("b"), 1.2, 0, 2)) == (0, 2, 100, 1.1)


def test_nothing_is_learnt_of_a_step_with_a_prompt_beside_it() -> None:
    steps = Steps()
    steps.added(0.0, idle=True)
    steps.told([first("a", 10)], 1.0, 0, 1)
    steps.told(tokens("a"), 1.1, 0, 1)
    steps.added(1.15, idle=False)
    # Its prompt may be in any of these.
    assert held(steps.told(tokens("a"), 1.3, 1, 2)) is None
    assert held(steps.told(tokens("a"), 1.5, 1, 2)) is None
    assert held(steps.told([*tokens("a"), first("b", 50)], 1.9, 0, 2)) is None
    assert held(steps.told(tokens("a", "b"), 2.0, 0, 2)) is None
    assert held(steps.told(tokens("a", "b"), 2.1, 0, 2)) == (0, 2, 100, 2.0)


def test_nothing_is_learnt_of_prompts_of_which_it_is_not_known_what_was_cached() -> None:
    steps = Steps()
    steps.added(0.0, idle=True)
    steps.told([first("a", None)], 1.0, 0, 1)
    assert held(steps.told(tokens("a"), 1.1, 0, 1)) is None
    assert held(steps.told(tokens("a"), 1.2, 0, 1)) == (0, 1, 100, 1.1)


def test_a_prompt_that_did_not_come_with_the_others_spoils_the_first_step() -> None:
    steps = Steps()
    steps.added(0.0, idle=True)
    steps.added(0.0, idle=False)
    steps.told([first("a", 10)], 1.0, 1, 2)
    assert held(steps.told(tokens("a"), 1.1, 1, 2)) is None


def test_what_may_have_been_several_steps_makes_the_next_one_no_longer() -> None:
    steps = Steps()
    steps.added(0.0, idle=True)
    steps.told([first("a", 10)], 1.0, 0, 1)
    # Another prompt, which takes long, while the end of the first stream is not known here.
    steps.added(1.0, idle=False)
    steps.told([first("b", 500)], 5.0, 0, 2)
    assert held(steps.told(tokens("b"), 5.1, 0, 1)) is None
    assert held(steps.told(tokens("b"), 5.2, 0, 1)) == (0, 1, 100, 5.1)


def test_a_stream_that_left_does_not_show_where_its_last_step_ended() -> None:
    steps = Steps()
    steps.added(0.0, idle=True)
    steps.added(0.0, idle=False)
    steps.told([first("a", 10), first("b", 20)], 1.0, 0, 2)
    steps.told(tokens("a", "b"), 1.1, 0, 2)
    assert held(steps.told(tokens("a"), 1.2, 0, 2)) == (0, 2, 100, 1.1)
    steps.left("a")
    # The next step, which alone would not show.
    assert not steps.told(tokens("b"), 1.3, 0, 1).over
    assert held(steps.told(tokens("b"), 1.4, 0, 1)) is None
    assert held(steps.told(tokens("b"), 1.5, 0, 1)) == (0, 1, 100, 1.4)


def test_the_last_stream_closes_the_last_step() -> None:
    steps = Steps()
    steps.added(0.0, idle=True)
    steps.told([first("a", 10)], 1.0, 0, 1)
    assert held(steps.told(tokens("a"), 1.1, 0, 0)) == (0, 1, 100, 1.1)
    # All of it at once: a request for one token.
    steps.added(2.0, idle=True)
    assert held(steps.told([first("b", 5)], 2.5, 0, 0)) == (5, 0, 500, 2.5)
    assert not steps.told([], 3.0, 0, 0).over


def test_requests_that_ended_without_a_token_leave_no_step_open() -> None:
    steps = Steps()
    steps.added(0.0, idle=True)
    assert held(steps.told([], 1.0, 0, 0)) is None
