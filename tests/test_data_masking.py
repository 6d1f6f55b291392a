"""Tests which tokens are in the loss, with real tokenizers and chat templates of known model
families."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.chats import (
    CHATML,
    INST,
    LLAMA3,
    THINKING,
    TOOLS,
    byte_level,
    chat,
    ids,
    load,
    metaspace,
    text,
    trained,
)
from mlx_segtrain.errors import InputError

# This template inserts a default system message, like SmolLM2's template.
DEFAULT_SYSTEM = (
    "{% if messages and messages[0].role != 'system' %}"
    "<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}" + CHATML
)
# The generation prompt opens a thinking block, but finished turns have none (as in DeepSeek-R1).
OPEN_THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def test_every_assistant_turn_with_its_end_of_turn_token(tmp_path):
    tokenizer = byte_level()
    row = {"messages": chat("Hello", "I am fine.", "The sky?", "blue")}
    data = load(tmp_path, tokenizer, row)
    pieces = [
        ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 0),
        ("I am fine.<|im_end|>", 1),
        ("\n<|im_start|>user\nThe sky?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("blue<|im_end|>", 1),
        ("\n", 0),
    ]
    assert data.rows[0].ids.tolist() == ids(tokenizer, *(piece for piece, _ in pieces))
    weights = [weight for piece, weight in pieces for _ in ids(tokenizer, piece)]
    assert data.rows[0].weights.tolist() == weights
    assert data.rows[0].ids.dtype == np.int32 and data.rows[0].weights.dtype == np.float32
    assert (data.format, data.n_rows, data.rows[0].source) == ("messages", 1, "train.jsonl:1")
    assert (data.tokens, data.supervised_tokens) == (len(weights), sum(weights))


def test_train_on_last(tmp_path):
    tokenizer = byte_level()
    row = {"messages": chat("Hello", "I am fine.", "The sky?", "blue", "thanks")}
    data = load(tmp_path, tokenizer, row, train_on="last")
    assert trained(data.rows[0], tokenizer) == ["blue<|im_end|>"]


def test_train_and_weight_of_a_message(tmp_path):
    tokenizer = byte_level()
    messages = chat("a", "one", "b", "two", "c", "three", "d", "four")
    messages[1]["train"] = False
    messages[3]["weight"] = 0.25
    messages[5]["weight"] = 0
    messages[7] |= {"train": True, "weight": 2}
    messages[0] |= {"train": False, "weight": 0}
    row = load(tmp_path, tokenizer, {"messages": messages}).rows[0]
    assert trained(row, tokenizer) == ["two<|im_end|>", "four<|im_end|>"]
    assert set(row.weights.tolist()) == {0, 0.25, 2}
    assert "three<|im_end|>" in text(row, tokenizer)


@pytest.mark.parametrize("first", ["user", "assistant"])
def test_a_template_with_a_system_message_of_its_own(tmp_path, first):
    tokenizer = byte_level(DEFAULT_SYSTEM)
    row = load(tmp_path, tokenizer, {"messages": chat("one", "two", "three", first=first)}).rows[0]
    assert text(row, tokenizer).startswith("<|im_start|>system\nBe helpful.<|im_end|>\n")
    expected = {"user": ["two"], "assistant": ["one", "three"]}[first]
    assert trained(row, tokenizer) == [content + "<|im_end|>" for content in expected]


def test_a_template_with_bos_and_trimmed_contents(tmp_path):
    tokenizer = byte_level(LLAMA3)
    row = load(tmp_path, tokenizer, {"messages": chat("Hello", " fine \n", "and?", "blue")}).rows[0]
    assert trained(row, tokenizer) == ["fine<|eot|>", "blue<|eot|>"]
    assert row.ids.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("make", [byte_level, metaspace, lambda t: metaspace(t, "always")])
def test_a_template_without_generation_prompt(tmp_path, make):
    tokenizer = make(INST)
    messages = chat("a question", "an answer", "how are you", "fine")
    row = load(tmp_path, tokenizer, {"messages": messages}).rows[0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row.ids.tolist() == ids(tokenizer, whole)
    spans = [span.strip() for span in trained(row, tokenizer)]
    assert spans == ["an answer </s>", "fine </s>"]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_sentencepiece_like_turns_within_plain_text(tmp_path, scheme):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = metaspace(template, scheme)
    messages = chat("Hello", "fine", "how", "blue")
    row = load(tmp_path, tokenizer, {"messages": messages}, append_eos=False).rows[0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row.ids.tolist() == ids(tokenizer, whole)
    # The token "▁fine" contains the space between prompt and response. A token that contains any
    # part of the response is in the loss. The newline is in the loss too: it ends the turn, because
    # the template has no end-of-turn token and append_eos is False.
    assert trained(row, tokenizer) == ["fine\n", "blue\n"]


def test_a_turn_without_special_token_is_trained_whole(tmp_path):
    tokenizer = byte_level("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    messages = chat("Hello", "I say <|im_end|> here", "Bye", "fine")
    data = load(tmp_path, tokenizer, {"messages": messages}, append_eos=False)
    # Without a generation prompt, the model must also learn to write the speaker's name.
    assert trained(data.rows[0], tokenizer) == [
        "assistant: I say <|im_end|> here\n",
        "assistant: fine\n",
    ]
    assert set(data.notes.findings) == {"stop", "special"}


def test_tokens_that_merge_across_the_start_of_a_turn(tmp_path):
    tokenizer = byte_level()
    whole = ids(tokenizer, "assistant\n\n\nfine")
    assert whole != ids(tokenizer, "assistant\n", "\n\nfine"), (
        "no tokens merge, so nothing is tested"
    )
    row = load(tmp_path, tokenizer, {"messages": chat("Hello", "\n\nfine")}).rows[0]
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert row.ids.tolist() == ids(tokenizer, prompt, "\n\nfine<|im_end|>\n")
    assert trained(row, tokenizer) == ["\n\nfine<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_as_generated(tmp_path):
    tokenizer = byte_level(THINKING)
    data = load(tmp_path, tokenizer, {"messages": chat("a", "one", "b", "two")})
    think = "<think>\n\n</think>\n\n"
    assert [trained(row, tokenizer) for row in data.rows] == [
        [think + "one<|im_end|>"],
        [think + "two<|im_end|>"],
    ]
    assert "assistant\none<|im_end|>" in text(data.rows[1], tokenizer)
    assert [row.source for row in data.rows] == ["train.jsonl:1"] * 2 and data.n_rows == 1


def test_a_generation_prompt_that_the_finished_turn_lacks(tmp_path):
    tokenizer = byte_level(OPEN_THINKING)
    messages = chat("a", "<this is fine", "b", "two")
    data = load(tmp_path, tokenizer, {"messages": messages})
    # The generation prompt opens a thinking block, which is closed before the response.
    closed = "\n</think>\n\n"
    assert [trained(row, tokenizer) for row in data.rows] == [
        [closed + "<this is fine<|im_end|>"],
        [closed + "two<|im_end|>"],
    ]
    for row, n in zip(data.rows, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:n], tokenize=False, add_generation_prompt=True
        )
        assert text(row, tokenizer).startswith(prompt + closed)


def test_a_template_that_changes_what_came_before_is_trained_after_what_generation_meets(tmp_path):
    tokenizer = byte_level("{{ messages | length }}" + CHATML)
    (row,) = load(tmp_path, tokenizer, {"messages": chat("a", "one")}).rows
    assert text(row, tokenizer).startswith(
        "1<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    assert trained(row, tokenizer) == ["one<|im_end|>"]


def test_a_template_that_hides_or_cannot_render_a_turn_is_refused(tmp_path):
    hidden = byte_level("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match=r"train\.jsonl:1: .* where messages\[0\] starts"):
        load(tmp_path, hidden, {"messages": chat("one", "a", first="assistant")})
    strict = byte_level("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"train\.jsonl:1: .*roles must alternate"):
        load(tmp_path, strict, {"messages": chat("a", "one")})
    with pytest.raises(InputError, match=r"train\.jsonl:1: .*no chat template"):
        load(tmp_path, byte_level(None), {"messages": chat("a", "one")})


def test_train_and_weight_do_not_reach_the_template(tmp_path):
    tokenizer = byte_level("{{ messages[-1].weight }}{{ messages[-1].train }}" + CHATML)
    messages = [{"role": "assistant", "content": "fine", "train": True, "weight": 1}]
    row = load(tmp_path, tokenizer, {"messages": messages}).rows[0]
    assert text(row, tokenizer) == "<|im_start|>assistant\nfine<|im_end|>\n"


def test_turns_that_overlap_do_not_repeat_text(tmp_path):
    marks = "{% if not add_generation_prompt %}!{% endif %}"
    tokenizer = byte_level("{% for m in messages %}{{ m.content }}{% endfor %}" + marks)
    messages = chat("Q", "W")
    messages.append({"role": "assistant", "content": "!Z"})
    row = load(tmp_path, tokenizer, {"messages": messages}, append_eos=False).rows[0]
    assert text(row, tokenizer) == "QW!Z!" and trained(row, tokenizer) == ["W!Z!"]


def test_tools_and_text_parts_reach_the_template(tmp_path):
    tokenizer = byte_level(TOOLS)
    parts = [{"type": "text", "text": "I am "}, {"type": "text", "text": "fine"}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": parts}]
    row = load(tmp_path, tokenizer, {"messages": messages, "tools": [{"name": "add"}]}).rows[0]
    assert text(row, tokenizer).startswith('[{"name": "add"}]\n')
    assert trained(row, tokenizer) == ["I am fine<|im_end|>"]


def test_a_conversation_without_trained_turn_is_dropped(tmp_path):
    rows = [{"messages": chat("Hello")}, {"messages": []}, {"messages": chat("Hello", "fine")}]
    data = load(tmp_path, byte_level(), *rows)
    assert (data.n_rows, len(data.rows), data.dropped, data.truncated) == (3, 1, 2, 0)
    assert data.rows[0].source == "train.jsonl:3"


PROPERTY_TOKENIZERS = {name: byte_level(name) for name in (CHATML, DEFAULT_SYSTEM)}


@settings(max_examples=150, deadline=None)
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
        | st.text(" \n\t.ab", max_size=6)
        | st.sampled_from(["  fine\n\n", "\n", "<think>x</think>", "é🎉", "[/INST]"]),
        min_size=2,
        max_size=7,
    ),
    template=st.sampled_from(list(PROPERTY_TOKENIZERS)),
    last=st.booleans(),
)
def test_trained_tokens_are_the_assistant_contents(tmp_path_factory, contents, template, last):
    tokenizer = PROPERTY_TOKENIZERS[template]
    path = tmp_path_factory.mktemp("data")
    messages = chat(*contents)
    train_on = "last" if last else "assistant"
    row = load(path, tokenizer, {"messages": messages}, train_on=train_on).rows[0]
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert trained(row, tokenizer) == (answers[-1:] if last else answers)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(text(row, tokenizer))
