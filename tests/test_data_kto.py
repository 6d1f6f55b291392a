"""Tests rows with a label: formats, signs of the weights, truncation, and invalid rows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lib import chats
from lib.chats import byte_level
from mlx_segtrain.data import Options, Row, inspect, load_dataset
from mlx_segtrain.data import cache as tokens_cache
from mlx_segtrain.data.sources import sources_of
from mlx_segtrain.errors import InputError

USER = {"role": "user", "content": "a question"}
MORE = {"role": "user", "content": "more"}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(bos=False)


def trained(row, tokenizer):
    """Returns the texts of the spans whose weights are not 0."""
    return chats.trained(replace(row, weights=abs(row.weights)), tokenizer)


def write(folder, *rows):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(folder, tokenizer, *rows, method="kto", length=500, **options):
    how = {"max_seq_length": length, "method": method, **options}
    return load_dataset(write(folder, *rows), tokenizer, Options(**how))[0]


def labels(data):
    assert all(isinstance(row, Row) for row in data.rows)
    own = [{*np.sign(row.weights[row.weights != 0]).tolist()} for row in data.rows]
    assert all(len(signs) == 1 for signs in own)
    found = [int(min(signs)) for signs in own]
    assert found == data.columns.sign.tolist()
    return found


def test_forms_of_a_row_are_the_same_tokens(tmp_path, tokenizer):
    data = load(
        tmp_path,
        tokenizer,
        {"prompt": [USER], "completion": [says("no")], "label": False},
        {"prompt": [USER], "completion": "no", "label": "False"},
        {"prompt": "a question", "completion": "no", "label": 0},
        {"messages": [USER, says("no")], "label": False},
        {
            "conversations": [
                {"from": "human", "value": "a question"},
                {"from": "gpt", "value": "no"},
            ],
            "label": False,
        },
        {"messages": [USER, says("no")], "label": True},
    )
    assert labels(data) == [-1, -1, -1, -1, -1, 1]
    for row in data.rows:
        assert row.ids.tolist() == data.rows[0].ids.tolist()
        assert abs(row.weights).tolist() == abs(data.rows[0].weights).tolist()
        assert trained(row, tokenizer) == ["no<|im_end|>"]
    assert data.notes.unwanted == 0 and not data.notes.ignored


def test_a_pair_is_two_rows(tmp_path, tokenizer):
    pair = {"prompt": [USER], "chosen": "yes", "rejected": "no"}
    both = {"chosen": [USER, says("yes")], "rejected": [USER, says("no")]}
    data = load(tmp_path, tokenizer, pair, both)
    assert labels(data) == [1, -1, 1, -1]
    assert [row.source for row in data.rows] == [f"train.jsonl:{i}" for i in (1, 1, 2, 2)]
    assert [trained(row, tokenizer)[0][:2] for row in data.rows] == ["ye", "no", "ye", "no"]
    assert (data.n_rows, len(data)) == (2, 4)


def test_a_label_is_of_the_last_turn(tmp_path, tokenizer):
    """For the method `kto`, only the last assistant turn is in the loss. For `sft`, all assistant
    turns of a desirable row are in the loss as usual."""
    rows = [
        {"messages": [USER, says("one"), MORE, says("two")], "label": label}
        for label in (True, False)
    ]
    data = load(tmp_path, tokenizer, *rows)
    assert labels(data) == [1, -1]
    assert [trained(row, tokenizer) for row in data.rows] == [["two<|im_end|>"]] * 2
    (row,) = load(tmp_path, tokenizer, *rows, method="sft").rows
    assert trained(row, tokenizer) == ["one<|im_end|>", "two<|im_end|>"]
    (row,) = load(tmp_path, tokenizer, *rows, method="sft", train_on="last").rows
    assert trained(row, tokenizer) == ["two<|im_end|>"]


def test_the_end_of_a_plain_response_has_its_sign(tmp_path):
    tokenizer = byte_level()
    row = {"prompt": "2 and 3 are ", "completion": "six", "label": False}
    data = load(tmp_path, tokenizer, row, prompt_format="raw")
    (own,) = data.rows
    assert labels(data) == [-1] and tokenizer.decode(own.ids.tolist()) == "<s>2 and 3 are six</s>"
    assert own.weights.tolist() == [0.0] * (len(own) - 4) + [-1.0] * 4


@pytest.mark.parametrize("bos", [True, False])
def test_a_prompt_is_cut_before_its_response(tmp_path, bos):
    tokenizer = byte_level(bos=bos)
    rows = [
        {"prompt": "ZQZQZQ", "completion": "WX", "label": True},
        {"prompt": "QQ", "completion": "ABCDEFGH", "label": False},
    ]
    data = load(tmp_path, tokenizer, *rows, prompt_format="raw", length=6)
    start = "<s>" if bos else ""
    first = "ZQ" if bos else "QZQ"
    texts = [tokenizer.decode(row.ids.tolist()) for row in data.rows]
    assert texts == [f"{start}{first}WX</s>", f"{start}Q{'ABCD' if bos else 'ABCDE'}"]
    assert (data.prompts_cut, data.truncated, data.dropped) == (2, 1, 0)
    for i, row in enumerate(data.rows):
        assert data.columns.length[i, 0] == len(row) <= 6
        assert data.columns.first[i, 0] == np.flatnonzero(row.weights)[0]
    assert labels(data) == [1, -1]
    plain = load(tmp_path, tokenizer, rows[0], method="sft", prompt_format="raw", length=8)
    assert tokenizer.decode(plain.rows[0].ids.tolist()).startswith(f"{start}ZQZQZQ")


@pytest.mark.parametrize(
    ("row", "says_"),
    [
        ({"text": "x"}, 'must have the keys "prompt", "completion" and "label"'),
        ({"messages": [USER, says("no")]}, 'must have the keys "prompt", "completion"'),
        (
            {"messages": [USER, says("no")], "label": "maybe"},
            '"label" must be true for a desirable.*set data_format to messages',
        ),
        (
            {"prompt": "a", "completion": "b", "label": 2},
            '"label" must be true for a desirable.*set data_format to prompt-completion',
        ),
        (
            {"messages": [USER, says("no"), MORE], "label": True},
            '"messages" must end with a user message and the assistant message',
        ),
        (
            {"conversations": [{"from": "gpt", "value": "no"}], "label": True},
            '"conversations" must end with a user message and the assistant message',
        ),
        (
            {"messages": [USER, {**says("no"), "weight": 0.5}], "label": True},
            '"train" and "weight" have no effect on responses, which are compared as a whole',
        ),
        (
            {"prompt": [{**USER, "train": False}], "completion": "b", "label": True},
            '"train" and "weight" have no effect on responses',
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, row, says_):
    good = {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(InputError, match=rf"train\.jsonl:2: .*{says_}"):
        load(tmp_path, tokenizer, good, row)


def test_pairs_and_other_rows_do_not_mix(tmp_path, tokenizer):
    rows = (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {
            "prompt": "a",
            "completion": "b",
            "label": True,
        },
    )
    with pytest.raises(
        InputError, match=r"train\.jsonl:2: preference pairs and other rows cannot be"
    ):
        load(tmp_path, tokenizer, *rows)


def test_tokens_are_kept_by_what_is_learned(tmp_path, tokenizer):
    """For the same file, `sft` and `dpo` share the cached tokens, but the tokens for `kto` have a
    different cache key."""
    row = {"prompt": "a", "completion": "b", "label": False}
    source, _ = sources_of(write(tmp_path, row))
    model = tmp_path / "model"
    model.mkdir()
    keys = {
        method: tokens_cache.key_of(source, tokenizer, Options(method=method), model)
        for method in ("sft", "dpo", "kto", None)
    }
    assert keys["sft"] == keys["dpo"] == keys[None] != keys["kto"]


def test_labels_go_through_a_file_of_tokens(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens_cache, "SMALL", 0)
    (tmp_path / "model").mkdir()
    rows = [{"prompt": f"a{i}", "completion": "b", "label": i % 3 == 0} for i in range(6)]
    how = (tokenizer, Options(method="kto"), tmp_path / "model")
    for _ in range(2):
        data, _ = load_dataset(write(tmp_path, *rows), *how)
        assert labels(data) == [1, -1, -1, 1, -1, -1]
    assert list((tmp_path / "cache" / "tokens").glob("*/*.arrow"))


def test_inspect_shows_what_is_not_wanted(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    report = inspect(write(tmp_path, *rows), tokenizer, Options(method="kto"))
    assert report.ok and report.samples == 2 and report.packed is None
    for shown, sign in zip(report.previews, (1, -1), strict=True):
        assert {weight for _, inside, weight in shown.tokens if inside} == {sign}
        assert shown.source.endswith(", label false") == (sign < 0)
    assert inspect(tmp_path, tokenizer, Options(method="sft")).packed is not None
