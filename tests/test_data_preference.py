"""Tests pairs of responses: row formats, tokens, shared tokens, and truncation."""

import json
from itertools import islice

import numpy as np
import pytest

from lib.chats import LLAMA3, THINKING, TOOLS, byte_level, ids, metaspace, trained
from mlx_segtrain.data import (
    Options,
    Pair,
    PairBatch,
    Row,
    batches,
    eval_batches,
    inspect,
    load_dataset,
)
from mlx_segtrain.errors import InputError

USER = {"role": "user", "content": "a question"}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(bos=False)


def load(folder, tokenizer, *rows, method="dpo", length=500, **options):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    format = "raw" if any(isinstance(row.get("prompt"), str) for row in rows) else "auto"
    how = {"max_seq_length": length, "method": method, "prompt_format": format, **options}
    return load_dataset(folder, tokenizer, Options(**how))[0]


def text_pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def texts(tokenizer, pair):
    return [tokenizer.decode(row.ids.tolist()) for row in (pair.chosen, pair.rejected)]


def shown(tokenizer, row):
    """Returns the text of a sequence, with the response in brackets."""
    inside = row.weights > 0
    first, last = np.flatnonzero(inside)[[0, -1]]
    assert inside[first : last + 1].all()
    parts = row.ids[:first], row.ids[first : last + 1], row.ids[last + 1 :]
    before, response, behind = (tokenizer.decode(part.tolist()) for part in parts)
    return f"{before}[{response}]{behind}"


def test_forms_of_a_conversation_are_the_same_tokens(tmp_path, tokenizer):
    data = load(
        tmp_path,
        tokenizer,
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]},
        {"prompt": [USER], "chosen": [says("yes")], "rejected": "no"},
        {"chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
        {"prompt": None, "chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
    )
    assert data.format == "preference" and data.n_rows == 5
    assert [pair.source for pair in data.rows] == [f"train.jsonl:{i}" for i in (1, 2, 3, 4, 5)]
    for pair in data.rows:
        assert isinstance(pair, Pair)
        assert pair.chosen.ids.tolist() == data.rows[0].chosen.ids.tolist()
        assert pair.rejected.ids.tolist() == data.rows[0].rejected.ids.tolist()
    start = "<|im_start|>user\na question<|im_end|>\n<|im_start|>assistant\n"
    assert shown(tokenizer, pair.chosen).rstrip("\n") == f"{start}[yes<|im_end|>]"
    assert shown(tokenizer, pair.rejected).rstrip("\n") == f"{start}[no<|im_end|>]"
    assert pair.shared == int(np.flatnonzero(pair.chosen.weights)[0])


def test_earlier_turns_of_the_prompt_are_context(tmp_path, tokenizer):
    prompt = [USER, says("an answer"), {"role": "user", "content": "more"}]
    (pair,) = load(tmp_path, tokenizer, {"prompt": prompt, "chosen": "yes", "rejected": "no"}).rows
    assert shown(tokenizer, pair.chosen).rstrip("\n").endswith("[yes<|im_end|>]")


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_every_assistant_message_of_a_response_counts(tmp_path, tokenizer, train_on):
    longer = [says("one"), {"role": "tool", "content": "more"}, says("two")]
    row = {"prompt": [USER], "chosen": longer, "rejected": "no"}
    (pair,) = load(tmp_path, tokenizer, row, train_on=train_on).rows
    assert trained(pair.chosen, tokenizer) == ["one<|im_end|>", "two<|im_end|>"]
    assert trained(pair.rejected, tokenizer) == ["no<|im_end|>"]


def test_tools_reach_the_template(tmp_path):
    tokenizer = byte_level(TOOLS)
    row = text_pair([USER], "yes", "no") | {"tools": [{"name": "add"}]}
    (pair,) = load(tmp_path, tokenizer, row).rows
    assert all(text.startswith('[{"name": "add"}]\n') for text in texts(tokenizer, pair))


def test_a_column_that_nothing_reads_is_counted_once_a_pair(tmp_path, tokenizer):
    rows = [text_pair("QQ", "W", "Z") | {"id": 1}, text_pair("QQ", "W", "Z")]
    data = load(tmp_path, tokenizer, *rows)
    assert data.notes.ignored == {"id": 1} and data.notes.rows == 2


def test_a_text_prompt_has_bos_once_and_eos(tmp_path):
    tokenizer = byte_level()
    rows = [
        text_pair("2 and 3 are ", "five", "six"),
        text_pair("<s>2 and 3 are ", "five</s>", "six</s>"),
    ]
    for pair in load(tmp_path, tokenizer, *rows).rows:
        assert shown(tokenizer, pair.chosen) == "<s>2 and 3 are [five</s>]"
        assert shown(tokenizer, pair.rejected) == "<s>2 and 3 are [six</s>]"
    (pair,) = load(tmp_path, tokenizer, rows[0], append_eos=False).rows
    assert texts(tokenizer, pair) == ["<s>2 and 3 are five", "<s>2 and 3 are six"]
    with pytest.raises(InputError, match=r"train\.jsonl:1 chosen: .* no end-of-sequence token"):
        load(tmp_path, byte_level(eos=None), rows[0])


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),  # each letter is a token
    [
        ("WX", "ZZ", 3),  # <s> Q Q
        ("WX", "WZ", 4),  # <s> Q Q W
        ("W", "WZ", 3),  # the last two tokens of <s> Q Q W </s> are not shared
        ("", "Z", 2),
    ],
)
def test_what_a_pair_shares(tmp_path, chosen, rejected, shared):
    (pair,) = load(tmp_path, byte_level(), text_pair("QQ", chosen, rejected)).rows
    assert (len(pair.chosen), len(pair.rejected)) == (4 + len(chosen), 4 + len(rejected))
    assert pair.shared == shared
    assert len(pair) == len(pair.chosen) + len(pair.rejected) - shared


def test_sequences_that_are_too_short_share_nothing(tmp_path):
    for n, shared in ((3, 1), (2, 0)):
        row = Row(np.arange(n, dtype=np.int32), np.ones(n, np.float32), "train.jsonl:1 chosen")
        pair = Pair.of(row, row, "train.jsonl:1")
        assert (pair.shared, len(pair)) == (shared, 2 * n - shared)
    row = Row(np.zeros(1, np.int32), np.zeros(1, np.float32), "train.jsonl:1 chosen")
    assert Pair.of(row, row, "train.jsonl:1").shared == 0


def test_the_prompt_keeps_its_tokens_where_a_response_would_merge_with_it(tmp_path):
    tokenizer = byte_level()
    assert ids(tokenizer, "The sky") != ids(tokenizer, "The s", "ky")
    (pair,) = load(tmp_path, tokenizer, text_pair("The s", "ky", "X")).rows
    assert pair.chosen.ids.tolist() == ids(tokenizer, "<s>", "The s", "ky", "</s>")
    assert pair.rejected.ids.tolist() == ids(tokenizer, "<s>", "The s", "X", "</s>")
    assert pair.shared == len(ids(tokenizer, "<s>", "The s"))


def test_prompts_that_end_in_other_tokens(tmp_path):
    tokenizer = metaspace()
    row = text_pair("The sky is gr", "een", "QQ")  # the token "▁green" is in the response
    (whole,) = load(tmp_path, tokenizer, row).rows
    starts = [int(np.argmax(own.weights > 0)) for own in (whole.chosen, whole.rejected)]
    assert starts[0] < starts[1] and whole.shared == starts[0]
    most = starts[0] - 2  # keeps <s> and one token of the shorter prompt
    for wanted, cut in ((1, 1), (most, most), (most + 1, most)):
        length = len(whole.rejected) - wanted
        data = load(tmp_path, tokenizer, row, length=length)
        assert (data.prompts_cut, data.truncated) == (1, int(wanted > cut))
        for side in ("chosen", "rejected"):
            own, full = getattr(data.rows[0], side), getattr(whole, side)
            for left, all_ in ((own.ids, full.ids), (own.weights, full.weights)):
                assert left.tolist() == [all_[0], *all_[1 + cut :]][:length]


@pytest.mark.parametrize(
    "prompt", [[USER], "a long prompt of many words, of which the end counts "]
)
def test_the_prompt_is_cut_on_the_left_in_both_alike(tmp_path, prompt):
    tokenizer = byte_level(bos=True) if isinstance(prompt, str) else byte_level(bos=False)
    row = {"prompt": prompt, "chosen": "good answer", "rejected": "bad"}
    (whole,) = load(tmp_path, tokenizer, row).rows
    n = len(whole.chosen) - 7
    data = load(tmp_path, tokenizer, row, length=n)
    (pair,) = data.rows
    assert (data.prompts_cut, data.truncated, data.dropped) == (1, 0, 0)
    bos = int(isinstance(prompt, str))
    for cut, full in ((pair.chosen, whole.chosen), (pair.rejected, whole.rejected)):
        assert cut.ids.tolist() == [*full.ids[:bos], *full.ids[bos + 7 :]]
        assert np.count_nonzero(cut.weights) == np.count_nonzero(full.weights)
    assert len(pair.chosen) == n and pair.shared == whole.shared - 7


@pytest.mark.parametrize(
    ("length", "chosen", "rejected", "prompts_cut", "truncated", "shared"),
    [
        (11, "<s>QQQXZWW</s>", "<s>QQQXZWVVV</s>", 0, 0, 7),
        (10, "<s>QQXZWW</s>", "<s>QQXZWVVV</s>", 1, 0, 6),
        (7, "<s>ZWW</s>", "<s>ZWVVV</s>", 1, 0, 3),
        (6, "<s>ZWW</s>", "<s>ZWVVV", 1, 1, 3),
        (4, "<s>ZWW", "<s>ZWV", 1, 1, 2),
        (3, "<s>ZW", "<s>ZW", 1, 1, 1),
    ],
)
def test_how_a_pair_is_cut(tmp_path, length, chosen, rejected, prompts_cut, truncated, shared):
    tokenizer = byte_level()
    data = load(tmp_path, tokenizer, text_pair("QQQXZ", "WW", "WVVV"), length=length)
    (pair,) = data.rows
    assert texts(tokenizer, pair) == [chosen, rejected]
    assert (data.prompts_cut, data.truncated, data.dropped) == (prompts_cut, truncated, 0)
    assert pair.shared == shared and data.tokens == len(pair)
    responses = [text.partition("Z")[2] for text in (chosen, rejected)]
    assert [trained(own, tokenizer) for own in (pair.chosen, pair.rejected)] == [
        [text] for text in responses
    ]
    counts = [len(ids(tokenizer, text)) for text in responses]
    assert data.supervised_tokens == sum(counts)


def test_a_response_is_cut_on_the_right_and_counted(tmp_path, tokenizer):
    rows = [
        {"prompt": "x", "chosen": "a long answer of many words, " * 3, "rejected": "short"},
        {"prompt": "x", "chosen": "yes", "rejected": "no"},
    ]
    data = load(tmp_path, tokenizer, *rows, length=12)
    assert (data.truncated, data.dropped, len(data.rows)) == (1, 0, 2)
    assert len(data.rows[0].chosen) == 12 and data.rows[0].chosen.weights[-1] == 1
    assert data.supervised_tokens == sum(
        np.count_nonzero(row.weights) for p in data.rows for row in (p.chosen, p.rejected)
    )


def test_pairs_without_a_response_are_dropped(tmp_path):
    tokenizer = byte_level()
    rows = [text_pair("Q", "W", "Z"), text_pair("QQ", "", "Z"), text_pair("Q", "W", "")]
    data = load(tmp_path, tokenizer, *rows, append_eos=False)
    assert (data.n_rows, len(data.rows), data.dropped) == (3, 1, 2)
    assert (data.truncated, data.prompts_cut) == (0, 0)
    assert (data.tokens, data.supervised_tokens) == (5, 2)  # <s> is counted once, and Q twice
    with pytest.raises(InputError, match=r"max_seq_length = 2; raise it \(.* has 4 tokens\)"):
        load(tmp_path, tokenizer, rows[0], length=2)


def test_batches_share_what_all_their_pairs_do(tmp_path, tokenizer):
    rows = [{"prompt": "same " * n, "chosen": "yes", "rejected": "no, not"} for n in (3, 5, 8, 9)]
    data = load(tmp_path, tokenizer, *rows)
    (batch,) = eval_batches(data, 4)
    assert isinstance(batch, PairBatch)
    assert batch.shared == min(pair.shared for pair in data.rows)
    assert (
        batch.chosen.tokens[:, : batch.shared] == batch.rejected.tokens[:, : batch.shared]
    ).all()
    for side in ("chosen", "rejected"):
        own = getattr(batch, side)
        assert own.tokens.shape[1] % 32 == 0
        assert own.lengths.tolist() == [len(getattr(pair, side)) for pair in data.rows]
        for b, pair in enumerate(data.rows):
            n = own.lengths[b]
            assert own.tokens[b, :n].tolist() == getattr(pair, side).ids.tolist()
            assert not own.weights[b, n:].any()
    assert batch.rows.tolist() == [0, 1, 2, 3] and batch.reference is None
    (first, second) = eval_batches(data, 2)
    assert first.shared == batch.shared < second.shared == data.rows[2].shared
    (one, *_) = eval_batches(data, 1)
    assert one.chosen.tokens.tolist() == [data.rows[0].chosen.ids.tolist()]


def test_training_batches_are_the_same_for_the_same_seed(tmp_path, tokenizer):
    rows = [text_pair("Q" * n, "W", "ZZ") for n in (9, 3, 5, 8, 4)]
    data = load(tmp_path, tokenizer, *rows)

    def order(seed, start=0):
        source = batches(data, 2, seed, start)
        return [batch.rows.tolist() for batch in islice(source, 12 - start)]

    assert order(0) == order(0) != order(1)
    assert order(0, start=5) == order(0)[5:]
    for batch in islice(batches(data, 2, 0), 4):
        assert isinstance(batch, PairBatch)
        assert batch.shared == min(data.rows[i].shared for i in batch.rows)
        assert batch.chosen.rows.tolist() == batch.rejected.rows.tolist() == batch.rows.tolist()


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"chosen": "a", "rejected": "b"}, "the pair has no prompt"),
        (
            text_pair("x", 7, "b"),
            '"chosen" must be a string too, not a number',
        ),
        (
            text_pair("x", "a", [USER, says("b")]),
            'not a list; if "rejected" also contains the prompt, remove "prompt"',
        ),
        (text_pair(None, "a", "b"), "the pair has no prompt"),
        (text_pair(7, "a", "b"), '"prompt" must be a string or a list, not a number'),
        (text_pair([USER], "a", 7), '"rejected" must be a string or a list, not a number'),
        (text_pair([USER], "a", [7]), '"rejected"[0] must be an object, not a number'),
        (text_pair([USER], "a", "b") | {"tools": {}}, '"tools" must be a list, not an object'),
        ({"chosen": [says("a")], "rejected": [says("b")]}, "the pair has no prompt"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "the pair has no prompt"),
        (
            {"chosen": [USER, says("a")], "rejected": [USER]},
            '"rejected" adds no assistant message to the prompt',
        ),
        ({"chosen": [USER, says("a")], "rejected": [USER, says("a")]}, "to the prompt; add a"),
        (text_pair([USER], [USER], "b"), '"chosen" adds no assistant message to the prompt'),
        (text_pair([{**USER, "train": False}], "a", "b"), "have no effect on responses"),
        (
            {"prompt": [USER], "chosen": [{**says("a"), "weight": 2}], "rejected": "b"},
            '"train" and "weight" have no effect on responses',
        ),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, '"prompt"[0]: "content"'),
        ({"text": "x"}, 'must have the keys "prompt", "chosen" and "rejected" for method dpo'),
    ],
)
def test_rows_that_are_no_pairs(tmp_path, tokenizer, row, error):
    with pytest.raises(InputError) as caught:
        load(tmp_path, tokenizer, row)
    assert error in str(caught.value) and str(caught.value).startswith("train.jsonl:1: ")


def test_a_template_that_rewrites_a_turn_of_a_response_is_refused(tmp_path):
    rows = [text_pair([USER], "yes", "no"), text_pair([USER], "yes", [says("a"), USER, says("b")])]
    tokenizer = byte_level(THINKING)
    assert len(load(tmp_path, tokenizer, rows[0]).rows) == 1
    with pytest.raises(InputError, match=r"train\.jsonl:2 rejected: .* a single assistant message"):
        load(tmp_path, tokenizer, *rows)


def test_pairs_come_before_other_formats(tmp_path, tokenizer):
    others = {"messages": [USER, says("a")], "completion": "c", "text": "t"}
    assert load(tmp_path, tokenizer, text_pair("x", "a", "b") | others).format == "preference"


def test_methods_and_rows_must_fit(tmp_path, tokenizer):
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match="which method sft does not accept: use method dpo"):
        load(tmp_path, tokenizer, pair, method="sft")
    with pytest.raises(InputError, match=r"train\.jsonl:2: .* keys .* for method orpo"):
        load(tmp_path, tokenizer, pair, {"text": "x"}, method="orpo")
    report = inspect(tmp_path / "train.jsonl")
    assert not report.ok and "pairs and other rows cannot be mixed" in report.error


def test_inspection_shows_both_sequences(tmp_path, tokenizer):
    load(tmp_path, tokenizer, {"prompt": [USER], "chosen": "yes", "rejected": "no"})
    report = inspect(tmp_path, tokenizer)
    assert report.ok and (report.format, report.n_train) == ("preference", 1)
    assert [p.source for p in report.previews] == ["train.jsonl:1 chosen", "train.jsonl:1 rejected"]
    trained = ["".join(t for t, on, _ in p.tokens if on) for p in report.previews]
    assert trained == ["yes<|im_end|>", "no<|im_end|>"]
    assert report.length_max == report.tokens and report.prompts_cut == 0


def test_inspection_counts_what_is_cut(tmp_path):
    tokenizer = byte_level()
    load(tmp_path, tokenizer, text_pair("QQQ", "WW", "ZZ"), text_pair("Q", "W", "Z"))
    report = inspect(
        tmp_path, tokenizer, Options(max_seq_length=5, method="dpo", prompt_format="raw")
    )
    assert (report.length_min, report.length_max) == (6, 10)  # <s> and the prompt are counted once
    assert (report.truncated, report.prompts_cut, report.dropped) == (0, 1, 0)
    assert "".join(text for text, *_ in report.previews[0].tokens) == "<s>QWW</s>"
    assert "use method dpo, orpo, simpo or kto" in (
        inspect(tmp_path, tokenizer, Options(method="sft")).error or ""
    )


def test_another_template(tmp_path):
    tokenizer = byte_level(LLAMA3)
    (pair,) = load(tmp_path, tokenizer, {"prompt": [USER], "chosen": "yes", "rejected": "no"}).rows
    assert shown(tokenizer, pair.chosen).endswith("[yes<|eot|>]")
