"""LangChain, as one framework on top of the `openai` package."""

import openai
import pytest
from behind import SIM
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

CONVERSATION = [SystemMessage("Be short."), HumanMessage("What is the capital of France?")]


@pytest.fixture
def model(served) -> ChatOpenAI:
    options = {"max_completion_tokens": 16, "seed": 5, "temperature": 0.7, "max_retries": 0}
    return ChatOpenAI(model=SIM, base_url=served.url, api_key="none", **options)


def test_a_conversation_is_answered_whole_and_in_parts(model):
    whole = model.invoke(CONVERSATION)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] == 16
    assert whole.response_metadata["finish_reason"] == "length"
    parts = list(model.stream(CONVERSATION, stream_usage=True))
    assert len(parts) > 1
    assert "".join(part.content for part in parts) == whole.content
    used = [part.usage_metadata for part in parts if part.usage_metadata]
    assert used[-1]["output_tokens"] == 16


def test_what_the_engine_cannot_do_is_an_error_and_not_a_wrong_answer(model):
    structured = model.with_structured_output(
        {"title": "answer", "type": "object", "properties": {}}
    )
    with pytest.raises(openai.BadRequestError):
        structured.invoke("x")
