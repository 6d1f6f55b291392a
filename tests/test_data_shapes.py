"""Tests row formats in several kinds of files, and which tokens of a row are in the loss."""

import csv
import json
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.chats import byte_level, chat, text, trained
from mlx_segtrain import TrainConfig
from mlx_segtrain.config import DataFormat, load_config
from mlx_segtrain.data import Options, inspect, load_dataset
from mlx_segtrain.data.dataset import remarks
from mlx_segtrain.data.formats import FORMATS, checked
from mlx_segtrain.errors import InputError

TOKENIZER = byte_level()
CHAT = chat("Hello", "fine")
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "fine"}]
ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

#: Two forms of a message, one of them in a table that also has rows in the other form.
NULLS = [{**message, "role": None, "content": None} for message in SHAREGPT]
#: For each case: a row, its format, the user's message, and the response.
SHAPES = {
    "messages": ({"messages": CHAT}, "messages", "Hello", "fine"),
    "messages as JSON": ({"messages": json.dumps(CHAT)}, "messages", "Hello", "fine"),
    "sharegpt": ({"conversations": SHAREGPT}, "sharegpt", "Hello", "fine"),
    "sharegpt as JSON": ({"conversations": json.dumps(SHAREGPT)}, "sharegpt", "Hello", "fine"),
    "conversations with roles": ({"conversations": CHAT}, "sharegpt", "Hello", "fine"),
    "conversations with null roles": ({"conversations": NULLS}, "sharegpt", "Hello", "fine"),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, "prompt-completion", "Q", "A"),
    "lists": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt-completion", "Hello", "fine"),
    "lists of sharegpt": (
        {"prompt": SHAREGPT[:1], "completion": SHAREGPT[1:]},
        "prompt-completion",
        "Hello",
        "fine",
    ),
    "kto": ({"prompt": "Q", "completion": "A", "label": True}, "kto", "Q", "A"),
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"}, "alpaca", "Add\n\n1 2", "3"),
    "alpaca, no input": ({"instruction": "Add", "input": "", "output": "3"}, "alpaca", "Add", "3"),
    "dolly": (
        {"instruction": "Add", "context": "1 2", "response": "3"},
        "instruction-response",
        "Add\n\n1 2",
        "3",
    ),
    "question": ({"question": "Q", "answer": "A"}, "question-answer", "Q", "A"),
    "response": ({"prompt": "Q", "response": "A"}, "prompt-response", "Q", "A"),
    "input": ({"input": "Q", "output": "A"}, "input-output", "Q", "A"),
}


def write_csv(path, row):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(row)
        csv.writer(file).writerow(x if isinstance(x, str) else json.dumps(x) for x in row.values())


def write_table(path, row):
    """Writes a table with two additional null columns, as in a table that contains other kinds of
    rows."""
    path.unlink(missing_ok=True)
    pq.write_table(pa.Table.from_pylist([{**row, "system": None, "tools": None}]), path)


WRITERS = {
    "train.jsonl": lambda path, row: path.write_text(json.dumps(row)),
    "train.csv": write_csv,
    "train.parquet": write_table,
}


def read(folder, *rows, **options):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(folder, TOKENIZER, Options(**options))[0]


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_trained_of_a_row(name, file, tmp_path):
    row, format, prompt, response = SHAPES[name]
    WRITERS[file](tmp_path / file, row)
    data, _ = load_dataset(tmp_path, TOKENIZER, Options())
    assert (data.format, data.notes.formats) == (format, {format: 1})
    assert f"their format is {format}" in data.summary
    (own,) = data.rows
    assert ASKED.format(prompt) + f"{response}<|im_end|>" in text(own, TOKENIZER)
    assert trained(own, TOKENIZER) == [f"{response}<|im_end|>"]
    assert own.source == f"{file}:1" and not data.notes.ignored


def test_a_text_of_a_table(tmp_path):
    for file, write in WRITERS.items():
        write(tmp_path / file, {"text": "Hello"})
        (own,) = load_dataset(tmp_path / file, TOKENIZER, Options())[0].rows
        assert trained(own, TOKENIZER) == ["Hello</s>"]


def test_pairs_of_a_table(tmp_path):
    for file, write in WRITERS.items():
        write(tmp_path / file, {"prompt": "Q", "chosen": "A", "rejected": "B"})
        data, _ = load_dataset(tmp_path / file, TOKENIZER, Options(method="dpo"))
        assert data.format == "preference"
        assert trained(data.rows[0].rejected, TOKENIZER) == ["B<|im_end|>"]
        write(
            tmp_path / file, {"chosen": CHAT, "rejected": [*CHAT[:1], {**CHAT[1], "content": "B"}]}
        )
        (own,) = load_dataset(tmp_path / file, TOKENIZER, Options(method="dpo"))[0].rows
        assert text(own.rejected, TOKENIZER).endswith(ASKED.format("Hello") + "B<|im_end|>\n")


def test_text_that_only_looks_like_messages(tmp_path):
    """Text is decoded only if it contains a list of messages."""
    for said in ('{"sum": 3}', "[1] is a source", "[]", '["a"]', '[{"role": "user"}, {"text": 1}]'):
        row = {"prompt": said, "completion": said}
        write_csv(tmp_path / "train.csv", row)
        (own,) = load_dataset(tmp_path / "train.csv", TOKENIZER, Options())[0].rows
        assert ASKED.format(said) in text(own, TOKENIZER)
        assert trained(own, TOKENIZER) == [f"{said}<|im_end|>"]
        assert checked(row, "a:1", "prompt").row["prompt"] == said
    asked = checked({"prompt": json.dumps(CHAT[:1])}, "a:1", "prompt").row["prompt"]
    assert asked == CHAT[:1]


SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"


@pytest.mark.parametrize("name", [name for name in SHAPES if "lists" not in name])
def test_a_column_for_the_system_s_text(name, tmp_path):
    row, _, prompt, _ = SHAPES[name]
    (own,) = read(tmp_path, {**row, "system": "Be kind."}).rows
    assert SYSTEM + ASKED.format(prompt) in text(own, TOKENIZER)


def test_the_system_s_text_twice(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, *CHAT]
    (own,) = read(tmp_path, {"messages": messages, "system": "Be kind."}).rows
    assert text(own, TOKENIZER).count("Be kind.") == 1
    with pytest.raises(InputError, match=r'has "system" and a system message in "conversations"'):
        read(tmp_path, {"conversations": messages, "system": "Be quick."})


#: If a row has the keys of several formats, the first of these formats applies.
ORDER = [
    ({"prompt", "chosen", "rejected"}, "preference"),
    ({"prompt", "completion", "label"}, "kto"),
    ({"messages", "label"}, "kto-messages"),
    ({"conversations", "label"}, "kto-sharegpt"),
    ({"messages"}, "messages"),
    ({"conversations"}, "sharegpt"),
    ({"prompt", "completion"}, "prompt-completion"),
    ({"instruction", "output"}, "alpaca"),
    ({"instruction", "response"}, "instruction-response"),
    ({"question", "answer"}, "question-answer"),
    ({"prompt", "response"}, "prompt-response"),
    ({"input", "output"}, "input-output"),
    ({"text"}, "text"),
]


def test_which_format_a_row_with_several_is_of():
    assert [name for _, name in ORDER] == [
        name for name, own in FORMATS.items() if "prompt" not in own.rows
    ]
    assert ("auto", *FORMATS) == get_args(DataFormat)
    values = {key: "a" for keys, _ in ORDER for key in keys}
    values |= {"chosen": "b", "label": True, "messages": CHAT, "conversations": SHAREGPT}
    for i, (keys, name) in enumerate(ORDER):
        later = {key for other, _ in ORDER[i + 1 :] for key in other}
        row = {key: values[key] for key in keys | later}
        first = next(own for marks, own in ORDER if marks <= row.keys())
        assert checked(row, "a:1").format == first  # later keys may complete an earlier format
        assert checked({key: values[key] for key in keys}, "a:1").format == name
        # A null value counts as an absent key.
        nothing = dict.fromkeys(values.keys() - keys)
        assert checked({**nothing, **{key: values[key] for key in keys}}, "a:1").format == name


def test_a_format_that_is_named(tmp_path):
    row = {"prompt": "Q", "completion": "A", "messages": CHAT, "label": 7, "text": "x"}
    data = read(tmp_path, row, data_format="prompt-completion")
    assert trained(data.rows[0], TOKENIZER) == ["A<|im_end|>"]
    assert data.notes.ignored == {"messages": 1, "label": 1, "text": 1}
    with pytest.raises(InputError, match=r'train.jsonl:2: the row needs the keys "text", but has'):
        read(tmp_path, row, {"prompt": "Q"}, data_format="text")


def test_several_formats_in_a_file(tmp_path):
    data = read(tmp_path, *(row for row, *_ in SHAPES.values()), {"text": "a"})
    assert data.format == "mixed" and data.notes.formats["sharegpt"] == 4
    assert "1 text" in data.summary and "4 sharegpt" in data.summary
    assert data.as_json()["formats"]["question-answer"] == 1


def test_rows_that_are_all_labelled_false(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "A", "label": False} for i in range(3)]
    says = r"none of the 3 rows of train.jsonl has anything to train on: their label is false"
    with pytest.raises(InputError, match=says):
        read(tmp_path, *rows)
    report = inspect(tmp_path, TOKENIZER)
    assert not report.ok and "none of the 3 rows of train.jsonl" in str(report.error)


def test_columns_by_other_names(tmp_path):
    row = {"q": "Q", "a": "A", "prompt": "not this", "sys": None}
    columns = {"prompt": "q", "completion": "a", "system": "sys"}
    data = read(tmp_path, row, {**row, "sys": "Be kind."}, columns=columns)
    assert [trained(own, TOKENIZER) for own in data.rows] == [["A<|im_end|>"]] * 2
    assert ASKED.format("Q") in text(data.rows[0], TOKENIZER)
    assert SYSTEM in text(data.rows[1], TOKENIZER)
    with pytest.raises(
        InputError, match=r'train.jsonl:2: the row has no column "a", but the option'
    ):
        read(tmp_path, row, {"q": "Q"}, columns=columns)
    with pytest.raises(InputError, match='"a" must be a string or a list, not a number'):
        read(tmp_path, {**row, "a": 7}, columns=columns)


def test_columns_of_the_configuration(tmp_path):
    common = {"model_dir": "m", "data_dir": "d", "adapter_path": "a"}
    config = load_config(None, {**common, "columns": '{"prompt": "q"}', "data_format": "alpaca"})
    assert (config.columns, config.data_format) == ({"prompt": "q"}, "alpaca")
    assert Options.of(config).columns == {"prompt": "q"}
    for bad in ("q", '{"prompt": 1}', '{"prompt": ""}', '{"prompt": "q", "system": "q"}', "[]"):
        with pytest.raises(InputError, match="columns must be a JSON object of distinct names"):
            load_config(None, {**common, "columns": bad})
    assert TrainConfig(model_dir="m", adapter_path="a").data_dir is None


def test_rows_with_a_label(tmp_path):
    """The method `sft` drops rows whose label is false, and a message reports this."""
    rows = [
        {"prompt": "Q", "completion": f"A{i}", "label": label}
        for i, label in enumerate([True, False, 1, 0, "true", " False ", "1", "0"])
    ]
    data = read(tmp_path, *rows)
    assert [trained(own, TOKENIZER) for own in data.rows] == [
        [f"A{i}<|im_end|>"] for i in (0, 2, 4, 6)
    ]
    said = "train.jsonl: 4 rows with the label false are dropped"
    assert said in remarks(tmp_path, data, None) and data.n_rows == 8
    assert data.as_json()["rows_labelled_false"] == 4
    with pytest.raises(InputError, match=r"train.jsonl:1: .* keys .* for method dpo"):
        read(tmp_path, *rows, method="dpo")
    for label in ("good", 2, 0.5, [1]):
        with pytest.raises(
            InputError, match=r'train.jsonl:1: "label" must be true for a desirable'
        ):
            read(tmp_path, {**rows[0], "label": label})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": 7, "answer": "A"}, '"question" must be a string or a list, not a number'),
        ({"instruction": "a", "output": [1]}, '"output" must be a string, not a list'),
        ({"instruction": "a", "input": 1, "output": "b"}, "must be a string, not a number"),
        ({"conversations": {}}, '"conversations" must be a list, not an object'),
        ({"conversations": [{"from": "x", "value": "a"}]}, '"conversations"[0]: the role'),
        ({"conversations": [{"from": "gpt"}]}, '"conversations"[0] must have a "role"'),
        ({"conversations": "[}"}, '"conversations" must be a list, not a string'),
        ({"messages": '[{"role": "user"}]'}, '"messages"[0]: "content" must be a string'),
        ({"messages": '["\\ud800"]'}, '"messages" must be a list, not a string'),
        ({"messages": "[" * 100_000}, '"messages" must be a list, not a string'),
        ({f"c{i}": 1 for i in range(99)}, "but has 'c0', 'c1', "),
    ],
)
def test_rows_that_are_wrong(row, says, tmp_path):
    with pytest.raises(InputError) as caught:
        read(tmp_path, {"text": "a"}, row)
    said = str(caught.value)
    assert said.startswith("train.jsonl:2: ") and says in said and len(said) < 500


def test_values_of_a_table_that_are_no_text(tmp_path):
    """Numbers and bytes are errors where text is expected, and are ignored elsewhere."""
    times = pa.array([1, 2], pa.timestamp("ms"))
    columns = {"text": ["a", None], "when": times, "raw": pa.array([b"a", b"b"])}
    pq.write_table(pa.table({**columns, "text": ["a", "b"]}), tmp_path / "train.parquet")
    data, _ = load_dataset(tmp_path, TOKENIZER, Options())
    assert data.notes.ignored == {"when": 2, "raw": 2}
    for values, says in (
        (pa.array([b"a", b"b"]), '1: "text" must be a string, not a binary'),
        (pa.array([0.5, float("nan")]), '1: "text" must be a string, not a number'),
        (pa.array(["a", None]), '2: "text" must be a string, not null or missing'),
    ):
        pq.write_table(pa.table({"text": values}), tmp_path / "train.parquet")
        with pytest.raises(InputError) as caught:
            load_dataset(tmp_path, TOKENIZER, Options())
        assert f"train.parquet:{says}" in str(caught.value)


def test_tools_of_a_cell(tmp_path):
    row = {"prompt": "Q", "completion": "A", "tools": ""}
    write_csv(tmp_path / "train.csv", row)
    assert load_dataset(tmp_path, TOKENIZER, Options())[0].n_rows == 1
    write_csv(tmp_path / "train.csv", {**row, "tools": "[7"})
    with pytest.raises(InputError, match=r'train.csv:1: "tools" must be a list, not a string'):
        load_dataset(tmp_path, TOKENIZER, Options())


def test_a_report_says_the_formats(tmp_path):
    report = inspect([row for row, *_ in SHAPES.values()])
    assert report.ok and report.formats["alpaca"] == 2 and report.n_train == len(SHAPES)
    assert inspect([{"text": "a"}, {"x": 1}]).error
