"""The error for an invalid file is one clear sentence that names the file and the line."""

import json

import pytest

from lib.chats import byte_level, chat
from mlx_segtrain.data import Options, load_dataset
from mlx_segtrain.errors import InputError

GOOD = b'{"text": "The sky is blue"}\n'


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def load(directory, tokenizer):
    return load_dataset(directory, tokenizer, Options(max_seq_length=64))


def message(**fields):
    return {"messages": [{"role": "user", "content": "a"}, fields]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "is not valid JSON"),
        ('{"text": "a"', "is not valid JSON"),
        ("9" * 5000, "is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "must be a JSON object, not a list"),
        ("null", "must be a JSON object, not null"),
        ("{}", "has no keys"),
        ('{"prompt": "a", "chosen": "b"}', "has 'prompt', 'chosen'"),
        ('{"text": 7}', '"text" must be a string, not a number'),
        ('{"text": null}', '"text" must be a string, not null'),
        ('{"prompt": "a", "completion": ["b"]}', '"completion"[0] must be an object, not a string'),
        ('{"messages": "a"}', '"messages" must be a list, not a string'),
        ('{"messages": ["a"]}', '"messages"[0] must be an object, not a string'),
        ('{"messages": [{"from": "user"}]}', '"messages"[0] must have a "role"'),
        ('{"messages": [], "tools": {}}', '"tools" must be a list'),
        (message(role="assistant"), '"messages"[1]: "content" must be a string, not null'),
        (message(role="assistant", content=1), '"content" must be a string, not a number'),
        (message(role="user", content=[{"type": "image"}]), "a part of type 'image'"),
        (message(role="user", content=["a"]), "a part of type a string"),
        (message(role="assistant", content="", train="no"), '"train" must be true or false'),
        (message(role="assistant", content="", weight="1"), '"weight" must be a number'),
        (message(role="assistant", content="", weight=True), '"weight" must be a number'),
        (message(role="assistant", content="", weight=-1), '"weight" must be from 0 to 1e+06'),
        (
            message(role="assistant", content="", weight=float("nan")),
            '"weight" must be from 0 to 1e+06',
        ),
        (message(role="assistant", content="", weight=10**400), '"weight" must be from 0 to 1e+06'),
        (message(role="user", content="", train=True), 'and only "assistant" messages can be'),
        (message(role="user", content="", weight=1), 'and only "assistant" messages can be'),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"text": "a", "\\udfff": 1}', "lone surrogate"),
        (b'{"text": "\xff"}', "byte 11 of the line is not valid UTF-8"),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, line, says):
    if not isinstance(line, bytes):
        line = (line if isinstance(line, str) else json.dumps(line)).encode()
    # A Unicode line separator within a row does not end the line. Line numbers count blank lines.
    (tmp_path / "train.jsonl").write_bytes(
        GOOD + '{"text": "\u2028"}\n\n \r\n'.encode() + line + b"\n" + GOOD
    )
    with pytest.raises(InputError) as caught:
        load(tmp_path, tokenizer)
    error = str(caught.value)
    assert error.startswith("train.jsonl:5: ") and says in error
    assert len(error) < 400


def test_what_is_accepted(tmp_path, tokenizer):
    rows = [
        b"\xef\xbb\xbf" + GOOD,  # a byte order mark
        b"\r\n",
        '{"text": "\\ud83c\\udf89 é"}\r\n'.encode(),  # a surrogate pair is one character
        # No newline at the end.
        json.dumps({"messages": chat("a", "b"), "note": 1}).encode(),
    ]
    (tmp_path / "train.jsonl").write_bytes(b"".join(rows))
    (tmp_path / "valid.jsonl").write_bytes(GOOD)
    train, valid = load(tmp_path, tokenizer)
    assert (train.format, train.n_rows) == ("mixed", 3)
    assert [row.source for row in train.rows] == [f"train.jsonl:{i}" for i in (1, 3, 4)]
    assert tokenizer.decode(train.rows[1].ids.tolist()) == "<s>🎉 é</s>"
    assert valid is not None and (valid.format, valid.n_rows) == ("text", 1)
    (tmp_path / "valid.jsonl").unlink()
    assert load(tmp_path, tokenizer)[1] is None


def test_a_message_with_tool_calls_needs_no_content(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level(template)
    row = message(role="assistant", content=None, tool_calls=[{"name": "add"}])
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (data,) = load(tmp_path, tokenizer)[0].rows
    trained = [i for i, w in zip(data.ids.tolist(), data.weights, strict=True) if w > 0]
    assert tokenizer.decode(trained) == '{"name": "add"}<|im_end|>'


def test_missing_and_empty_files(tmp_path, tokenizer):
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "none", tokenizer)
    with pytest.raises(InputError, match=r"contains no training file: add train\.jsonl"):
        load(tmp_path, tokenizer)
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"train\.jsonl has no rows"):
        load(tmp_path, tokenizer)
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "valid.jsonl").mkdir()
    with pytest.raises(InputError, match=r"valid\.jsonl cannot be read: Is a directory"):
        load(tmp_path, tokenizer)
