"""Tests prompt/completion and text rows, BOS and EOS, truncation, and rows without tokens in the
loss."""

import json

import pytest

from lib.chats import SPECIAL, byte_level, chat, ids, load, metaspace, text, trained
from lib.folders import write_llama
from mlx_segtrain.errors import InputError
from mlx_segtrain.models import load_tokenizer


def test_prompt_and_completion(tmp_path):
    tokenizer = byte_level()
    row = load(tmp_path, tokenizer, {"prompt": "The sky is", "completion": " blue"}).rows[0]
    assert row.ids.tolist() == ids(tokenizer, "<s>", "The sky is", " blue", "</s>")
    assert trained(row, tokenizer) == [" blue</s>"]


def test_prompt_and_completion_that_merge_are_encoded_apart(tmp_path):
    tokenizer = byte_level()
    assert ids(tokenizer, "The sky") != ids(tokenizer, "The s", "ky")
    row = load(tmp_path, tokenizer, {"prompt": "The s", "completion": "ky"}).rows[0]
    assert row.ids.tolist() == ids(tokenizer, "<s>", "The s", "ky", "</s>")
    assert trained(row, tokenizer) == ["ky</s>"]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_prompt_and_completion_of_a_sentencepiece_like_tokenizer(tmp_path, scheme):
    tokenizer = metaspace(scheme=scheme)
    cases = [("The sky is", " blue", "blue"), ("The sky is ", "blue", "blue"), ("a gr", "een", "n")]
    for prompt, completion, end in cases:
        row = load(tmp_path, tokenizer, {"prompt": prompt, "completion": completion}).rows[0]
        assert row.ids.tolist() == ids(tokenizer, "<s>", prompt + completion, "</s>")
        (span,) = trained(row, tokenizer)
        assert span.endswith(end + "</s>") and prompt[:4] not in span


def test_text(tmp_path):
    tokenizer = byte_level()
    row = load(tmp_path, tokenizer, {"text": "The sky is blue"}).rows[0]
    assert row.ids.tolist() == ids(tokenizer, "<s>The sky is blue</s>")
    assert row.weights.tolist() == [0] + [1] * (len(row.ids) - 1)
    row = load(tmp_path, byte_level(bos=False), {"text": "The sky is blue"}).rows[0]
    assert row.ids.tolist() == ids(tokenizer, "The sky is blue</s>")
    assert row.weights.tolist() == [0] + [1] * (len(row.ids) - 1), (
        "the first token is never predicted"
    )


def test_stops_of_the_configuration_stand_beside_the_tokenizers_own(tmp_path):
    model = write_llama(tmp_path / "model")
    own = load_tokenizer(model).eos_token_id
    config = json.loads((model / "config.json").read_text())
    for stops, found in ((own + 1, {own, own + 1}), ([own + 2, own + 3], {own, own + 2, own + 3})):
        (model / "config.json").write_text(json.dumps({**config, "eos_token_id": stops}))
        assert load_tokenizer(model).eos_token_ids == found


def test_bos_and_eos_are_not_written_twice(tmp_path):
    tokenizer = byte_level()
    rows = [
        {"text": "<s>The sky</s>"},
        {"prompt": "<s>The", "completion": " sky</s>"},
        {"prompt": "</s>", "completion": ""},
    ]
    data = load(tmp_path, tokenizer, *rows)
    assert [text(row, tokenizer) for row in data.rows] == [
        "<s>The sky</s>",
        "<s>The sky</s>",
        "<s></s></s>",
    ]
    assert trained(data.rows[2], tokenizer) == ["</s>"]


def test_append_eos_off(tmp_path):
    tokenizer = byte_level()
    rows = [{"text": "The sky"}, {"prompt": "The", "completion": " sky"}]
    data = load(tmp_path, tokenizer, *rows, append_eos=False)
    assert [text(row, tokenizer) for row in data.rows] == ["<s>The sky"] * 2
    assert data.format == "mixed"
    assert data.notes.where == {"stop": ["train.jsonl:2"]}  # a text has no turns
    with pytest.raises(InputError, match="in 1 of 2 samples the turn does not end with a stop"):
        load(tmp_path, tokenizer, *rows, append_eos=False, strict=True)
    assert not load(tmp_path, tokenizer, *rows, strict=True).notes.findings
    no_eos = byte_level(eos=None)
    load(tmp_path, no_eos, *rows, append_eos=False)
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load(tmp_path, no_eos, *rows)


def test_precedence_of_formats(tmp_path):
    row = {"text": "t", "prompt": "p", "completion": "c", "id": 7}
    assert load(tmp_path, byte_level(), row).format == "prompt-completion"
    assert load(tmp_path, byte_level(), row | {"messages": chat("a", "b")}).format == "messages"
    data = load(tmp_path, byte_level(), {"text": "t", "prompt": "p"})
    assert data.format == "text"


def test_truncation_on_the_right(tmp_path):
    tokenizer = byte_level()
    rows = [
        {"prompt": "QQQQQQ", "completion": "W"},
        {"prompt": "Q", "completion": "WWWWW"},
        {"prompt": "Q", "completion": "W"},
    ]
    data = load(tmp_path, tokenizer, *rows, max_seq_length=5)  # each letter is a token
    assert [text(row, tokenizer) for row in data.rows] == ["<s>QWWW", "<s>QW</s>"]
    assert [trained(row, tokenizer) for row in data.rows] == [["WWW"], ["W</s>"]]
    assert (data.n_rows, data.truncated, data.dropped) == (3, 1, 1)


def test_nothing_to_train_is_an_error(tmp_path):
    tokenizer = byte_level()
    row = {"prompt": "QQQQQQ", "completion": "W"}
    with pytest.raises(InputError, match=r"raise it \(the longest row has 9 tokens\)"):
        load(tmp_path, tokenizer, row, max_seq_length=5)
    with pytest.raises(InputError, match="no row has an assistant turn"):
        load(tmp_path, tokenizer, {"messages": chat("Hello")})


def test_pad_id(tmp_path):
    row = {"text": "The sky"}
    assert load(tmp_path, byte_level(pad="<|pad|>"), row).pad_id == SPECIAL.index("<|pad|>")
    assert load(tmp_path, byte_level(), row).pad_id == SPECIAL.index("</s>")
    assert load(tmp_path, byte_level(eos=None), row, append_eos=False).pad_id == 0
