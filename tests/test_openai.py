"""Tests the /v1 routes over a socket with OpenAI's official client."""

import asyncio
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import mlx.core as mx
import openai
import psutil
import pytest

from lib.engines import END, Alone, write_adapters, write_lively
from lib.openai_server import CHAT, HELLO, NEVER_ENDS, chat_tokens, check, serving
from mlx_segtrain.generation import batching
from mlx_segtrain.serving.api.openai_forms import ChatRequest, CompletionRequest
from mlx_segtrain.serving.generation import engine as module

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("openai")


@pytest.fixture(scope="module")
def said(folder):
    model = write_lively(folder / "ORG-Model")
    return Alone(model, write_adapters(folder, model))


@pytest.fixture(scope="module")
def server(folder, said):
    with serving(folder, said.model) as server:
        server.mount("a", "b", "c", "dora", "ab")
        yield server


def ask(server, adapter=None, n=16, messages=HELLO, **more):
    extra = {"adapter": adapter} if adapter is not None else {}
    return server.client.chat.completions.create(
        model="ORG-Model", messages=messages, max_tokens=n, extra_body=extra, **more
    )


def test_chat(server, said):
    tokens = chat_tokens(said)
    for adapter in (None, "none", "", "a", "b", "dora"):
        answer = ask(server, adapter)
        name = adapter if adapter not in (None, "none", "") else None
        made = said.tokens(tokens, name, 16)
        assert answer.choices[0].message.content == said(tokens, name, 16)
        assert answer.choices[0].finish_reason == ("stop" if made[-1] == END else "length")
        assert answer.model == "ORG-Model" and answer.adapter == name
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokens), len(made))
        assert usage.total_tokens == len(tokens) + len(made)
    # If the server has no access token, anyone may be a client. Therefore, the usage omits the
    # number of cached tokens, which would reveal other clients' prompts. tests/hostile tests a
    # server with a token.
    assert ask(server, "b").usage.prompt_tokens_details is None


def test_stream(server, said):
    wanted = said(chat_tokens(said), "a", 30)
    chunks = list(ask(server, "a", 30, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content or "" for c in chunks[:-1]]
    assert "".join(texts) == wanted and sum(map(bool, texts)) > 20
    finishes = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert set(finishes[:-1]) == {None} and finishes[-1] in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 30
    assert all(c.usage is None for c in chunks[:-1])
    assert {c.id for c in chunks} == {chunks[0].id} and chunks[0].adapter == "a"


def test_stream_as_it_is_on_the_wire(server):
    body = {"messages": HELLO, "stream": True, "max_tokens": 2}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and "\r" not in answer.text
    assert all("usage" not in json.loads(e.removeprefix("data: ")) for e in events[:-2])


def test_completions(server, said):
    text = "The adapter says"
    tokens = said.tokenizer.encode(text)
    wanted = said(tokens, "b", 16)
    for prompt in (text, [text], tokens, [tokens]):
        answer = server.client.completions.create(
            model="default", prompt=prompt, extra_body={"adapter": "b"}
        )
        assert answer.choices[0].text == wanted and answer.object == "text_completion"
    stream = server.client.completions.create(
        model="default", prompt=text, stream=True, extra_body={"adapter": "b"}
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted


def test_messages_of_every_form(server, said):
    turns = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Again", "name": "me"},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Again"},
    ]
    answer = ask(server, messages=turns, user="me", store=False, metadata={"x": "y"})
    assert answer.choices[0].message.content == said(chat_tokens(said, plain), None, 16)


def test_a_stack_equals_the_merged_adapter(server, said):
    texts = {ask(server, name, 24).choices[0].message.content for name in ("a+b", "a,b", "ab")}
    assert texts == {said(chat_tokens(said), "ab", 24)}
    assert ask(server, "a,b").adapter == "a+b"


def test_the_adapter_as_model(server, said):
    for model, adapter in (("a", None), ("a", "a")):
        answer = server.client.chat.completions.create(
            model=model,
            messages=HELLO,
            max_tokens=16,
            extra_body={} if adapter is None else {"adapter": adapter},
        )
        assert answer.choices[0].message.content == said(chat_tokens(said), "a", 16)
        assert answer.model == "a"


def test_names_of_the_model(server, said):
    for model in ("ORG-Model", "org-model", "default", str(said.model), None):
        body = {"messages": HELLO, "max_tokens": 1, "model": model}
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_models(server):
    models = {model.id: model for model in server.client.models.list()}
    assert list(models) == ["ORG-Model", "a", "b", "c", "dora", "ab"]
    assert models["ORG-Model"].parent is None and models["a"].parent == "ORG-Model"
    assert server.client.models.retrieve("a").id == "a"
    assert server.client.models.retrieve("default").id == "ORG-Model"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("ORG/other")


#: Request fields that other servers support. The values in NEUTRAL have no effect on those servers,
#: so our server accepts them. Our server refuses the values in REFUSED.
NEUTRAL = {
    "OpenAI": {
        **{"user": "me", "metadata": {"a": "b"}, "safety_identifier": "me", "store": False},
        **{"prompt_cache_key": "k", "prompt_cache_retention": "24h", "service_tier": "auto"},
        **{"n": 1, "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}},
        **{"modalities": ["text"], "tools": [], "tool_choice": "auto", "function_call": "none"},
        **{"functions": [], "parallel_tool_calls": True, "verbosity": "medium"},
        **{"echo": False, "suffix": "", "best_of": 1, "stream_options": {"include_usage": True}},
        **dict.fromkeys(("audio", "prediction", "web_search_options", "reasoning_effort")),
        **dict.fromkeys(("moderation", "prompt_cache_options")),
    },
    "vLLM": {
        **{"min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "length_penalty": 1.0},
        **{"skip_special_tokens": True, "spaces_between_special_tokens": True, "bad_words": []},
        **{"include_stop_str_in_output": False, "use_beam_search": False, "watermarking": False},
        **{"add_generation_prompt": True, "continue_final_message": False, "priority": 0},
        **{"include_reasoning": True, "return_token_ids": False, "return_mm_kwargs": True},
        **{"return_tokens_as_token_ids": False, "return_token_offsets": False, "documents": []},
        **{"return_prompt_text": False, "routed_experts_prompt_start": 0, "stream_interval": 1},
        **{"chat_template_kwargs": {}, "logits_processors": [], "top_k": -1},
    },
    "SGLang": {
        **{"no_stop_trim": False, "separate_reasoning": False, "stream_reasoning": True},
        **{
            "return_hidden_states": False,
            "return_routed_experts": False,
            "use_audio_in_video": False,
        },
        **{"routed_experts_start_len": 0, "return_cached_tokens_details": False},
        **{
            "return_prompt_token_ids": False,
            "return_meta_info": False,
            "custom_labels": {"a": "b"},
        },
    },
    "mlx_lm.server": {
        **{"xtc_probability": 0.0, "xtc_threshold": 0.1, "draft_model": "default_model"},
        **{"role_mapping": {}, "top_logprobs": -1},
    },
}
REFUSED = {
    "OpenAI": {
        **{"store": True, "service_tier": "flex", "verbosity": "low"},
        **{"functions": [{"name": "f"}], "function_call": {"name": "f"}, "modalities": ["audio"]},
        **{"audio": {"voice": "x"}, "best_of": 2},
        **{"prediction": {"type": "content", "content": "x"}, "web_search_options": {}},
        **{"reasoning_effort": "low", "moderation": "x", "prompt_cache_options": {"x": 1}},
        **{"echo": True, "suffix": "x"},
    },
    "vLLM": {
        **{"guided_json": {}, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "a"},
        **{"min_tokens": 2, "ignore_eos": True},
        **{"stop_token_ids": [5], "include_stop_str_in_output": True, "bad_words": ["x"]},
        **{"skip_special_tokens": False, "spaces_between_special_tokens": False},
        **{"add_generation_prompt": False, "continue_final_message": True, "priority": 1},
        **{"truncate_prompt_tokens": 5, "truncation_side": "left", "prompt_logprobs": 0},
        **{"allowed_token_ids": [5], "logprob_token_ids": [5], "use_beam_search": True},
        **{"length_penalty": 2, "documents": [{"text": "x"}], "chat_template": "x"},
        **{"mm_processor_kwargs": {}},
        **{"media_io_kwargs": {}, "request_id": "x", "session_id": "x", "cache_salt": "x"},
        **{"kv_transfer_params": {}, "ec_transfer_params": {}, "vllm_xargs": {"x": 1}},
        **{"repetition_detection": {}, "thinking_token_budget": 5, "include_reasoning": False},
        **{"return_token_ids": True, "return_tokens_as_token_ids": True, "prompt_embeds": "x"},
        **{"return_prompt_text": True, "stream_interval": 4, "watermarking": True},
        **{"logits_processors": ["x"], "return_token_offsets": True, "return_mm_kwargs": False},
        **{"routed_experts_prompt_start": 1},
    },
    "SGLang": {
        **{"regex": "a", "ebnf": "a", "json_schema": "{}", "stop_regex": "a", "no_stop_trim": True},
        **{"separate_reasoning": True, "stream_reasoning": False, "return_hidden_states": "last"},
        **{"session_params": {}, "custom_params": {}, "custom_logit_processor": "x", "task": "x"},
        **{"images_config": {}, "max_dynamic_patch": 1, "min_dynamic_patch": 1, "rid": "x"},
        **{"use_audio_in_video": True, "input_ids": [5], "extra_key": "x", "reasoning": {}},
        **{"ngram_corpus_id": "x", "bootstrap_host": "x", "bootstrap_port": 1, "bootstrap_room": 1},
        **{"routed_dp_rank": 0, "disagg_prefill_dp_rank": 0, "data_parallel_rank": 0},
        **{"return_cached_tokens_details": True, "return_routed_experts": True},
        **{"routed_experts_start_len": 1, "return_prompt_token_ids": True},
        **{"return_meta_info": True},
    },
    "mlx_lm.server": {
        **{"xtc_probability": 0.5, "draft_model": "x", "num_draft_tokens": 3},
        **{"role_mapping": {"bos": "x"}, "repetition_context_size": 20},
        **{"presence_context_size": 20, "frequency_context_size": 20},
    },
    "others": {"grammar": "root ::= x", "lora": [{"id": 0}], "think": False, "options": {}}
    | {"keep_alive": 5, "max_new_tokens": 5, "Temperature": 0, "top_a": 0.5},
}


def test_every_field_of_openai_s_client_is_known():
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chats

    own = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    for params in (chats.CompletionCreateParamsStreaming, completions.CompletionCreateParamsBase):
        assert set(params.__annotations__) <= own | set(NEUTRAL["OpenAI"])


def test_template_variables_are_of_chats(server):
    variables = {"chat_template_kwargs": {"enable_thinking": False}}
    assert server.http.post("/v1/chat/completions", json=CHAT | variables).status_code == 200
    answer = server.http.post("/v1/completions", json={"prompt": "x", **variables})
    assert answer.status_code == 400 and "chat_template_kwargs" in answer.text
    for wrong in ({"chat_template": "x"}, {"tokenize": True}, {"not a name": 1}, [1]):
        body = CHAT | {"chat_template_kwargs": wrong}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and "chat_template_kwargs" in answer.text


@pytest.mark.parametrize("source", NEUTRAL)
def test_fields_that_change_nothing_are_taken(server, source):
    fields = NEUTRAL[source]
    body = CHAT | fields
    # A null value is the same as an absent field.
    body |= dict.fromkeys(REFUSED[source].keys() - fields.keys())
    answer = server.http.post("/v1/chat/completions", json=body | {"add_special_tokens": False})
    assert answer.status_code == 200, answer.text
    body = {key: value for key, value in body.items() if key != "messages"} | {"prompt": "x"}
    answer = server.http.post("/v1/completions", json=body | {"add_special_tokens": True})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("name", "value"), [pair for fields in REFUSED.values() for pair in fields.items()], ids=str
)
def test_fields_that_would_have_no_effect_are_refused_by_name(server, name, value):
    for path, body in (("chat/completions", CHAT), ("completions", {"prompt": "x"})):
        answer = server.http.post(f"/v1/{path}", json=body | {name: value})
        error = check(answer, 400, f"{name}: this server does not support this field")
        assert "leave it out" in error["message"]


def test_fields_within_fields_are_refused_too(server):
    hello = HELLO[0]
    part = {"type": "text", "text": "Hello"}
    for change, name in [
        ({"messages": [hello | {"prefix": True}]}, "messages.0.prefix"),
        ({"messages": [hello | {"reasoning_content": "x"}]}, "messages.0.reasoning_content"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"messages": [hello | {"content": [part | {"x": 1}]}]}, "messages.0.content.0.x"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"temprature": 1}, "Did you mean temperature?"),
    ]:
        check(server.http.post("/v1/chat/completions", json=CHAT | change), 400, name)
    answer = server.http.post("/v1/adapters", json={"id": "a", "path": "a", "scale": 2})
    check(answer, 400, "unknown field scale")
    own = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None}
    # This message has all fields of a message in OpenAI's responses.
    turn = {"role": "assistant", "content": "Hi", "annotations": [], **own}
    cached = {"role": "user", "content": [part | {"cache_control": {"type": "ephemeral"}}]}
    answer = ask(server, messages=[hello, turn, cached])
    assert answer.choices[0].message.content


def test_other_spellings_of_an_adapter(server, said, folder):
    wanted = said(chat_tokens(said), "a", 16)
    body = CHAT | {"max_tokens": 16}
    for more in [
        *({"adapters": "a"}, {"lora_path": "a"}, {"adapters": str(folder / "a")}),
        *({"lora_path": f"{folder}/b/../a"}, {"adapter": "a", "adapters": "a", "lora_path": "a"}),
        *({"model": "a", "lora_path": "a"}, {"adapters": "a", "max_completion_tokens": 16}),
    ]:
        answer = server.http.post("/v1/chat/completions", json=body | more).json()
        assert answer["adapter"] == "a", (more, answer)
        assert answer["choices"][0]["message"]["content"] == wanted
    (folder / "unmounted").mkdir(exist_ok=True)
    for more, status, says in [
        ({"adapters": "nobody"}, 400, "adapter 'nobody' is not mounted"),
        ({"adapters": str(folder / "unmounted")}, 400, "POST this path and an id to /v1/adapters"),
        ({"lora_path": "../../etc"}, 403, "is not below a directory"),
        ({"lora_path": ["a"]}, 400, "lora_path: input should be a valid string"),
        ({"adapter": "a", "lora_path": "b"}, 400, "adapter names the adapter 'a', but lora_path"),
        ({"model": "a", "adapters": "b"}, 400, "model names the adapter 'a', but adapters"),
    ]:
        check(server.http.post("/v1/chat/completions", json=body | more), status, says)


def test_faults_of_fields_that_may_be_several_things(server):
    turn = {"role": "user"}
    for change, says in [
        ({"stop": 5}, "stop: input should be a valid string or a valid list."),
        ({"stop": [""]}, "stop.0: string should have at least 1 character."),
        ({"stop": ["a", 5]}, "stop.1: input should be a valid string."),
        ({"messages": [turn | {"content": 5}]}, "messages.0.content: input should be a valid s"),
        (
            {"messages": [turn | {"content": [{"type": "text", "text": 5}]}]},
            "messages.0.content.0.text: input should be a valid string.",
        ),
        ({"messages": [turn | {"content": [{}]}]}, "messages.0.content.0.type is missing."),
        ({"messages": [{"content": "x"}]}, "messages.0.role is missing."),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ]:
        error = check(server.http.post("/v1/chat/completions", json=CHAT | change), 400, says)
        assert error["message"].startswith(says[:6])
        assert not any(word in error["message"] for word in ("constrained", "list[", "[key]"))
    for prompt in (5, {}, [1.5], ["a", 1], [[1], "a"]):
        error = check(server.http.post("/v1/completions", json={"prompt": prompt}), 400, "prompt")
        assert "input should be" in error["message"] and "list[" not in error["message"]


def test_text_that_is_none(server):
    post, kind = server.http.post, {"content-type": "application/json"}
    for path, body, says in [
        ("chat/completions", CHAT | {"messages": [HELLO[0] | {"content": "\ud83c"}]}, "messages.0"),
        ("chat/completions", CHAT | {"stop": ["\udfff"]}, "stop.0 has half of a character"),
        ("chat/completions", CHAT | {"\udc00": 1}, "contains a key that has half of a character"),
        ("completions", {"prompt": "a\ud800b"}, "prompt has half of a character"),
        ("adapters", {"id": "\ud800", "path": "a"}, "id has half of a character"),
    ]:
        error = check(post(f"/v1/{path}", content=json.dumps(body), headers=kind), 400, says)
        assert "template" not in error["message"]
    body = b'{"prompt": "caf\xe9"}'
    check(post("/v1/completions", content=body, headers=kind), 400, "the body is not valid UTF-8")
    body = json.dumps({"prompt": "\U0001f389"})  # a surrogate pair is one character
    assert "\\ud83c" in body
    assert post("/v1/completions", content=body, headers=kind).status_code == 200


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
BAD_CHATS = [
    ({"adapter": "nobody"}, "adapter 'nobody' is not mounted"),
    ({"adapter": "a+dora"}, "'dora' is a DoRA adapter"),
    ({"model": "a", "adapter": "b"}, "model names the adapter 'a', but adapter is 'b'"),
    ({"tools": [{"type": "function"}]}, "tools.0.function is missing"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tool_choice": "required"}, "tool_choice: this value requires tools"),
    ({"functions": [{"name": "f"}]}, "functions: "),
    ({"response_format": {"type": "json_schema"}}, "json_schema.schema is missing"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex cannot be used"),
    ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs.grammar cannot be used"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json is not valid JSON"),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "regex and structured_outputs.choice both",
    ),
    ({"n": 0}, "n: "),
    ({"n": 17}, "n: "),
    ({"logprobs": 0}, "logprobs: "),
    ({"top_logprobs": 3}, "top_logprobs requires logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
    ({"messages": IMAGE}, "messages.0.content: the model accepts only text, not 'image_url'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content is missing"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [HELLO[0] | {"tool_calls": [1]}]}, "messages.0.tool_calls"),
    (
        {"messages": [HELLO[0] | {"tool_call_id": "1"}]},
        "messages.0.tool_call_id is only allowed in tool messages",
    ),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": list("abcde")}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"999": 1}}, "logit_bias: 999 is not a token"),
    ({"seed": 2**70}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"messages": [{"role": "user", "content": "x" * 20_001}]}, "is 20000"),
]


@pytest.mark.parametrize(("change", "says"), BAD_CHATS, ids=str)
def test_bad_chats(server, change, says):
    check(server.http.post("/v1/chat/completions", json=CHAT | change), 400, says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ["a"] * 65}, "prompt: a request can ask for at most 64 answers"),
        ({"prompt": ["a", "b"], "n": 33}, "n: "),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: "),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [5, 300]}, "prompt: 300 is not a token"),
        ({"prompt": [-1]}, "prompt: -1 is not a token"),
        ({"prompt": {}}, "prompt"),
        ({"echo": True}, "echo: "),
        ({"suffix": "x"}, "suffix: "),
        ({"best_of": 2}, "best_of: "),
        ({"logprobs": 21}, "logprobs: "),
        ({"logprobs": True}, "logprobs: "),
    ],
    ids=str,
)
def test_bad_completions(server, change, says):
    check(server.http.post("/v1/completions", json={"prompt": "x"} | change), 400, says)


def test_bodies_that_are_none(server):
    for body in (b"", b"{", b"[]", b"null", b'"x"', b"\xff"):
        answer = server.http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        check(answer, 400, "")


def test_a_model_that_is_not_served(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found" and "'gpt-4'" in str(caught.value)


def test_templates(folder, said, tmp_path):
    model = shutil.copytree(said.model, tmp_path / "ORG-Model")
    template = model / "chat_template.jinja"
    template.write_text("{{ raise_exception('first the user, please') }}")
    with serving(folder, model) as server:
        answer = server.http.post("/v1/chat/completions", json=CHAT)
        template.unlink()
        asyncio.run(server.engine.load(model))
        without = server.http.post("/v1/chat/completions", json=CHAT)
    check(answer, 400, "the chat template of ORG-Model failed: first the user, please")
    check(without, 400, "/v1/completions")


# Adapters


def test_adapter_routes(folder, said, tmp_path):
    with serving(folder, said.model) as server:
        http = server.http
        assert http.get("/v1/adapters").json() == {"adapters": []}
        answer = http.post("/v1/adapters", json={"id": "a", "path": "a"})
        mounted = server.engine.adapters["a"]
        n = mounted.mounted_layers
        assert answer.json() == {"id": "a", "mounted_layers": n, "rank": 2, "scale": 1.0}
        # If the id is already in use, the adapter that is mounted under it remains mounted.
        assert http.post("/v1/adapters", json={"id": "a", "path": "b"}).json() == answer.json()
        (row,) = http.get("/v1/adapters").json()["adapters"]
        assert row == {
            **answer.json(),
            "path": str(folder / "a"),
            "size_bytes": mounted.size_bytes,
        }
        (row,) = http.get("/v1/adapters/available").json()["adapters"]
        assert row["id"] == "a" and row["scale"] is None
        shutil.copytree(folder / "a", folder / "broken")
        (folder / "broken" / "adapters.safetensors").write_bytes(b"")
        for body, status, says in [
            ({"id": "x", "path": "nowhere"}, 400, "is not a folder"),
            ({"id": "x", "path": "broken"}, 400, "adapters.safetensors"),
            ({"id": "x", "path": "../../etc"}, 403, "is not below a directory"),
            ({"id": "a+b", "path": "a"}, 400, "is not a valid adapter id"),
            ({"id": "Default", "path": "a"}, 400, "is a name of the base model"),
            ({"id": "org-model", "path": "a"}, 400, "is a name of the base model"),
            ({"id": "x"}, 400, "path"),
            ({"id": 1, "path": "a"}, 400, "id"),
        ]:
            check(http.post("/v1/adapters", json=body), status, says)
        assert list(server.engine.adapters) == ["a"]
        assert http.delete("/v1/adapters/a").json() == {"id": "a", "removed_layers": n}
        check(http.delete("/v1/adapters/a"), 404, "adapter a is not mounted")
        check(http.delete("/v1/adapters/a%2Fb"), 404, "adapter a/b is not mounted")


def test_remounting_under_the_same_id(folder, said):
    """Cached prompts belong to an adapter's weights, not to its id."""
    with serving(folder, said.model) as server:
        for name in ("a", "b", "a"):
            server.http.post("/v1/adapters", json={"id": "x", "path": name})
            for _ in range(2):
                content = ask(server, "x").choices[0].message.content
                assert content == said(chat_tokens(said), name, 16)
            server.http.delete("/v1/adapters/x")


def test_files_that_have_changed_are_read_again(folder, said):
    """An adapter that was trained again can be mounted with the same request. No cached prompt of
    the old weights is used."""
    out = folder / "trained"
    with serving(folder, said.model) as server:
        server.engine.default = "x"
        for name in ("a", "b", "a"):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(folder / name, out)
            for _ in range(2):
                answer = server.http.post("/v1/adapters", json={"id": "x", "path": "trained"})
                assert answer.status_code == 200
                mounted = server.engine.adapters["x"]
                content = ask(server, "x").choices[0].message.content
                assert content == said(chat_tokens(said), name, 16)
                server.http.post("/v1/adapters", json={"id": "x", "path": "trained"})
                assert server.engine.adapters["x"] is mounted
        assert list(server.engine.adapters) == ["x"] and server.engine.default == "x"
    shutil.rmtree(out)


def test_the_server_chooses_an_id(folder, said):
    """Names that are reserved, taken or the base's are not used, and a mounted adapter keeps its
    id."""
    with serving(folder, said.model) as server:
        for name, id in (
            ("stack", "adapter-stack"),
            (f"in/{said.model.name}", None),
            ("in/a", "a-2"),
        ):
            out = folder / "named" / name
            shutil.copytree(folder / "b", out)
            server.http.post("/v1/adapters", json={"id": "a", "path": "a"})
            for _ in range(2):
                answer = server.http.post("/v1/adapters", json={"path": f"named/{name}"}).json()
                assert answer["id"] == (id or f"adapter-{said.model.name}")
            content = ask(server, answer["id"]).choices[0].message.content
            assert content == said(chat_tokens(said), "b", 16)
    shutil.rmtree(folder / "named")


def test_unmounting_under_a_stream(folder, said):
    with serving(folder, said.model) as server:
        server.mount("a")
        stream = ask(server, "a", 150, stream=True, **NEVER_ENDS)
        text = next(c.choices[0].delta.content for c in stream if c.choices[0].delta.content)
        assert server.http.delete("/v1/adapters/a").status_code == 200
        assert server.engine._active  # the response is not complete yet
        check(server.http.post("/v1/completions", json={"prompt": "x", "adapter": "a"}), 400, "a")
        text += "".join(c.choices[0].delta.content or "" for c in stream)
        assert text == said(chat_tokens(said), "a", 150, goes_on=True)


def test_swaps_under_load(server, said):
    """Eight clients send over 100 requests, each with one of three adapters or none. Every response
    must be correct."""
    names = ["a", "b", "c", None]
    prompts = [[{"role": "user", "content": f"Tell me about {x}"}] for x in ("you", "it")]
    jobs = [(name, i) for name in names for i in range(2)]
    wanted = {(n, i): said(chat_tokens(said, prompts[i]), n, 12) for n, i in jobs}
    assert len(set(wanted.values())) == 8

    def one(job):
        answer = ask(server, job[0] or "none", 12, prompts[job[1]])
        return job, answer.choices[0].message.content

    swaps = 0
    linears = server.engine._linears
    put_in = linears.put_in

    def counted(selected):
        nonlocal swaps
        swaps += selected.key != linears.key
        put_in(selected)

    def load(n):
        order = jobs * n
        random.Random(n).shuffle(order)
        with ThreadPoolExecutor(8) as pool:
            for job, text in pool.map(one, order):
                assert text == wanted[job], job
        active = server.call(lambda: (mx.clear_cache(), mx.get_active_memory())[1])
        active -= server.engine._prompts.nbytes  # the set of cached prompts depends on the order
        return active, psutil.Process().memory_info().rss

    linears.put_in = counted
    try:
        active, resident = load(4)
        # Memory may grow from time to time, but a leak grows under each load.
        for _ in range(4):
            before, (active, resident) = (active, resident), load(13)
            if active - before[0] < 1 << 20 and resident - before[1] < 16 << 20:
                break
        else:
            pytest.fail("the process grows under each load")
    finally:
        del linears.put_in
    assert swaps > 30  # adapters are swapped only for prompts that are not cached
    assert len(server.engine._prompts) <= module.MOST_PROMPTS
    server.idle()


def test_seeds_under_load(server):
    def one(seed):
        answer = ask(server, "a", 20, temperature=1.0, seed=seed)
        return answer.choices[0].message.content

    alone = [one(seed) for seed in range(6)]
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, range(6))) == alone


def test_clients_that_go_free_their_place(server):
    """A request is cancelled when its client disconnects. Without cancellation, its response of
    15,000 tokens would take a minute."""
    stream = ask(server, "a", 15_000, stream=True, **NEVER_ENDS)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert server.engine._active
    stream.close()
    server.idle()
    body = CHAT | NEVER_ENDS | {"max_tokens": 15_000}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=body, timeout=0.5)
    server.idle()


def test_too_many_at_once(server, monkeypatch):
    monkeypatch.setattr(module, "MOST_ACTIVE", 1)
    monkeypatch.setattr(module, "MOST_WAITING", 0)
    answer = server.http.post("/v1/chat/completions", json=CHAT)
    assert check(answer, 429, "already waiting")["code"] == "busy"
    assert answer.headers["retry-after"] == "5"


def test_failures(server, monkeypatch):
    def processor(options, *_):
        raise RuntimeError("[malloc] Unable to allocate" if options.seed == 1 else "a bug")

    monkeypatch.setattr(batching, "processor", processor)
    answer = server.http.post("/v1/chat/completions", json=CHAT | {"seed": 1})
    check(answer, 503, "too little memory")
    check(server.http.post("/v1/chat/completions", json=CHAT), 500, "RuntimeError: a bug")
    with pytest.raises(openai.APIError, match="a bug"):  # after the status has been sent
        list(ask(server, stream=True))
    monkeypatch.undo()
    ask(server)


def test_no_model_and_a_job_that_trains(folder, said):
    with serving(folder, policy="refuse") as server:
        for path, body in [
            ("chat/completions", CHAT),
            ("completions", {"prompt": "x"}),
            ("adapters", {"id": "a", "path": "a"}),
        ]:
            error = check(server.http.post(f"/v1/{path}", json=body), 503, "no model is loaded")
            assert error["code"] == "no_model"
        assert server.http.get("/v1/models").json() == {"object": "list", "data": []}
        asyncio.run(server.engine.load(said.model))
        assert ask(server).choices
        server.trains = True
        answer = server.http.post("/v1/chat/completions", json=CHAT)
        check(answer, 503, "is waiting for a training job")
        assert answer.headers["retry-after"] == "30"
        assert server.http.get("/v1/models").json()["data"]


def test_the_document(server):
    paths = server.app.openapi()["paths"]
    routes = {(p, m) for p, methods in paths.items() for m in methods if p.startswith("/v1")}
    assert len(routes) == 9
    for path, method in routes:
        responses = paths[path][method]["responses"]
        assert "422" not in responses and "$ref" in str(responses["200"]), path
        for status, response in responses.items():
            if status != "200":
                assert response["content"]["application/json"]["schema"] == {
                    "$ref": "#/components/schemas/Error"
                }
    chat = paths["/v1/chat/completions"]["post"]["responses"]
    assert set(chat) == {"200", "400", "404", "413", "429", "500", "503", "4XX"}
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
