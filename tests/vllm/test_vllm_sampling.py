"""What is asked of vLLM, one to one or refused by name."""

import pytest

from kvmesh.engine.vllm.sampling import UnsupportedError, sampling_arguments
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire


def asked(output=(), room=1000, seeded=True, **fields):
    sampling = fields.pop("sampling", {})
    sampling = wire.ResolvedSampling(**{"top_p": 1.0, "repetition_penalty": 1.0, **sampling})
    fields.setdefault("max_tokens", 100)
    continuation = wire.Continuation(
        prompt_ids=[1, 2, 3], output_ids=output, sampling=sampling, **fields
    )
    return sampling_arguments(continuation, room=room, max_logprobs=20, seeded=seeded)


def refused(**fields):
    with pytest.raises(UnsupportedError) as error:
        asked(**fields)
    return error.value.field


def test_every_field_goes_to_vllms_own_of_the_same_meaning() -> None:
    given = {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.75,
        "min_p": 0.25,
        "repetition_penalty": 1.25,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": [inference.LogitBias(token_id=7, bias=-100)],
        "seed": 12,
    }
    arguments = asked(sampling=given, stop_token_ids=[0, 2], min_tokens=4, logprobs=5)
    assert arguments == {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.75,
        "min_p": 0.25,
        "repetition_penalty": 1.25,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {7: -100.0},
        "seed": 12,
        "max_tokens": 100,
        "min_tokens": 4,
        "stop_token_ids": [0, 2],
        "logprobs": 5,
        "ignore_eos": True,
        "detokenize": False,
        "skip_clone": True,
    }


def test_no_field_of_the_wire_is_forgotten() -> None:
    """A field that the wire gets later has to be mapped, or refused."""
    mapped = set(asked(sampling={"temperature": 1.0, "logit_bias": [inference.LogitBias()]}))
    # It says what becomes of the seed where there is no drawing by one.
    mapped |= {"seed_given"}
    wired = {field.name for field in wire.ResolvedSampling.DESCRIPTOR.fields}
    assert wired <= mapped


def test_what_counts_from_the_border_on_is_less_by_the_output_so_far() -> None:
    arguments = asked(output=[9] * 30, min_tokens=40)
    assert arguments["max_tokens"] == 70
    assert arguments["min_tokens"] == 10
    assert asked(output=[9] * 30, min_tokens=20)["min_tokens"] == 0


def test_the_context_bounds_what_is_asked_for() -> None:
    assert asked(room=12, min_tokens=50)["max_tokens"] == 12
    assert asked(room=12, min_tokens=50)["min_tokens"] == 12


def test_greedy_has_no_seed_and_a_continuation_has_another() -> None:
    assert "seed" not in asked(sampling={"seed": 5})
    warm = {"seed": 5, "temperature": 1.0}
    seeds = {asked(sampling=warm, output=[9] * n)["seed"] for n in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert asked(sampling={"seed": (1 << 64) - 1, "temperature": 1.0})["seed"] < 1 << 63
    assert "seed" not in asked(sampling=warm, seeded=False)


def test_a_seed_that_a_client_gave_is_used_or_refused() -> None:
    given = {"seed": 5, "seed_given": True, "temperature": 1.0}
    assert asked(sampling=given)["seed"] == 5
    assert refused(sampling=given, seeded=False) == "sampling.seed"
    # Nothing is drawn without a temperature.
    assert "seed" not in asked(sampling={**given, "temperature": 0.0}, seeded=False)


def test_what_vllm_cannot_do_is_refused_by_its_name() -> None:
    assert refused(sampling={"temperature": 2.5}) == "sampling.temperature"
    assert refused(output=[1] * 100) == "stopping.max_tokens"
    assert refused(grammar=inference.Grammar()) == "grammar"


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_over_ones_own_output_cannot_be_continued(name) -> None:
    assert asked(sampling={name: 0.5})[name] == 0.5
    assert refused(sampling={name: 0.5}, output=[4]) == f"sampling.{name}"


def test_a_repetition_penalty_can_since_it_counts_the_prompt() -> None:
    assert asked(sampling={"repetition_penalty": 1.5}, output=[4])["repetition_penalty"] == 1.5


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ({"json_schema": "{}"}, {"json": "{}"}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"ebnf": "root ::= x"}, {"grammar": "root ::= x"}),
        ({"json_object": True}, {"json_object": True}),
    ],
)
def test_each_kind_of_grammar_has_its_own(grammar, expected) -> None:
    assert asked(grammar=inference.Grammar(**grammar))["grammar"] == expected
    assert refused(grammar=inference.Grammar(**grammar), output=[1]) == "grammar"
