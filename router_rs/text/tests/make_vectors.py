# ruff: noqa: E501, RUF001
"""Writes tests/data: small tokenisers, and what transformers makes of chats.

Run it with transformers and tokenizers installed; its output is committed, so
that the tests need neither. The templates are short ones of our own in the
shapes that models use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
TEXT = [
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 22))",
    "Größe, naïve, señor, žluťoučký kůň, Привет мир, 你好，世界, こんにちは",
    "numbers 0 1 22 333 4444 and   spaces\tand tabs; don't, we'll, I'm",
    "emoji 😀 👩‍👩‍👧 and e\u0301 combined",
] * 4


def byte_level() -> Tokenizer:
    """As GPT-2's family: byte-level BPE, a beginning-of-text token."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>", "<|eot é|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(TEXT, trainer)
    tok.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
    )
    return tok


def byte_fallback() -> Tokenizer:
    """As Llama 2's family: spaces as a mark, unknown characters as bytes."""
    tok = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.train_from_iterator(TEXT, trainer)
    # The trainer drops the settings that make unknown characters bytes.
    data = json.loads(tok.to_str())
    data["model"].update(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    # Only three of them are special; the bytes are plain vocabulary.
    data["added_tokens"] = data["added_tokens"][:3]
    tok = Tokenizer.from_str(json.dumps(data))
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
    )
    return tok


def metaspace() -> Tokenizer:
    """As T5's and newer SentencePiece families: Metaspace both ways."""
    tok = byte_fallback()
    data = json.loads(tok.to_str())
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    data.update(normalizer=None, pre_tokenizer=mark, decoder=mark)
    return Tokenizer.from_str(json.dumps(data))


TEMPLATES = {
    "chatml": """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "llama3": """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "[system]\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + eos_token }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '[call]{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}{{ call.arguments | tojson }}{{ "}" + eos_token }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "[ipython]" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- else %}
        {{- '[' + message['role'] + ']\\n\\n' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\\n\\n' }}{%- endif %}""",
    "mistral": """{%- set ns = namespace(last=-1, turn=false) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (not ns.turn) and message.role in ['user', 'assistant'] %}
        {{- raise_exception('Roles must alternate, got ' + message.role) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set ns.turn = true %}
        {%- if tools is not none and loop.index0 == ns.last %}
            {{- '[TOOLS] [' }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != 'return' %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}
                {{- '}}' }}
                {%- if not loop.last %}, {% else %}{{- ']' }}{% endif %}
            {%- endfor %}
            {{- '[/TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {%- set ns.turn = false %}
        {{- ' ' + message['content']|trim + eos_token }}
    {%- elif message.role == 'system' %}{% continue %}
    {%- else %}{% break %}
    {%- endif %}
{%- endfor %}""",
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<r>\\n' + content + '\\n</r>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "odd": """  {% for message in messages %}
    {% if message.role == 'assistant' %}
    {% generation %}{{ message.content }}{% endgeneration %}
    {% else %}
[{{ message.role|upper }}] {{ message.content|replace('a', 'A') }}
    {% endif %}
  {% endfor %}
{%- macro shout(x, times=2) -%}{{ x * times }}{%- endmacro %}
{{ shout('!') }}{{ shout('?', times=3) }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 5 }} {{ 'x' ~ 1 ~ none }}
{{ true }} {{ none }} {{ 1.0 }} {{ [1, 'a', none, true] }} {{ {'k': 1.5e-7, 'ü': 'é'} | tojson }}
{{ messages|length }} {{ (messages|first).role }} {{ messages|map(attribute='role')|join(', ') }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ 'a,b,c'.split(',')|last }}
{{ "%s-%d" % ("x", 3) if false else "fmt" }} {{ missing is defined }} {{ '  strip  '.strip() }}|
""",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather \"now\" at <place> & 'time'; é",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "number", "default": 1.0}},
            "required": ["place"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {
        "name": "get_weather",
        "arguments": {"place": "Köln", "days": 3, "x": [1e22, 0.1, True, None]},
    },
}

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi, what is the capital?"}]},
    {
        "messages": [
            {"role": "system", "content": " You are kind.\n"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb "},
            {"role": "user", "content": "c 你好 \n"},
        ]
    },
    {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "add_generation_prompt": False,
    },
    {"messages": [{"role": "user", "content": "weather?"}], "tools": [WEATHER, WEATHER]},
    {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {
                "role": "tool",
                "content": '{"t": 3}',
                "tool_call_id": "call00001",
                "name": "get_weather",
            },
            {"role": "tool", "content": "4", "tool_call_id": "call00001"},
        ],
        "tools": [WEATHER],
    },
    {
        "messages": [{"role": "user", "content": "x"}],
        "arguments": {"enable_thinking": False, "date_string": "1 Jan 2000"},
    },
    {"messages": [{"role": "assistant", "content": "out of turn"}]},
]


def main() -> None:
    """Writes all files."""
    DATA.mkdir(exist_ok=True)
    tokenizers = {
        "byte_level": byte_level(),
        "byte_fallback": byte_fallback(),
        "metaspace": metaspace(),
    }
    texts = [
        *TEXT[:5],
        "",
        " ",
        "  two",
        "<s>Hi<|im_end|>\n<tool_call>x",
        "tail \u00e9\u0301 \ud7ff 𝔘",
        "a\u0000b\r\n",
    ]
    encoded = {}
    for name, tok in tokenizers.items():
        (DATA / f"{name}.json").write_text(tok.to_str(pretty=False), "utf-8")
        encoded[name] = [
            {
                "text": text,
                "ids": tok.encode(text).ids,
                "plain_ids": tok.encode(text, add_special_tokens=False).ids,
                "decoded": tok.decode(tok.encode(text).ids),
            }
            for text in texts
        ]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers["byte_level"], bos_token="<s>", eos_token="<|im_end|>"
    )
    rendered = []
    for name, template in TEMPLATES.items():
        for chat in CHATS:
            arguments = {"date_string": "23 Nov 2024"} | chat.get("arguments", {})
            try:
                text = fast.apply_chat_template(
                    chat["messages"],
                    tools=chat.get("tools"),
                    chat_template=template,
                    add_generation_prompt=chat.get("add_generation_prompt", True),
                    tokenize=False,
                    **arguments,
                )
                outcome = {"text": text}
            except Exception as error:  # the template's own: its message is the vector
                outcome = {"error": type(error).__name__, "message": str(error)}
            rendered.append({"template": name, "chat": {**chat, "arguments": arguments}, **outcome})
    vectors = {"templates": TEMPLATES, "rendered": rendered, "encoded": encoded}
    (DATA / "vectors.json").write_text(
        json.dumps(vectors, ensure_ascii=False, indent=1) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
