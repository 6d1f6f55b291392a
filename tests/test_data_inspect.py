"""Tests the report on a data set, with and without a tokenizer."""

import json
from html.parser import HTMLParser

import pytest

from lib.chats import byte_level, chat, metaspace
from mlx_segtrain import InputError
from mlx_segtrain.commands.leaflet import write_report
from mlx_segtrain.commands.views import show_report
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


@pytest.mark.parametrize("how", [{"dedup": True}, {"val_split": 0.5}])
def test_without_tokenizer_no_row_is_left_out(how, tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"}, {"text": "a"})
    assert "have no effect without the tokenizer" in str(
        inspect(tmp_path, None, Options(**how)).error
    )


def test_prompts_have_no_loss(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    report = inspect(path, byte_level(), Options(method="grpo", max_completion_tokens=9))
    assert report.ok and (report.n_train, len(report.previews)) == (2, 2)
    fields = ("samples", "trained_turns", "tokens", "supervised_tokens", "epoch", "packed")
    assert {getattr(report, name) for name in (*fields, "truncated", "dropped")} == {None}
    show_report(report)
    printed = capsys.readouterr().out.partition("tokens in the loss are in")[0]
    assert "rows     2 to train" in printed and "loss" not in printed and "padding" not in printed


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
    # Each row except the last consists of <s> Q X, n repetitions of W, and Z </s>. In the last row,
    # the prompt alone is longer than 20 tokens.
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
    # Rows without tokens in the loss are shown too, with the reason.
    write(tmp_path / "train.jsonl", {"messages": chat("Hello")}, {"prompt": "a", "completion": ""})
    report = inspect(tmp_path, byte_level(), Options(append_eos=False, prompt_format="raw"))
    assert not report.ok and "anything to train on" in (report.error or "")
    assert len(report.previews) == 2 and report.n_train == 2
    write(tmp_path / "train.jsonl", {"text": "a"})
    write(tmp_path / "valid.jsonl", {"messages": [{}]})
    report = inspect(tmp_path, byte_level())
    assert not report.ok and (report.error or "").startswith("valid.jsonl:1: ")


def test_what_an_epoch_takes(tmp_path):
    """Tests the statistics of an unpacked and a packed epoch, of the row lengths, of the longest
    rows and of duplicates."""
    rows = [{"text": "W" * n} for n in (1, 1, 2, 5, 30, 14, 6, 1)]  # plus <s> and </s>
    path = write(tmp_path / "data.jsonl", *rows)
    how = {"batch_size": 2, "accumulation": 2, "step_s": 3.0}
    report = inspect(path, byte_level(), Options(max_seq_length=16), **how)
    assert report.ok and report.duplicates == 2 and report.formats == {"text": 8}
    found = [(own.first, own.last, own.count) for own in report.histogram]
    assert found == [(3, 4, 4), (5, 8, 2), (9, 16, 1), (17, 32, 1)]
    assert report.longest[:2] == [("data.jsonl:5", 32), ("data.jsonl:6", 16)]
    assert len(report.longest) == 5
    assert report.epoch is not None and report.packed is not None
    assert (report.epoch.rows, report.epoch.steps, report.epoch.seconds) == (8, 2.0, 6.0)
    assert 0 < report.epoch.unused < 1
    # 3 + 3 + 3 + 4 + 7 + 8 + 16 + 16 tokens are packed into rows of 16.
    assert (report.packed.rows, report.packed.steps) == (4, 1.0)
    assert report.packed.unused == pytest.approx(1 - 60 / 64)
    alone = inspect(path, byte_level(), Options(max_seq_length=16), batch_size=9)
    assert alone.ok and alone.epoch is None and alone.packed is not None


def test_pairs_are_not_packed(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    report = inspect(write(tmp_path / "data.jsonl", row), byte_level(), Options(method="dpo"))
    assert report.ok and report.packed is None and report.epoch is not None


def test_the_lengths_of_one_row(tmp_path):
    report = inspect(write(tmp_path / "data.jsonl", {"text": "W" * 6}), byte_level())
    assert [(own.first, own.last, own.count) for own in report.histogram] == [(8, 8, 1)]


class Page(HTMLParser):
    """Collects a page's text and the names and attributes of its elements."""

    def __init__(self, text):
        super().__init__()
        self.names, self.attributes, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_a_page_to_pass_on(tmp_path):
    """HTML in a row, a column name or a file name is displayed as text."""
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    row = {"prompt": evil, "completion": f"fine {evil} & " + "W" * 300, evil: 1}
    path = write(tmp_path / "<b>&.jsonl", row, row)
    report = inspect(path, byte_level(), Options(max_seq_length=200))
    write_report(tmp_path / "a.html", report, path, 200)
    page = Page((tmp_path / "a.html").read_text())
    assert not {"script", "img", "b", "link", "iframe"} & page.names
    assert not {"src", "href", "onerror"} & {name for name, _ in page.attributes}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    for word in (evil, "<b>&.jsonl:1", "Rows that repeat an earlier row"):
        assert word in page.text
    assert "mark" in page.names and ("class", "cut") in page.attributes
    bad = inspect(write(tmp_path / "bad.jsonl", {evil: 1}))
    write_report(tmp_path / "b.html", bad, None, 200)
    page = Page((tmp_path / "b.html").read_text())
    assert evil[:20] in page.text and "script" not in page.names
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "no" / "a.html", report, path, 200)
