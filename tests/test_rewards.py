"""Tests the scores of checks, functions and commands, and which rewards are refused."""

import shlex
import sys
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from threading import Thread

import numpy as np
import pytest

from mlx_segtrain import InputError, RunError, TrainConfig
from mlx_segtrain.data import Row
from mlx_segtrain.rewards import Rewards, check_rows
from mlx_segtrain.rewards.checks import check_of, last_number


def config_of(**changes):
    paths = {"model_dir": "m", "adapter_path": "a"}
    return TrainConfig(**paths, method="grpo", **changes)


def scores(rewards, completions, **columns):
    rows = [
        {"prompt": f"p{i}", **{name: x[i] for name, x in columns.items()}}
        for i in range(len(completions))
    ]
    return rewards(rows, completions, [len(text) for text in completions])


@pytest.mark.parametrize(
    ("spec", "completions", "columns", "wanted"),
    [
        ("exact:answer", [" 7\n", "7.", "8"], {"answer": [7, "7", "7"]}, [1, 0, 0]),
        ("number:answer", ["so 1,234.50", "3 or 4", "no"], {"answer": ["1234.5", 3, 1]}, [1, 0, 0]),
        ("regex:^yes$", ["yes", "yes!", "no\nyes"], {}, [1, 0, 0]),
        ("length:4", ["abcd", "abcdef", "a" * 8, "a" * 20], {}, [1, 0.5, 0, 0]),
        (
            'json_schema:{"type": "object", "required": ["a"]}',
            ['{"a": 1}', '{"b": 1}', "{", '{"a": 1} and so on'],
            {},
            [1, 0, 0, 0],
        ),
    ],
)
def test_checks(spec, completions, columns, wanted):
    found = scores(Rewards.of(config_of(rewards=[spec])), completions, **columns)
    assert found.total == wanted and list(found.by_name) == [spec.partition(":")[0]]


def test_last_number():
    assert last_number("From 3 to -4.5e1.") == -45
    assert last_number("none") is None
    texts = ("$.25", "is -.5", "of \u22125", "7e\u22122", "in 1.2.3", "end.5", "1,234.5", "1,23")
    assert list(map(last_number, texts)) == [0.25, -0.5, -5, 0.07, 3, 5, 1234.5, 23]


def test_a_pattern_takes_linear_time():
    check = check_of("regex:^(a+)+$")
    assert check(completions=["a" * 5000 + "b"]) == [0.0]


def test_functions_may_import_torch(tmp_path, monkeypatch):
    """Reward functions may import torch even though the command hides torch from transformers."""
    (tmp_path / "torch.py").write_text("length = len\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)  # like hide_torch()
    own = tmp_path / "own.py"
    own.write_text(
        "def longer(completions):\n    import torch\n    return [*map(torch.length, completions)]\n"
    )
    rewards = Rewards.of(config_of(reward_functions=[f"{own}:longer"]))
    assert scores(rewards, ["ab"]).total == [2]


def test_rewards_of_all_kinds_are_summed_by_their_weights(tmp_path):
    (tmp_path / "own.py").write_text(
        "def longer(completions): return [len(x) for x in completions]"
    )
    (tmp_path / "score.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)\n"
        "    print(int(row['completion'] == row['prompt']) + row['bonus'])\n"
    )
    config = config_of(
        rewards=["exact:answer", "exact:other"],
        reward_functions=[f"{tmp_path / 'own.py'}:longer"],
        reward_command=shlex.join([sys.executable, str(tmp_path / "score.py")]),
        reward_weights=[1, 10, 0.5, 100, 2],
    )

    def numbers(prompts, completions, **columns):
        assert columns["answer"] == ["p0", "x"] and columns["completion_tokens"] == [2, 1]
        return [prompts[0] == "p0", 0]

    columns = {"answer": ["p0", "x"], "other": ["no", "y"], "bonus": [3, 4]}
    found = scores(Rewards.of(config, [numbers]), ["p0", "y"], **columns)
    assert found.by_name == {
        "exact": [1, 0],
        "exact 2": [0, 1],
        "longer": [2, 1],
        "numbers": [1, 0],
        "command": [4, 4],
    }
    assert found.total == [1 + 1 + 100 + 8, 10 + 0.5 + 8]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "method grpo needs a reward"),
        ({"rewards": ["exakt:answer"]}, "'exakt:answer' is not a check; use one of exact, number"),
        ({"rewards": ["exact"]}, "exact needs an argument, as in exact:answer"),
        ({"rewards": ["regex:("]}, r"'\(' is not a valid RE2 pattern"),
        ({"rewards": ["length:few"]}, "number of tokens, as in length:100; got 'few'"),
        ({"rewards": ["json_schema:{]"]}, "is not a valid JSON schema"),
        ({"reward_functions": ["nowhere.py:f"]}, "nowhere.py:f cannot be used .there is no file"),
        ({"reward_functions": ["json:nothing"]}, "json:nothing cannot be used"),
        ({"reward_functions": ["json"]}, "have the form module:function"),
        ({"reward_command": "score 'x"}, r"is not a valid command line \(No closing quotation\)"),
        ({"reward_command": " "}, "reward_command is empty"),
        ({"rewards": ["length:3"], "reward_weights": [1, 2]}, "2 values for 1 rewards"),
    ],
)
def test_rewards_that_cannot_be_used(changes, says):
    with pytest.raises(InputError, match=says):
        Rewards.of(config_of(**changes))


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_schema_fetches_nothing(scheme, tmp_path):
    """Schemas are not fetched, because that would let the server's clients read its files and reach
    its network."""
    (tmp_path / "own.json").write_text('{"type": "integer"}')
    how = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with HTTPServer(("127.0.0.1", 0), how) as server:
        places = {
            "file": (tmp_path / "own.json").as_uri(),
            "http": f"http://127.0.0.1:{server.server_port}/own.json",
        }
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with pytest.raises(
                InputError, match=r"is not a valid JSON schema .*Retrieval is disabled"
            ):
                check_of(f'json_schema:{{"$ref": "{places[scheme]}"}}')
        finally:
            server.shutdown()
            thread.join()
    check = check_of('json_schema:{"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}')
    assert check(completions=["3", "x"]) == [1, 0]


def fails(completions):
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (fails, r"reward fails failed \(KeyError: 'gone'\): fix it and resume"),
        (lambda completions: [1.0], "returned 1 scores for 2 completions"),
        (lambda completions: [1.0, float("nan")], "returned nan for the completion 'b'"),
        (lambda completions: [1.0, 10**5000], "returned inf for the completion 'b'"),
        (lambda completions: [None, 1.0], "returned None for the completion 'a'"),
    ],
)
def test_a_reward_that_fails_is_one_sentence(function, says):
    with pytest.raises(RunError, match=says):
        scores(Rewards.of(config_of(), [function]), ["a", "b"])


def test_a_column_that_is_missing():
    with pytest.raises(RunError, match='rows have no column "answer"'):
        scores(Rewards.of(config_of(rewards=["exact:answer"])), ["a"])


@pytest.mark.parametrize(
    ("changes", "given", "says"),
    [
        ({"rewards": ["exact:answer"]}, {"other": 1}, 'f:2: the row has no column "answer"'),
        ({"rewards": ["length:1", "number:n"]}, {}, 'no column "n", which the reward number:n'),
        (
            {},
            {"completions": 1},
            'f:2: the row has a column "completions", but this name is reserved',
        ),
        ({}, {"prompts": 1}, 'a column "prompts"'),
        ({}, {"completion_tokens": 1}, 'a column "completion_tokens"'),
        ({"reward_command": "true"}, {"completion": 1}, 'a column "completion"'),
    ],
)
def test_rows_that_rewards_cannot_read(changes, given, says):
    rows = [
        Row(np.zeros(1, np.int32), np.zeros(1, np.float32), f"f:{i}", given={"prompt": "a", **own})
        for i, own in enumerate(({"answer": 1, "n": 2}, given), 1)
    ]
    check_rows(config_of(**changes), rows[:1])
    with pytest.raises(InputError, match=says):
        check_rows(config_of(**changes), rows)


def test_a_completion_of_the_data_is_a_column_for_functions():
    own = Row(np.zeros(1, np.int32), np.zeros(1, np.float32), "f:1", given={"completion": "a"})
    check_rows(config_of(), [own])


def test_a_loss_that_is_none():
    with pytest.raises(ValueError, match="grpo_loss"):
        config_of(grpo_loss=["grpo"])


def test_a_command_that_fails():
    command = shlex.join([sys.executable, "-c", "raise SystemExit('out of order')"])
    with pytest.raises(RunError, match="reward_command exited with code 1: out of order"):
        scores(Rewards.of(config_of(reward_command=command)), ["a"])
