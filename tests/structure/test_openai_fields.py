"""No field of a body is forgotten: each that OpenAI's package or vLLM's server knows is tried by
`every_field_tests.rs`, and stands in docs/openai.md."""

import re
from pathlib import Path

from openai.types import completion_create_params as completions
from openai.types.chat import chat_completion_stream_options_param as stream_options
from openai.types.chat import completion_create_params as chats

ROOT = Path(__file__).resolve().parents[2]

VLLM = """
messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
presence_penalty response_format seed stop stream stream_options temperature top_p tools tool_choice
reasoning_effort thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search
top_k min_p repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo
add_generation_prompt continue_final_message add_special_tokens documents chat_template
chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority request_id
session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
return_token_offsets return_prompt_text mm_payload return_mm_kwargs cache_salt kv_transfer_params
ec_transfer_params vllm_xargs repetition_detection stream_interval prompt suffix prompt_embeds
"""
"""Of its ChatCompletionRequest and CompletionRequest; make test-vllm compares."""


def tried() -> set[str]:
    rows = (ROOT / "router_rs/gateway/src/openai/every_field_tests.rs").read_text()
    return set(re.findall(r'^        \("(\w+)", (?:BOTH|CHAT|COMPLETION),', rows, re.MULTILINE))


def test_each_field_that_clients_know_is_tried() -> None:
    known = {
        *chats.CompletionCreateParamsBase.__annotations__,
        *completions.CompletionCreateParamsBase.__annotations__,
        *VLLM.split(),
    }
    assert sorted(known - tried()) == []
    assert set(stream_options.ChatCompletionStreamOptionsParam.__annotations__) == {
        "include_usage",
        "include_obfuscation",
    }


def test_each_field_that_is_tried_stands_on_the_page() -> None:
    page = re.sub(r"```.*?```", "", (ROOT / "docs/openai.md").read_text(), flags=re.DOTALL)
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", page))))
    missing = {name for name in tried() - words if not name.startswith("guided_")}
    assert sorted(missing) == []
