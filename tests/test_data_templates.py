"""Each response of a row is in the loss, whatever the chat template does."""

import json

import pytest

from lib.chat_templates import (
    ALWAYS_HEADER,
    CALLS,
    CHATML,
    NEXT_ROLE,
    NO_STOP,
    OPEN,
    PARTS,
    SHORT_IDS,
    SWITCHED,
    SYSTEM_LAST,
    TEXT_CALLS,
    TWO_STOPS,
)
from lib.chats import byte_level, chat, load, text, trained
from mlx_segtrain.data import Options, Prompting, inspect, load_dataset
from mlx_segtrain.data.dataset import remarks
from mlx_segtrain.data.sources import sources_of
from mlx_segtrain.errors import InputError

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def asks(content):
    return {"role": "user", "content": content}


def call(arguments, id="call_1234567890", **message):
    function = {"name": "weather", "arguments": arguments}
    return says(None, tool_calls=[{"id": id, "type": "function", "function": function}], **message)


def result(content, id="call_1234567890"):
    return {"role": "tool", "tool_call_id": id, "content": content}


def spans(data, tokenizer):
    return [span for row in data.rows for span in trained(row, tokenizer)]


def check_contexts(data, tokenizer, messages, **kwargs):
    """Checks that the context of each turn in the loss is the prompt used for generation."""
    prompts = [
        tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True, **kwargs
        )
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i
    ]
    whole = [text(row, tokenizer) for row in data.rows]
    for prompt in prompts:
        assert any(own.startswith(prompt) for own in whole), prompt


# 1. The context equals the prompt used for generation


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (OPEN, ["\n</think>\n\none<|im_end|>", "\n</think>\n\ntwo<|im_end|>"]),
        (SWITCHED, ["\n</think>\n\none<|im_end|>", "\n</think>\n\ntwo<|im_end|>"]),
        (NEXT_ROLE, ["</think>one<|user|>", "</think>two<|user|>"]),
        (SYSTEM_LAST, ["one</s>", "two</s>"]),
        (CHATML, ["one<|im_end|>", "two<|im_end|>"]),
        (ALWAYS_HEADER, ["one<|eot|>", "two<|eot|>"]),
        (TWO_STOPS, ["one<|im_end|>", "two<|im_end|>"]),
        (NO_STOP, ["one</s>", "two</s>"]),
        (PARTS, ["one<|im_end|>", "two<|im_end|>"]),
    ],
)
# The responses "e" and "d" also occur in <|im_end|>.
@pytest.mark.parametrize("answers_are", [("one", "two"), ("e", "d")])
def test_each_turn_follows_its_prompt_and_ends_with_one_stop_token(
    tmp_path, template, answers, answers_are
):
    tokenizer = byte_level(template, stops=("<|user|>", "<|tool|>"))
    one, two = answers_are
    answers = [own.replace("one", one).replace("two", two) for own in answers]
    messages = [{"role": "system", "content": "Be"}, *chat("a", one, "b", two)]
    on = {"enable_thinking": True}
    data = load(tmp_path, tokenizer, {"messages": messages}, chat_template_kwargs=on)
    assert spans(data, tokenizer) == answers
    assert not data.notes.findings and data.notes.turns == 2
    if template != PARTS:
        check_contexts(data, tokenizer, messages, **on)
    assert "Be" in text(data.rows[0], tokenizer)


def test_template_variables_of_the_run_and_of_a_row(tmp_path):
    tokenizer = byte_level(SWITCHED)
    rows = [
        {"messages": chat("a", "one")},
        {"messages": chat("a", "one"), "chat_template_kwargs": {"enable_thinking": True}},
    ]
    off = {"enable_thinking": False}
    data = load(tmp_path, tokenizer, *rows, chat_template_kwargs=off)
    assert spans(data, tokenizer) == ["one<|im_end|>", "\n</think>\n\none<|im_end|>"]
    assert text(data.rows[0], tokenizer).endswith("<think></think>one<|im_end|>\n")
    ids = Prompting("chat", off).ids(tokenizer, "a")
    assert data.rows[0].ids.tolist()[: len(ids)] == ids
    for bad in ({"tools": []}, {"chat_template": "x"}, {"not a name": 1}):
        with pytest.raises(InputError, match=r'train\.jsonl:1: "chat_template_kwargs": '):
            load(tmp_path, tokenizer, rows[0] | {"chat_template_kwargs": bad})


# 2. A response ends with a token that stops generation


def test_a_call_ends_with_the_header_of_its_result(tmp_path):
    tokenizer = byte_level(NEXT_ROLE, stops=("<|user|>", "<|tool|>"))
    messages = [asks("a"), call({"city": "Rome"}), result("rain"), says("It rains")]
    data = load(tmp_path, tokenizer, {"messages": messages})
    assert spans(data, tokenizer) == [
        "</think>[weather city=Rome]<|tool|>",
        "</think>It rains<|user|>",
    ]


def test_blanks_of_an_answer_stay_and_those_of_the_template_go(tmp_path):
    tokenizer = byte_level(NO_STOP)
    data = load(tmp_path, tokenizer, {"messages": chat("a", " one \n\n")})
    assert spans(data, tokenizer) == [" one \n\n</s>"]


def test_without_append_eos_a_turn_without_stop_is_reported(tmp_path):
    tokenizer = byte_level(NO_STOP)
    data = load(tmp_path, tokenizer, {"messages": chat("a", "one")}, append_eos=False)
    assert spans(data, tokenizer) == ["one\n"] and data.notes.findings == {"stop": 1}
    with pytest.raises(
        InputError, match=r"train\.jsonl: in 1 of 1 samples the turn does not end with a stop token"
    ):
        load(tmp_path, tokenizer, {"messages": chat("a", "one")}, append_eos=False, strict=True)


def test_a_text_that_ends_in_eos_and_blanks_is_ended_once(tmp_path):
    tokenizer = byte_level()
    rows = [{"text": "The sky</s>\n"}, {"prompt": "The", "completion": " sky<|im_end|> \n"}]
    assert spans(load(tmp_path, tokenizer, *rows), tokenizer) == ["The sky</s>", " sky<|im_end|>"]


def test_special_tokens_in_a_text_are_reported(tmp_path):
    tokenizer = byte_level()
    data = load(tmp_path, tokenizer, {"messages": chat("a", "It is <|im_end|>, or </s>.")})
    assert spans(data, tokenizer) == ["It is <|im_end|>, or </s>.<|im_end|>"]
    assert data.notes.findings == {"special": 1}


# 3. No text of the row is lost


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", None])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OPEN, "hm\n</think>\n\none<|im_end|>"),
        (NEXT_ROLE, "hm</think>one<|user|>"),
        (CHATML, "<think>\nhm\n</think>\n\none<|im_end|>"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.reasoning }}/{{ m.content }}"),
            "hm/one<|im_end|>",
        ),
    ],
)
def test_reasoning_is_trained_however_row_and_template_spell_it(tmp_path, key, template, expected):
    tokenizer = byte_level(template, stops=("<|user|>",))
    own = says("one", **{key: "hm"}) if key else says("<think>\nhm\n</think>\n\none")
    row = {"messages": [asks("a"), own, asks("b"), says("two")]}
    data = load(tmp_path, tokenizer, row, train_on="assistant")
    # This template also preserves tags in a message's content.
    if key is None and "m.reasoning }}" in template:
        expected = "/<think>\nhm\n</think>\n\none<|im_end|>"
    assert spans(data, tokenizer)[0] == expected
    assert "reasoning" not in data.notes.findings


def test_what_a_template_drops_is_reported_by_row(tmp_path):
    blind = (
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [asks("a"), call({"city": "Rome"}), result("rain"), says("It rains")]
    rows = [{"messages": chat("a", "one")}, {"messages": messages, "tools": TOOLS}]
    data = load(tmp_path, byte_level(blind), *rows)
    assert set(data.notes.findings) == {"call", "result", "tools"}
    assert data.notes.where["call"] == ["train.jsonl:2"]
    said = remarks(None, data, None)
    assert any("in 1 of 2 samples a tool result of the row is missing" in x for x in said)
    report = inspect(tmp_path / "train.jsonl", byte_level(blind), Options(strict=True))
    assert not report.ok and "turn strict off" in (report.error or "")
    assert report.findings["tools"] == ["train.jsonl:2"]
    assert [bool(preview.findings) for preview in report.previews] == [False, True]


def test_samples_and_tokens_are_counted(tmp_path):
    tokenizer = byte_level(OPEN)
    data = load(tmp_path, tokenizer, {"messages": chat("a", "one", "b", "two", "c", "three")})
    assert (data.n_rows, len(data.rows), data.notes.turns) == (1, 3, 3)
    assert data.summary.startswith("1 rows give 3 samples, ")
    assert f"{data.tokens} tokens to process, {data.supervised_tokens} of them" in data.summary


def test_a_developer_s_message_is_one_of_the_system_where_the_template_knows_no_other(tmp_path):
    template = CHATML.replace("in messages %}", "in messages if m.role != 'developer' %}", 1)
    messages = [{"role": "developer", "content": "Be kind"}, *chat("a", "one")]
    data = load(tmp_path, byte_level(template), {"messages": messages})
    assert text(data.rows[0], byte_level()).startswith("<|im_start|>system\nBe kind<|im_end|>\n")
    assert not data.notes.findings


# 4. Tool calls in OpenAI's form


@pytest.mark.parametrize("arguments", [{"city": "Rome", "days": 2}, '{"city":"Rome","days":2}'])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CALLS, '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'),
        (TEXT_CALLS, 'weather\n{"city": "Rome", "days": 2}'),
        (SHORT_IDS, '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'),
    ],
)
def test_arguments_are_spelled_as_the_template_wants_them(
    tmp_path, arguments, tools, template, expected
):
    tokenizer = byte_level(template)
    messages = [asks("a"), call(arguments), result("rain"), says("It rains")]
    data = load(tmp_path, tokenizer, {"messages": messages, "tools": tools})
    assert spans(data, tokenizer) == [
        f"<tool_call>{expected}</tool_call><|im_end|>",
        "It rains<|im_end|>",
    ]
    assert not data.notes.findings
    assert json.dumps(TOOLS) in text(data.rows[0], tokenizer)


def test_the_earlier_function_call_is_a_tool_call(tmp_path):
    tokenizer = byte_level(CALLS)
    messages = [
        asks("a"),
        says(None, function_call={"name": "weather", "arguments": '{"city": "Rome"}'}),
        {"role": "function", "name": "weather", "content": "rain"},
        says("It rains"),
    ]
    row = {"messages": messages, "functions": [TOOLS[0]["function"]]}
    data = load(tmp_path, tokenizer, row)
    expected = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>'
    assert spans(data, tokenizer) == [expected, "It rains<|im_end|>"]
    assert not data.notes.findings and json.dumps(TOOLS[0]["function"]) in text(
        data.rows[0], tokenizer
    )


def test_calls_that_are_none_are_refused(tmp_path):
    for calls in ("x", ["x"], [{"function": {"arguments": {}}}], [{"function": 1}]):
        row = {"messages": [asks("a"), says("", tool_calls=calls)]}
        with pytest.raises(InputError, match=r'train\.jsonl:1: "messages"\[1\]: .*call'):
            load(tmp_path, byte_level(CALLS), row)


# 5. Roles


def test_roles_by_other_names_and_unknown_ones(tmp_path):
    tokenizer = byte_level()
    for user, assistant in (("human", "gpt"), ("User", "Assistant"), ("user", "model")):
        row = {"messages": [{"role": user, "content": "a"}, {"role": assistant, "content": "one"}]}
        data = load(tmp_path, tokenizer, row)
        assert spans(data, tokenizer) == ["one<|im_end|>"]
        assert "<|im_start|>user\na" in text(data.rows[0], tokenizer)
    row = {"messages": [asks("a"), {"role": "asistant", "content": "one"}]}
    with pytest.raises(InputError, match=r"\"messages\"\[1\]: the role 'asistant' is not one of"):
        load(tmp_path, tokenizer, row)


def test_null_columns_of_tables_are_not_there(tmp_path):
    message = says("one", tool_calls=None, reasoning_content=None, name=None, weight=None)
    data = load(tmp_path, byte_level(CALLS), {"messages": [asks("a"), message], "tools": None})
    assert spans(data, byte_level(CALLS)) == ["one<|im_end|>"]


# 6. Plain prompts


PROMPT = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_plain_prompts_go_through_the_chat_template_by_default(tmp_path):
    tokenizer = byte_level(bos=False)
    rows = [
        {"prompt": "a", "completion": "one"},
        {"prompt": [asks("a")], "completion": [says("one")]},
        {"prompt": [asks("a")], "completion": "one"},
        {"messages": chat("a", "one")},
    ]
    data = load(tmp_path, tokenizer, *rows, prompt_format="auto")
    assert len({text(row, tokenizer) for row in data.rows}) == 1
    assert text(data.rows[0], tokenizer).startswith(PROMPT)
    assert spans(data, tokenizer) == ["one<|im_end|>"] * 4
    assert data.notes.prompt_format == "chat" and "chat template" in data.summary
    data = load(tmp_path, tokenizer, rows[0], prompt_format="raw")
    assert text(data.rows[0], tokenizer) == "aone</s>" and "raw" in data.summary
    data = load(tmp_path, byte_level(None), rows[0], prompt_format="auto")
    assert data.notes.prompt_format == "raw"
    with pytest.raises(InputError, match="prompt_format is chat, but the tokenizer has no chat"):
        load(tmp_path, byte_level(None), rows[0], prompt_format="chat")


def test_raw_prompts_need_a_row_without_messages(tmp_path):
    """Otherwise the adapter would be recorded as trained without the template."""
    tokenizer, options = byte_level(), Options(prompt_format="raw")
    rows = [{"messages": chat("a", "one")}, {"text": "a"}, {"prompt": "a", "completion": "one"}]
    path = tmp_path / "data.jsonl"
    for i in (1, 2):
        path.write_text(f"{json.dumps(rows[0])}\n{json.dumps(rows[i])}")
        assert load_dataset(path, tokenizer, options)[0].n_rows == 2
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(InputError, match="prompt_format raw has no effect on the rows of data"):
        load_dataset(path, tokenizer, options)
    assert "prompt_format raw has no effect" in str(inspect(path, tokenizer, options).error)


def test_system_beside_a_prompt(tmp_path):
    tokenizer = byte_level()
    row = {"prompt": "a", "completion": "one", "system": "Be"}
    data = load(tmp_path, tokenizer, row, prompt_format="chat")
    assert text(data.rows[0], tokenizer).startswith("<|im_start|>system\nBe<|im_end|>\n" + PROMPT)
    for method, more in (("sft", {}), ("grpo", {"max_completion_tokens": 9})):
        for format in ("raw", "chat"):
            how = {"method": method, "prompt_format": format, **more}
            blank = load(tmp_path, tokenizer, {**row, "system": ""}, **how)
            assert "system" not in text(blank.rows[0], tokenizer) and not blank.notes.ignored
    raw = load(tmp_path, tokenizer, row, prompt_format="raw")
    assert raw.notes.ignored == {"system": 1}
    listed = row | {"prompt": [asks("a")]}
    data = load(tmp_path, tokenizer, listed, prompt_format="raw")
    assert "Be<|im_end|>" in text(data.rows[0], tokenizer)
    twice = listed | {"prompt": [{"role": "system", "content": "x"}, asks("a")]}
    with pytest.raises(InputError, match='"system" and a system message in "prompt"'):
        load(tmp_path, tokenizer, twice)


def test_generation_asks_as_the_run_was_trained(tmp_path):
    tokenizer = byte_level(bos=False)
    chat_ids = Prompting("chat").ids(tokenizer, "a")
    assert tokenizer.decode(chat_ids) == PROMPT and Prompting().ids(tokenizer, "a") == chat_ids
    assert tokenizer.decode(Prompting("raw").ids(tokenizer, "a")) == "a"
    with pytest.raises(InputError, match="a system message requires a chat template"):
        Prompting("raw").ids(tokenizer, "a", "Be")
    assert Prompting("raw").flags == ["--ignore-chat-template"]
    assert Prompting("chat", {"x": 1}).flags == ["--chat-template-config", '{"x": 1}']
    for strange in ({"prompt_format": 7}, {"chat_template_kwargs": {"chat_template": "x"}}, {}):
        assert Prompting.of(strange) == Prompting()


# 7. Pairs


def test_a_prompt_that_both_sides_repeat_stands_once(tmp_path):
    tokenizer = byte_level(bos=False)
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "a", "chosen": "ayes", "rejected": "ano"},
        {
            "prompt": [asks("a")],
            "chosen": [asks("a"), says("yes")],
            "rejected": [asks("a"), says("no")],
        },
    ]
    data = load(tmp_path, tokenizer, *rows, prompt_format="chat", method="dpo")
    for pair in data.rows:
        assert text(pair.chosen, tokenizer) == PROMPT + "yes<|im_end|>\n"
        assert trained(pair.rejected, tokenizer) == ["no<|im_end|>"]
    assert data.notes.repeated == 2 and data.notes.rows == 3
    assert any("in 2 pairs both sides repeat the prompt" in x for x in remarks(None, data, None))
    half = rows[2] | {"rejected": [says("no")]}
    with pytest.raises(InputError, match=r'train\.jsonl:1: "chosen" repeats the prompt'):
        load(tmp_path, tokenizer, half, method="dpo")


@pytest.mark.parametrize("prompt", ["a", [asks("a")]])
def test_sides_that_are_the_same_are_refused(tmp_path, prompt):
    row = {"prompt": prompt, "chosen": "yes", "rejected": "yes"}
    with pytest.raises(InputError, match=r'train\.jsonl:1: "chosen" and "rejected" are identical'):
        load(tmp_path, byte_level(), row, method="dpo")


# 8. Omissions are reported


def test_what_is_left_out_of_a_folder_is_said(tmp_path):
    tokenizer = byte_level()
    rows = [
        {"prompt": "Q", "completion": "WWWWWWWW", "id": 1, "source": "x"},
        {"prompt": "QQQQQQQQ", "completion": "W", "id": 2},
        {"prompt": "Q", "completion": "W"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("val.jsonl", "test.jsonl", "other.json", "notes.txt"):
        (tmp_path / name).write_text("")
    options = Options(max_seq_length=5, prompt_format="raw")
    train, valid = load_dataset(tmp_path, tokenizer, options)
    said = remarks(tmp_path, train, valid, *sources_of(tmp_path))
    assert said[:4] == [
        "train.jsonl: 1 rows are truncated to max_seq_length",
        "train.jsonl: 1 samples are dropped: they have no token in the loss",
        'train.jsonl: the column "id" of 2 rows is ignored',
        'train.jsonl: the column "source" of 1 rows is ignored',
    ]
    assert said[4].startswith(
        f"files of {tmp_path} that are not read: other.json, test.jsonl, val.jsonl ("
    )
    assert said[5] == f"{tmp_path} has no validation file, so there is no validation loss"
    assert inspect(tmp_path, tokenizer, options).remarks == said
    assert train.as_json()["ignored_columns"] == {"id": 2, "source": 1}
