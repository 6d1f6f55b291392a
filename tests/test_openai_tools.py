"""Tests tools, response formats, log probabilities and /v1/responses, with OpenAI's official
client."""

import asyncio
import json
import shutil
from typing import Annotated, Literal

import httpx
import mlx.core as mx
import pydantic
import pytest

from lib.engines import END, Alone, write_adapters, write_lively
from lib.openai_server import CHAT, HELLO, NEVER_ENDS, chat_tokens, check, serving
from mlx_segtrain.errors import InputError
from mlx_segtrain.generation.parts import Parts, Tags
from mlx_segtrain.serving.api import answers
from mlx_segtrain.serving.api.openai_forms import ChatRequest
from mlx_segtrain.serving.generation import grammars
from mlx_segtrain.serving.generation.words import shown, token_bytes
from mlx_segtrain.serving.pools import Busy, Pool

pytestmark = pytest.mark.acceptance

#: A chat template similar to those of Qwen and Hermes, from which mlx-lm infers how to parse tool
#: calls.
TEMPLATE = """{%- if tools %}<|im_start|>system
You may call:{% for tool in tools %} {{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{ message.content }}{% for tool_call in message.tool_calls or [] %}{# as tool_call.name #}
<tool_call>
{"name": "{{ tool_call.function.name }}", "arguments": {{ tool_call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking == "open" %}<think>
{% endif %}{% endif %}"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="module")
def said(folder):
    model = write_lively(folder / "ORG-Model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    return Alone(model, write_adapters(folder, model))


@pytest.fixture(scope="module")
def server(folder, said):
    with serving(folder, said.model) as server:
        server.mount("a", "b")
        yield server


def ask(server, messages=HELLO, n=300, extra=None, **more):
    return server.client.chat.completions.create(
        model="default", messages=messages, max_tokens=n, extra_body=extra or {}, **more
    )


# Answer formats


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    age: int = pydantic.Field(ge=0, le=99)
    likes: list[bool] = pydantic.Field(max_length=2)


def test_a_schema_by_the_official_client(server):
    """A model that was never trained on JSON follows the schema, even with sampling or an
    adapter."""
    for more in ({}, {"temperature": 2.0, "seed": 3}, {"extra_body": {"adapter": "a"}}):
        answer = server.client.chat.completions.parse(
            model="ORG-Model", messages=HELLO, response_format=Person, max_tokens=300, **more
        )
        assert isinstance(answer.choices[0].message.parsed, Person)
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}-[0-9]+x"}}, r"[ab]{3}-[0-9]+x"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'yes|n"o'),
        ({"structured_outputs": {"grammar": 'start: "a"+ "." "é"'}}, r"a+\.é"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9] "y"'}}, "x[0-9]y"),
        ({"structured_outputs": {"json": '{"enum": [12, "ab"]}'}}, '12|"ab"'),
        ({"structured_outputs": {"json": {"const": {"a": None}}}}, r'\{\s*"a"\s*:\s*null\s*\}'),
    ],
    ids=str,
)
def test_forms(server, form, fits, stream):
    import re

    how = {"extra": form, "temperature": 1.5, "seed": 5, "stream": stream}
    answer = ask(server, **how)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert re.fullmatch(fits, text), text


def test_json_of_any_kind(server):
    tokenizer = server.engine.base.tokenizer
    (end,) = tokenizer.encode("}", add_special_tokens=False)
    end = {"logit_bias": {str(end): 100}}
    answer = ask(server, response_format={"type": "json_object"}, **end)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_form_in_completions_and_in_a_crowd(server):
    answer = server.client.completions.create(
        model="default",
        prompt=["one", "two"],
        n=3,
        temperature=2.0,
        max_tokens=50,
        extra_body={"structured_outputs": {"regex": "[0-9]{4}"}},
    )
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert all(len(text) == 4 and text.isdecimal() for text in texts) and len(set(texts)) > 2


def test_a_grammar_that_takes_too_much_fails_alone(server):
    bad = {"structured_outputs": {"regex": "(a{0,3000}b{0,3000}){3000}"}}
    answer = server.http.post("/v1/chat/completions", json=CHAT | bad | {"max_tokens": 50})
    assert answer.status_code in (200, 400) and ask(server, n=4).choices


def test_plain_requests_do_not_wait_for_grammars(server, monkeypatch):
    full = Pool("grammars", 1, 0)
    assert full._places.acquire(blocking=False)
    monkeypatch.setattr(answers, "_GRAMMARS", full)
    assert ask(server, n=2).choices and ask(server, n=2, tools=[CLOCK]).choices
    for more in (
        {"response_format": {"type": "json_object"}},
        {"tools": [CLOCK], "tool_choice": "required"},
    ):
        check(server.http.post(CHATS, json=CHAT | more), 429, "for grammars are waiting")


def chained(n, groups=0):
    """Returns a grammar of `n` nested rules. A few thousand nested rules would overflow the
    stack."""
    begin, end = "(" * groups + '"a"', ")?" * groups
    rules = [f"r{i}: {begin} r{i + 1}{end}" for i in range(n)]
    return "\n".join(["start: r0", *rules, f'r{n}: "b"'])


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"regex": "a" * 70_000}, "structured_outputs.regex has more than 65536 characters"),
        ({"choice": ["a" * 40_000, "b" * 40_000]}, "choice has more than 65536 characters"),
        ({"grammar": f'start: "{"a" * 70_000}"'}, "grammar has more than 65536 characters"),
        ({"json": {"const": "a" * 70_000}}, "json has more than 65536 characters"),
        ({"grammar": chained(1500)}, "grammar contains more than 1000 of the characters :(["),
        ({"grammar": chained(300, 15)}, "grammar contains more than 1000 of the characters :(["),
        ({"grammar": chained(600).replace(":", " ::=")}, "more than 1000 of the characters :(["),
        ({"json": {"anyOf": [{}] * 1001}}, "json contains more than 1000 of the characters {"),
    ],
    ids=["regex", "choice", "text", "json", "rules", "groups", "gbnf", "schemas"],
)
def test_forms_that_are_too_large(server, form, says):
    check(server.http.post(CHATS, json=CHAT | {"structured_outputs": form}), 400, says)


def test_large_forms_that_may_be(server):
    form = {"grammar": chained(900).replace('"a"', '"a"?')}
    answer = ask(server, extra={"structured_outputs": form}, n=4)
    assert set(answer.choices[0].message.content) <= {"a", "b"}


def test_a_grammar_s_error_is_the_request_s(server, monkeypatch, caplog):
    def allowed(self, n):
        raise InputError("the grammar of the answer cannot be followed further: it is too much")

    monkeypatch.setattr(grammars.Grammar, "allowed", allowed)
    body = CHAT | {"response_format": {"type": "json_object"}}
    check(server.http.post(CHATS, json=body), 400, "it is too much")
    assert not [x for x in caplog.records if x.exc_info]
    assert ask(server, n=4).choices


# Tools


def test_the_tool_loop_of_the_official_client(server, said):
    tools = [WEATHER, CLOCK]
    turns = [*HELLO]
    answer = ask(server, turns, tools=tools, tool_choice="required", temperature=1.0, seed=1)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
    for call in message.tool_calls:
        arguments = json.loads(call.function.arguments)
        assert call.function.name in ("weather", "clock") and call.id.startswith("call_")
        if call.function.name == "weather":
            assert set(arguments) == {"place", "days"} and arguments["place"] in ("Rome", "Oslo")
    turns.append(message.model_dump(exclude_none=True))
    turns += [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls
    ]
    answer = ask(server, turns, tools=tools, n=8)
    for turn in turns:
        for called in turn.get("tool_calls", ()):
            called["function"]["arguments"] = json.loads(called["function"]["arguments"])
    prompt = said.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tools=tools)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == said(prompt, None, 8)


class Place(pydantic.BaseModel, extra="forbid"):
    name: Literal["Rome", "Oslo"]


class Trip(pydantic.BaseModel, extra="forbid"):
    """A model whose JSON schema refers to Place in the schema's own $defs."""

    start: Place
    ends: Annotated[list[Place], pydantic.Field(min_length=1, max_length=2)]


class Walk(pydantic.BaseModel, extra="forbid"):
    Place: Place


def test_tools_whose_parameters_refer_to_their_own(server):
    """Each schema refers to its own $defs, even if another schema defines the same names."""
    other = {"$defs": {"Place": {"const": {"$ref": "#/x"}}}, "$ref": "#/$defs/Place"}
    kinds = {"trip": Trip.model_json_schema(), "walk": Walk.model_json_schema(), "other": other}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in kinds.items()
    ]
    for name, kind in (("trip", Trip), ("walk", Walk), ("other", None)):
        choice = {"type": "function", "function": {"name": name}}
        answer = ask(server, tools=tools, tool_choice=choice, temperature=1.0, seed=2)
        (call,) = answer.choices[0].message.tool_calls
        if kind is not None:
            kind.model_validate_json(call.function.arguments)
        else:
            assert json.loads(call.function.arguments) == {"$ref": "#/x"}
    answer = ask(server, tools=tools, tool_choice="required", temperature=1.0, seed=3)
    assert answer.choices[0].message.tool_calls


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_has_to_be_called(server, stream):
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = ask(server, tools=[CLOCK, WEATHER], tool_choice=choice, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert call.index == 0 and chunks[-1].finish_reason == "tool_calls"
        assert not any(chunk.delta.content for chunk in chunks)
    else:
        (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"place", "days"}


def test_calls_in_a_model_s_own_form(server, said):
    """The model is forced to write plain text, two valid calls and an invalid one."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
    bad = "<tool_call>\nno JSON\n</tool_call>"
    whole = f"Well. {call}\n{bad}{call}"
    with speaking(server, whole) as body:
        answer = ask(server, tools=[WEATHER], **body)
        chunks = list(ask(server, tools=[WEATHER], stream=True, **body))
        one = ask(server, tools=[WEATHER], parallel_tool_calls=False, **body)
        none = ask(server, tools=[WEATHER], tool_choice="none", **body)
        plain = ask(server, **body)
    message = answer.choices[0].message
    assert [x.function.name for x in message.tool_calls] == ["weather"] * 2
    assert json.loads(message.tool_calls[0].function.arguments) == {"place": "Oslo"}
    assert message.content == f"Well. \n{bad}"
    assert answer.choices[0].finish_reason == "tool_calls"
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [own for delta in deltas for own in delta.tool_calls or ()]
    assert [own.index for own in calls] == [0, 1] and len({own.id for own in calls}) == 2
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert len(one.choices[0].message.tool_calls) == 1
    for answer in (none, plain):
        assert answer.choices[0].message.content == whole
        assert answer.choices[0].message.tool_calls is None


STRICT = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}


def test_a_strict_tool_that_the_model_may_call(server, monkeypatch):
    """If the model starts a call, the call must match the schema. Other text is unconstrained."""
    bad = '<tool_call>\n{"name": "weather", "arguments": {"place": "Paris"}}\n</tool_call>'
    other = '<tool_call>\n{"name": "clock", "arguments": {"x": 1}}\n</tool_call>'
    tools = {"tools": [STRICT, CLOCK]}
    with speaking(server, f"Well, <tool. {bad}") as body:
        called = ask(server, **tools, **body)
        loose = ask(server, tools=[WEATHER, CLOCK], **body)
    with speaking(server, other) as body:
        clock = ask(server, **tools, **body)
    with speaking(server, "No. <tool_cal") as body:
        plain = ask(server, **tools, **body)
    (call,) = called.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments["place"] in ("Rome", "Oslo") and arguments["days"] in (1, 2)
    assert called.choices[0].message.content.startswith("Well, <tool. ")
    (call,) = loose.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"place": "Paris"}
    (call,) = clock.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("clock", {"x": 1})
    assert plain.choices[0].message.content == "No. <tool_cal"
    tokenizer = server.engine.base.tokenizer
    monkeypatch.setattr(tokenizer._tool_parser, "__module__", "mlx_lm.tool_parsers.mistral")
    answer = server.http.post(CHATS, json=CHAT | tools)
    check(answer, 400, "tools.function.strict works only if tool_choice is required")


@pytest.mark.parametrize("stays", [False, True])
def test_an_answer_outlives_a_server_that_is_busy(stays, server, monkeypatch):
    """If the server is busy, calls are parsed a little later. After a timeout, the client receives
    the calls as plain text."""
    monkeypatch.setattr(answers, "CALLS_S", 0.3)
    confined, asked = server.engine.base.confined, []
    plain = confined.ask

    def ask_calls(op, *args, **how):
        asked.extend([op] * (op == "calls"))
        if op == "calls" and (stays or len(asked) < 2):
            raise Busy("too many requests are waiting: try again in a moment.")
        return plain(op, *args, **how)

    monkeypatch.setattr(confined, "ask", ask_calls)
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    with speaking(server, call) as body:
        message = ask(server, tools=[CLOCK], **body).choices[0].message
    assert len(asked) > 1
    if stays:
        assert message.content == call and message.tool_calls is None
    else:
        assert [own.function.name for own in message.tool_calls] == ["clock"]


class speaking:
    """Makes the model write `text`, token by token, in requests that contain the returned
    fields."""

    def __init__(self, server, text):
        self.server, self.tokens = server, [*text.encode(), END]

    def __enter__(self):
        from mlx_segtrain.generation import batching

        self.module, self.plain = batching, batching.processor

        def processor(options, prompt, made=()):
            if options.seed != 77:
                return self.plain(options, prompt, made)
            at = iter(self.tokens)

            def process(token, logits):
                wanted = next(at, END)
                return mx.where(mx.arange(logits.shape[-1]) == wanted, 100.0, -100.0)[None]

            return process

        batching.processor = processor
        tokenizer = self.server.engine.base.tokenizer
        self.tokens = [*tokenizer.encode(bytes(self.tokens[:-1]).decode()), END]
        return {"seed": 77}

    def __exit__(self, *_):
        self.module.processor = self.plain


def test_reasoning_is_told_apart(folder, said, tmp_path):
    """Reasoning is recognized by the tags in mlx-lm's tokenizer. The opening tag may be in the
    prompt or in the response."""
    model = shutil.copytree(said.model, tmp_path / "ORG-Thinker")
    with serving(folder, model) as server:
        tokenizer = server.engine.base.tokenizer
        own = tokenizer.encode("<think>", add_special_tokens=False)
        end = tokenizer.encode("</think>", add_special_tokens=False)
        for name, value in {
            "_think_start": "<think>",
            "_think_end": "</think>",
            "_think_start_tokens": tuple(own),
            "_think_end_tokens": tuple(end),
        }.items():
            setattr(tokenizer, name, value)
        with speaking(server, "<think>hm, 2</think>\n\nTwo.") as body:
            closed = ask(server, **body)
            chunks = list(ask(server, stream=True, **body))
            # A format whose value is false is ignored.
            free = ask(server, extra={"structured_outputs": {"json_object": False}}, **body)
        opened = {"chat_template_kwargs": {"enable_thinking": "open"}}
        with speaking(server, "hm, 3</think>Three.") as body:
            other = ask(server, extra=opened, **body)
            plain = ask(server, **body)
            asks = ask(server, [{"role": "user", "content": "What is <think>?"}], **body)
    message = closed.choices[0].message
    assert (message.reasoning_content, message.content) == ("hm, 2", "Two.")
    assert free.choices[0].message.reasoning_content == "hm, 2"
    # Each byte is a token. The reasoning tokens are the last byte of the opening tag, the text and
    # the closing tag.
    assert closed.usage.completion_tokens_details.reasoning_tokens == 1 + 5 + 8
    assert other.usage.completion_tokens_details.reasoning_tokens == 5 + 8
    assert plain.usage.completion_tokens_details.reasoning_tokens == 0
    deltas = [chunk.choices[0].delta for chunk in chunks]
    for name, wanted in {"reasoning_content": "hm, 2", "content": "Two."}.items():
        assert "".join(getattr(x, name, None) or "" for x in deltas) == wanted
    message = other.choices[0].message
    assert (message.reasoning_content, message.content) == ("hm, 3", "Three.")
    for answer in (plain, asks):
        assert answer.choices[0].message.content == "hm, 3</think>Three."
        assert answer.choices[0].message.reasoning_content is None


def test_parts_of_a_text():
    tags = Tags(("<think>", "</think>"), ("<call>", "</call>"))
    text = "a<think>b <</think>\n\nc<call>d</call>e<call>f</call><calm>"
    wanted = [("content", "a"), ("reasoning", "b <"), ("content", "c"), ("call", "d")]
    wanted += [("content", "e"), ("call", "f"), ("content", "<calm>")]
    for step in range(1, len(text)):
        parts, found = Parts(tags), []
        for i in range(0, len(text), step):
            for kind, piece in parts.add(text[i : i + step], last=i + step >= len(text)):
                if found and found[-1][0] == kind != "call":
                    found[-1] = (kind, found[-1][1] + piece)
                else:
                    found.append((kind, piece))
        assert found == wanted, step
    endless = Parts(Tags(call=("[C]", "")))
    assert endless.add("x[C]one[C]two", last=True) == [
        ("content", "x"),
        ("call", "one"),
        ("call", "two"),
    ]
    cut = Parts(tags, reasoning=True)
    assert cut.add("still") == [("reasoning", "still")] and cut.add("", last=True) == []


def test_tools_that_cannot_be(server, folder, said, tmp_path):
    for more, says in [
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x' is not one of the"),
        ({"tool_choice": "any"}, "tool_choice"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "forces a tool call",
        ),
    ]:
        body = CHAT | {"tools": [WEATHER]} | more
        check(server.http.post("/v1/chat/completions", json=body), 400, says)
    form = {"response_format": {"type": "json_object"}}
    body = CHAT | {"tools": [STRICT]} | form
    check(server.http.post("/v1/chat/completions", json=body), 400, "strict cannot be combined")
    odd = {"type": "function", "function": {"name": "f"}, "cache": 1}
    check(server.http.post("/v1/chat/completions", json=CHAT | {"tools": [odd]}), 400, "cache")
    turn = {"role": "assistant", "content": None}
    turn["tool_calls"] = [{"id": "1", "type": "function"}]
    turn["tool_calls"][0]["function"] = {"name": "f", "arguments": "{"}
    for text in ("{", "[" * 100_000):
        turn["tool_calls"][0]["function"]["arguments"] = text
        body = CHAT | {"messages": [*HELLO, turn]}
        check(server.http.post(CHATS, json=body), 400, "arguments is not valid JSON")
    deep = {"type": "function", "function": {"name": "f", "parameters": {"a": "DEEP"}}}
    text, header = json.dumps(CHAT | {"tools": [deep]}), {"content-type": "application/json"}
    for n in range(900, 1000, 3):  # some of these can be parsed but not serialized
        body = text.replace('"DEEP"', '{"a":' * n + "1" + "}" * n)
        assert server.http.post(CHATS, content=body, headers=header).status_code < 500, n
    body = CHAT | {"structured_outputs": {"json": "[" * 50_000}}
    check(server.http.post(CHATS, json=body), 400, "json is not valid JSON")
    model = shutil.copytree(said.model, tmp_path / "ORG-Plain")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with serving(folder, model) as other:
        body = CHAT | {"tools": [WEATHER]}
        answer = other.http.post("/v1/chat/completions", json=body)
    check(answer, 400, "tools: the chat template of ORG-Plain does not support tools")


def test_what_was_asked_is_freed_before_the_answer():
    forms = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    body = ChatRequest.model_validate(CHAT | {"tools": [WEATHER]} | forms)
    body.let_go()
    assert not body.messages and body.tools is None and not body.is_formed


# Log probabilities, several answers


def test_logprobs_of_chats(server, said):
    answer = ask(server, n=6, logprobs=True, top_logprobs=3, **NEVER_ENDS)
    content = answer.choices[0].logprobs.content
    tokens = said.tokens(chat_tokens(said), None, 6, goes_on=True)
    texts = [said.tokenizer.decode([token]) for token in tokens]
    assert [own.bytes for own in content] == [list(text.encode()) for text in texts]
    assert "".join(own.token for own in content) == answer.choices[0].message.content
    logits = said.models[None](mx.array([[*chat_tokens(said), *tokens]]))[0, -7:-1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for i, own in enumerate(content):
        assert abs(own.logprob - logprobs[i, tokens[i]].item()) < 1e-3
        assert len(own.top_logprobs) == 3
        assert own.top_logprobs[0].logprob == max(x.logprob for x in own.top_logprobs)
    chunks = ask(server, n=6, logprobs=True, stream=True, **NEVER_ENDS)
    told = [x for c in chunks if c.choices[0].logprobs for x in c.choices[0].logprobs.content]
    assert [x.token for x in told] == [x.token for x in content] and not told[0].top_logprobs
    assert ask(server, n=2).choices[0].logprobs is None


def test_logprobs_of_completions(server):
    how = {"model": "default", "prompt": "The adapter", "max_tokens": 5, "logprobs": 2}
    own = server.client.completions.create(**how).choices[0]
    told = own.logprobs
    assert "".join(told.tokens) == own.text and told.text_offset == list(range(len(told.tokens)))
    assert all(len(top) == 2 for top in told.top_logprobs)
    tops = [max(top.values()) for top in told.top_logprobs]
    assert tops == told.token_logprobs  # greedy decoding
    chunks = list(server.client.completions.create(**how, stream=True))
    parts = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert [x for part in parts for x in part.text_offset] == told.text_offset


def test_logprobs_of_characters_of_several_tokens(server):
    """Offsets are in characters, and partial characters are shown as bytes."""
    how = {"model": "default", "prompt": "x", "max_tokens": 9, "logprobs": 20, "temperature": 0}
    how["extra_body"] = {"structured_outputs": {"regex": "é€x"}}
    own = server.client.completions.create(**how).choices[0]
    assert own.text == "é€x"
    told = own.logprobs
    assert told.tokens[:6] == [r"\xc3", r"\xa9", r"\xe2", r"\x82", r"\xac", "x"]
    assert told.text_offset[:6] == [0, 0, 1, 1, 1, 2]
    assert all(len(top) == 20 for top in told.top_logprobs)
    chunks = list(server.client.completions.create(**how, stream=True))
    parts = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert [x for part in parts for x in part.text_offset] == told.text_offset


def test_bytes_of_tokens():
    """In vocabularies such as GPT-2's, letters represent bytes. In SentencePiece vocabularies,
    letters represent themselves, and only tokens such as <0x0A> represent bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    def bytes_of(words, decoder):
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
        tokenizer.decoder = decoder
        tokenizer.add_special_tokens([AddedToken("<｜é▁x｜>", special=True)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        return [token_bytes(fast, i) for i in range(len(words) + 1)]

    words = ["é", "▁né", "<0xE2>", "Ġa"]
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    found = bytes_of(words, decoders.Sequence(pieces))
    assert found == ["é".encode(), " né".encode(), b"\xe2", "Ġa".encode(), "<｜é▁x｜>".encode()]
    found = bytes_of(words, decoders.ByteLevel())
    assert found[0] == b"\xe9" and found[2:] == [b"<0xE2>", b" a", "<｜é▁x｜>".encode()]
    assert [shown(x) for x in (b"a", b"\xe2\x82")] == ["a", r"\xe2\x82"]


def test_logprobs_that_are_too_many(server):
    how = {"n": 16, "max_tokens": 15_000, "logprobs": True, "top_logprobs": 20}
    check(server.http.post(CHATS, json=CHAT | how), 400, "logprobs: 16 x 15000 tokens with 20")


def test_cached_tokens_are_those_of_the_prompt(server):
    async def main():
        body = ChatRequest.model_validate(CHAT | {"n": 4})
        engine = server.engine
        for _ in range(2):  # the second time, the prompt is cached
            own = await answers.Answers.begin(engine, engine.select("none"), body, "-")
            async for _ in own.deltas():
                pass
        return own

    own = asyncio.run(main())
    assert 0 < own.cached < own.prompt_tokens


def test_several_answers(server):
    """With a seed, the responses to one request are reproducible but differ from each other."""
    how = {"n": 12, "temperature": 1.0, "seed": 4, **NEVER_ENDS}
    body = CHAT | how | {"n": 3, "max_tokens": 12}
    first, again = (
        [c["message"]["content"] for c in server.http.post(CHATS, json=body).json()["choices"]]
        for _ in range(2)
    )
    assert first == again and len(set(first)) == 3
    answer = server.http.post(CHATS, json=body).json()
    assert answer["usage"]["completion_tokens"] == 36
    texts = {}
    with server.http.stream("POST", CHATS, json=body | {"stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for own in json.loads(line[6:])["choices"]:
                    texts.setdefault(own["index"], []).append(own["delta"].get("content") or "")
    assert ["".join(texts[i]) for i in range(3)] == first


CHATS = "/v1/chat/completions"


def test_several_answers_that_nobody_wants_end(server):
    body = CHAT | NEVER_ENDS | {"n": 4, "max_tokens": 15_000}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(CHATS, json=body, timeout=0.7)
    server.idle()


def test_deterministic(server):
    body = CHAT | {"deterministic": True, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    answers = [server.http.post(CHATS, json=body).json()["choices"] for _ in range(2)]
    assert answers[0] == answers[1]


# /v1/responses


def test_a_response(server, said):
    answer = server.client.responses.create(
        model="ORG-Model", input="Hello, who are you?", max_output_tokens=16
    )
    wanted = said(chat_tokens(said), None, 16)
    assert answer.output_text == wanted and answer.object == "response"
    made = said.tokens(chat_tokens(said), None, 16)
    assert answer.usage.output_tokens == len(made)
    assert answer.status == ("completed" if made[-1] == END else "incomplete")
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello, who are you?"}]},
    ]
    answer = server.client.responses.create(
        model="a", input=turns, max_output_tokens=16, instructions="Be brief."
    )
    prompt = chat_tokens(said, [{"role": "system", "content": "Be brief."}, *HELLO])
    assert answer.output_text == said(prompt, "a", 16)


def test_a_response_that_is_streamed(server):
    schema = {"type": "string", "minLength": 4, "maxLength": 20}
    form = {"format": {"type": "json_schema", "name": "word", "schema": schema}}
    how = {"model": "ORG-Model", "input": "Hello, who are you?", "text": form}
    whole = server.client.responses.create(**how)
    with server.client.responses.stream(**how) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added"),
    ]
    text = "".join(x.delta for x in events if x.type == "response.output_text.delta")
    assert text == whole.output_text
    assert [x.sequence_number for x in events] == sorted({x.sequence_number for x in events})


def test_a_response_of_a_form_and_with_tools(server):
    parsed = server.client.responses.parse(model="ORG-Model", input="Who?", text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    tool = {"type": "function", **WEATHER["function"]}
    how = {"model": "ORG-Model", "tools": [tool], "tool_choice": "required"}
    answer = server.client.responses.create(input="The weather?", parallel_tool_calls=False, **how)
    (call,) = answer.output
    assert call.type == "function_call" and set(json.loads(call.arguments)) == {"place", "days"}
    events = list(server.client.responses.create(input="The weather?", stream=True, **how))
    done = [x for x in events if x.type == "response.function_call_arguments.done"]
    assert done and set(json.loads(done[0].arguments)) == {"place", "days"}
    turns = [
        {"role": "user", "content": "The weather?"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    answer = server.client.responses.create(
        model="ORG-Model", input=turns, tools=[tool], max_output_tokens=4
    )
    assert answer.usage.output_tokens == 4 or answer.status == "completed"
    known = [turns[0], turns[2]]
    shorter = {"type": "message", "role": "user", "content": "sunny"}
    other = server.client.responses.create(
        model="ORG-Model", input=[known[0], shorter], tools=[tool], max_output_tokens=4
    )
    assert answer.usage.input_tokens > other.usage.input_tokens  # the prompt includes the call


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input.0: a message must have a role and content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "accepts only text"),
        (
            {"previous_response_id": "x"},
            "previous_response_id: this server does not support this field",
        ),
        ({"metadata": "x"}, "metadata"),
        ({"store": True}, "store: this server does not support this field"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: only tools of type function"),
        ({"temperature": 11}, "temperature"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema is missing"),
        ({"adapter": "nobody"}, "'nobody' is not mounted"),
    ],
    ids=str,
)
def test_responses_that_cannot_be(server, change, says):
    body = {"input": "Hello", "max_output_tokens": 1} | change
    check(server.http.post("/v1/responses", json=body), 400, says)


def test_metadata_and_reasoning_of_responses(server):
    turn = {"role": "user", "content": "Hello, who are you?"}
    thought = {"type": "reasoning_text", "text": "hm"}
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [thought]}
    how = {"model": "ORG-Model", "max_output_tokens": 8, "metadata": {"a": "b"}}
    plain = server.client.responses.create(input=[turn], **how)
    again = server.client.responses.create(input=[reasoning, turn], **how)
    assert again.metadata == {"a": "b"} and again.output_text == plain.output_text
    assert again.usage.input_tokens == plain.usage.input_tokens
