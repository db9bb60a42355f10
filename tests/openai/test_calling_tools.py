"""Tools, reasoning and structured answers through the `openai` package and LangChain."""

import json

import openai
import pytest
from behind import CALLER, CODER, SIM
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "How is it in Paris?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
ARGUMENTS = [{"city": "Paris"}, {"city": "Köln"}]
ASKED = {"model": CALLER, "messages": MESSAGES, "tools": TOOLS}


def written(name: str, arguments: dict) -> str:
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


SAYS = "Let me look.\n" + "\n".join(map(written, ("weather", "time"), ARGUMENTS))


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def told(message) -> list[tuple[str, dict]]:
    calls = message.tool_calls
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_calls_are_read_whole_and_streamed(client, served):
    served.say(SAYS)
    expected = list(zip(("weather", "time"), ARGUMENTS, strict=True))
    (choice,) = client.chat.completions.create(**ASKED).choices
    assert told(choice.message) == expected
    assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")
    # The package puts a stream together by index, id and pieces of arguments.
    with client.chat.completions.stream(**ASKED) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.delta" in kinds
    assert told(streamed.message) == expected
    assert (streamed.message.content, streamed.finish_reason) == ("Let me look.", "tool_calls")


def test_calls_with_values_as_text_are_typed_by_the_tools_schema(client, served):
    schema = {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}}
    values = {"city": "5", "days": 5, "tags": ["a", "b"]}
    texts = {"city": "5", "days": "5", "tags": "['a', 'b']"}
    tags = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    served.say(f"Wait.\n<tool_call>\n<function=weather>\n{tags}</function>\n</tool_call>")
    function = {"name": "weather", "parameters": {"type": "object", "properties": schema}}
    asked = ASKED | {"model": CODER, "tools": [{"type": "function", "function": function}]}
    (choice,) = client.chat.completions.create(**asked).choices
    assert told(choice.message) == [("weather", values)]
    assert (choice.message.content, choice.finish_reason) == ("Wait.", "tool_calls")
    with client.chat.completions.stream(**asked) as stream:
        stream.until_done()
        (streamed,) = stream.get_final_completion().choices
    assert told(streamed.message) == [("weather", values)]


def test_a_conversation_goes_on_with_what_a_tool_answered(client, served):
    served.say(written("weather", ARGUMENTS[0]))
    message = client.chat.completions.create(**ASKED).choices[0].message
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    served.say("It rains.")
    again = [*MESSAGES, message.model_dump(exclude_none=True), answer]
    (choice,) = client.chat.completions.create(**ASKED | {"messages": again}).choices
    assert (choice.message.content, choice.message.tool_calls) == ("It rains.", None)
    assert choice.finish_reason == "stop"


def test_reasoning_has_a_field_of_its_own(client, served):
    served.say("<think>\nHm.\n</think>\n\nIt rains.")
    asked = {"model": CALLER, "messages": MESSAGES}
    message = client.chat.completions.create(**asked).choices[0].message
    assert (message.content, message.reasoning_content) == ("It rains.", "Hm.")
    stream = client.chat.completions.create(**asked, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "It rains."


def test_a_forced_call_and_a_structured_answer_are_the_engines_to_hold(client, served):
    named = {"type": "function", "function": {"name": "weather"}}
    served.say(json.dumps(ARGUMENTS[0]))
    (choice,) = client.chat.completions.create(**ASKED, tool_choice=named).choices
    assert told(choice.message) == [("weather", ARGUMENTS[0])]
    with pytest.raises(openai.BadRequestError, match="cannot constrain") as refused:
        client.chat.completions.create(**ASKED | {"model": SIM}, tool_choice=named)
    assert refused.value.param == "tool_choice"

    class City(BaseModel):
        city: str

    parsed = client.chat.completions.parse(model=CALLER, messages=MESSAGES, response_format=City)
    assert parsed.choices[0].message.parsed == City(city="Paris")


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=CALLER, prompt=[5] * 140_000)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_langchain_calls_tools(served):
    served.say(SAYS)
    plain = ChatOpenAI(model=CALLER, base_url=served.url, api_key="none", max_retries=0)
    model = plain.bind_tools(TOOLS)
    expected = list(zip(("weather", "time"), ARGUMENTS, strict=True))
    asked = [HumanMessage("How is it in Paris?")]
    whole = model.invoke(asked)
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == expected
    parts = list(model.stream(asked))
    streamed = parts[0]
    for part in parts[1:]:
        streamed += part
    assert [(call["name"], call["args"]) for call in streamed.tool_calls] == expected
    served.say("It rains.")
    answers = [ToolMessage("rain", tool_call_id=call["id"]) for call in whole.tool_calls]
    assert model.invoke([*asked, whole, *answers]).content == "It rains."
