"""The report on a data set, with and without a tokenizer."""

import json

import pytest

from lib.chats import byte_level, chat, metaspace
from mlx_segtrain.data import Options, inspect


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_without_tokenizer_formats_and_counts(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"}, {"text": "b"})
    write(tmp_path / "valid.jsonl", {"text": "c"})
    report = inspect(tmp_path)
    assert (report.ok, report.error, report.format) == (True, None, "text")
    assert (report.n_train, report.n_valid, report.tokens, report.previews) == (2, 1, None, [])


def test_one_file_with_tokenizer(tmp_path):
    rows = [{"prompt": "QX", "completion": "W" * n + "Z"} for n in range(20)]
    path = write(tmp_path / "data.jsonl", *rows, {"prompt": "Q" * 30, "completion": "W"})
    report = inspect(
        path, byte_level(), Options(max_seq_length=20, prompt_format="raw"), n_preview=2
    )
    assert report.ok and (report.format, report.n_train, report.n_valid) == (
        "prompt-completion",
        21,
        0,
    )
    # <s> Q X, n times W, Z </s>; the last row's prompt alone is longer than 20 tokens.
    assert (report.length_min, report.length_median, report.length_p95) == (5, 15, 24)
    assert report.length_max == 33
    assert (report.truncated, report.dropped) == (4, 1)
    assert report.tokens == sum(min(20, 5 + n) for n in range(20))
    assert report.supervised_tokens == report.tokens - 3 * 20
    assert [preview.source for preview in report.previews] == ["data.jsonl:1", "data.jsonl:2"]
    context = [("<s>", False, 0.0), ("Q", False, 0.0), ("X", False, 0.0)]
    assert report.previews[0].tokens == [*context, ("Z", True, 1.0), ("</s>", True, 1.0)]


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_preview_texts_add_up(tmp_path, make):
    content = "Hello there, how are you" if make is metaspace else "é🎉 fine — ok\n"
    path = write(tmp_path / "data.jsonl", {"text": content}, {"text": content + "x"})
    for preview in inspect(path, make()).previews:
        assert "".join(text for text, *_ in preview.tokens).startswith("<s>")
        assert content in "".join(text for text, *_ in preview.tokens)


def test_preview_weights(tmp_path):
    messages = chat("a", "fine")
    messages[1]["weight"] = 0.5
    path = write(tmp_path / "data.jsonl", {"messages": messages})
    (preview,) = inspect(path, byte_level()).previews
    shown = [(text, weight) for text, trained, weight in preview.tokens if trained]
    assert "".join(text for text, _ in shown) == "fine<|im_end|>"
    assert {weight for _, weight in shown} == {0.5}


def test_errors_are_in_the_report(tmp_path):
    assert "does not exist" in (inspect(tmp_path / "none").error or "")
    write(tmp_path / "train.jsonl", {"text": "a"}, {"txt": "b"})
    report = inspect(tmp_path)
    assert not report.ok and (report.error or "").startswith("train.jsonl:2: ")
    # What is never trained is still shown, so that one sees why.
    write(tmp_path / "train.jsonl", {"messages": chat("Hello")}, {"prompt": "a", "completion": ""})
    report = inspect(tmp_path, byte_level(), Options(append_eos=False, prompt_format="raw"))
    assert not report.ok and "nothing to train" in (report.error or "")
    assert len(report.previews) == 2 and report.n_train == 2
    write(tmp_path / "train.jsonl", {"text": "a"})
    write(tmp_path / "valid.jsonl", {"messages": [{}]})
    report = inspect(tmp_path, byte_level())
    assert not report.ok and (report.error or "").startswith("valid.jsonl:1: ")
