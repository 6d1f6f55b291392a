"""Tests the selection of held-out rows by their content, duplicates, and rows that are in both
sets."""

import json
import random

import pytest

from lib.chats import byte_level
from mlx_segtrain.data import Options, inspect, load_dataset, load_split
from mlx_segtrain.errors import InputError

TOKENIZER = byte_level()


def row(n, **more):
    return {"prompt": f"Question {n}", "completion": f"Answer {n}", **more}


def pair(n, **more):
    return {"prompt": f"Question {n}", "chosen": f"Answer {n}", "rejected": "No", **more}


def load(folder, rows, valid=None, **how):
    for name, own in (("train", rows), ("valid", valid)):
        if own is not None:
            text = "".join(json.dumps(x) + "\n" for x in own)
            (folder / f"{name}.jsonl").write_text(text)
    return load_dataset(folder, TOKENIZER, Options(**how))


def texts(data):
    own = [getattr(row, "chosen", row) for row in (data.rows if data else ())]
    return [TOKENIZER.decode(row.ids.tolist()) for row in own]


@pytest.mark.parametrize("make", [row, pair])
def test_what_is_held_out_depends_on_the_rows_and_on_nothing_else(tmp_path, make):
    method = "dpo" if make is pair else "sft"
    rows = [make(n) for n in range(200)]
    train, valid = load(tmp_path, rows, method=method)
    assert (train.n_rows, valid.n_rows) == (190, 10)
    assert sorted(texts(train) + texts(valid)) == sorted(
        texts(load(tmp_path, rows, method=method, val_split=0)[0])
    )
    held = set(texts(valid))
    # The selection depends neither on the order of the rows nor on unused columns. Adding rows
    # changes only part of the selection.
    random.Random(0).shuffle(rows)
    others = [{"id": i, **own} for i, own in enumerate(rows)]
    assert set(texts(load(tmp_path, others, method=method)[1])) == held
    lines, cut = (
        [own.source for own in load(tmp_path, others, method=method, max_seq_length=most)[1].rows]
        for most in (512, 26)
    )
    assert len(lines) == 10 and set(cut) <= set(lines)
    more = [make(n) for n in range(200, 400)]
    again = set(texts(load(tmp_path, [*rows, *more], method=method, val_split=10)[1]))
    assert again & held and len(again) == 10
    # Another seed selects other rows.
    other = set(texts(load(tmp_path, rows, method=method, seed=1)[1]))
    assert len(other) == 10 and other != held


def test_how_many_are_held_out(tmp_path):
    rows = [row(n) for n in range(20_000)]
    for count, how, expected in (
        (100, "auto", 0),
        (101, "auto", 5),
        (20_000, "auto", 500),
        (200, 0.25, 50),
        (200, 7, 7),
        (3, 1, 1),
        (200, 0, 0),
    ):
        train, valid = load(tmp_path, rows[:count], val_split=how)
        assert (valid.n_rows if valid else 0) == expected
        assert train.n_rows == count - expected


def test_equal_rows_are_on_one_side(tmp_path):
    rows = [row(n % 40, id=n) for n in range(200)]
    train, valid = load(tmp_path, rows, val_split=0.2)
    assert not set(texts(train)) & set(texts(valid))
    assert valid.n_rows == 40
    # Holds out one distinct row, which occurs five times. Two distinct rows would be 10 rows, more
    # than val_split.
    train, valid = load(tmp_path, rows, val_split=7)
    assert valid.n_rows == 5
    # If all rows are equal, val_split = "auto" holds out no rows. A number that would hold out no
    # rows or all rows is an error.
    assert load(tmp_path, [row(1)] * 200)[1] is None
    with pytest.raises(InputError, match=r"val_split = 3 would hold out no rows of train\.jsonl"):
        load(tmp_path, [row(1)] * 200, val_split=3)
    with pytest.raises(InputError, match=r"val_split = 200 holds out all rows of train\.jsonl"):
        load(tmp_path, rows, val_split=200)


def test_it_is_said_and_a_file_goes_before_it(tmp_path):
    rows = [row(n) for n in range(200)]
    train, valid = load(tmp_path, rows)
    assert train.said == ("10 of 200 rows are held out for validation (val_split auto)",)
    assert valid.name == "held out of train.jsonl" and valid.notes.rows == 10
    assert train.notes.rows == train.notes.samples == train.notes.turns == 190
    report = inspect(tmp_path, TOKENIZER, Options(method=None))
    assert (report.n_train, report.n_valid) == (190, 10)
    assert f"train.jsonl: {train.said[0]}" in report.remarks
    part = load_split(tmp_path, TOKENIZER, Options(), "valid")
    assert texts(part) == texts(valid)
    train, valid = load(tmp_path, rows, [row(1000)])
    assert (train.n_rows, valid.n_rows) == (200, 1) and not train.said
    assert texts(load_split(tmp_path, TOKENIZER, Options(), "valid")) == texts(valid)
    with pytest.raises(InputError, match=r"val_split has no effect, because .* from valid\.jsonl"):
        load(tmp_path, rows, val_split=0.1)
    with pytest.raises(InputError, match=r"val_split has no effect, because .* from valid\.jsonl"):
        load_split(tmp_path, TOKENIZER, Options(val_split=0.1), "valid")
    assert load(tmp_path, rows, val_split=0)[1].n_rows == 1


@pytest.mark.parametrize("make", [row, pair])
def test_equal_rows_are_counted_and_left_out_if_asked(tmp_path, make):
    method = "dpo" if make is pair else "sft"
    rows = [make(1), make(2), make(1, id=3), make(3), make(2, other=None), make(1)]
    train, _ = load(tmp_path, rows, method=method)
    assert len(train) == 6 and not train.said
    assert inspect(tmp_path, TOKENIZER, Options(method=None)).duplicates == 3
    train, _ = load(tmp_path, rows, method=method, dedup=True)
    assert [own.source for own in train.rows] == [f"train.jsonl:{n}" for n in (1, 2, 4)]
    assert train.said == ("3 rows that repeat an earlier row are dropped (dedup)",)
    assert train.n_rows == train.notes.rows == 3
    report = inspect(tmp_path, TOKENIZER, Options(method=None, dedup=True))
    assert (report.n_train, report.duplicates) == (3, 3)


def test_a_row_of_several_samples_is_one_row(tmp_path):
    """If a template drops earlier reasoning, each turn becomes a separate sample. The samples of a
    row are held out and deduplicated together."""
    tokenizer = byte_level(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [
        {
            "messages": [
                {"role": ("user", "assistant")[i % 2], "content": f"{n} {i}"} for i in range(4)
            ]
        }
        for n in range(150)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows * 2))
    train, valid = load_dataset(tmp_path, tokenizer, Options(val_split=30))
    assert len(valid) > valid.n_rows == valid.notes.rows == 30
    assert train.n_rows == 270 and not {x.source for x in train.rows} & {
        x.source for x in valid.rows
    }
    train, _ = load_dataset(tmp_path, tokenizer, Options(val_split=0, dedup=True))
    assert train.n_rows == 150 and len(train) == 300


def test_rows_of_both_sets_are_reported(tmp_path):
    rows = [row(n) for n in range(10)]
    _, valid = load(tmp_path, rows, [row(3, id=1), row(4), row(11)])
    assert valid.said == ("2 of 3 rows are also in train.jsonl",)
    _, valid = load(tmp_path, rows, [row(11)])
    assert not valid.said


def test_findings_are_told_of_the_side_where_they_are(tmp_path):
    rows = [row(n) for n in range(200)]
    for n in range(0, 200, 2):
        rows[n]["completion"] += " <|im_end|> and on"
    train, valid = load(tmp_path, rows, prompt_format="chat")
    found = train.notes.findings["special"] + valid.notes.findings["special"]
    assert found == 100 and valid.notes.findings["special"] <= 10
    assert len(train.notes.where["special"]) == 20
    lines = {own.source for own in valid.rows}
    assert set(valid.notes.where["special"]) <= lines
    with pytest.raises(InputError, match="100 of 200 samples a message contains the text"):
        load(tmp_path, rows, prompt_format="chat", strict=True)
