"""Tests the output of all commands with --quiet, --verbose and --log-file."""

import re
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from mlx_segtrain import events, training
from mlx_segtrain.commands import main as cli
from mlx_segtrain.commands.output import Output, copying
from mlx_segtrain.commands.terminal import Terminal

EVAL = ["eval", "--model", "m", "--data", "d"]
RESULT = training.EvalResult(2.0, 7.389, {}, 1000, 10, 1, 2)
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d (.*)")


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch):
    """Replaces the evaluation with a function that reports only progress and a warning."""

    def run(config, adapter, *, split, on_event):
        on_event(events.stage("load", 0.1, "the model is loaded"))
        on_event(events.evaluating(1, 1, 0.0))
        on_event(events.warning("one row is odd"))
        return RESULT

    own = create_autospec(training.evaluate, side_effect=run)
    monkeypatch.setattr(training, "evaluate", own)
    return own


def test_every_command_that_takes_a_moment_has_the_options() -> None:
    _, commands = cli.parsers()
    assert {*cli.AT_ONCE} < {*commands}
    for name, parser in commands.items():
        if name not in cli.AT_ONCE:
            assert {"--quiet", "--verbose", "--log-file"} <= {*parser.names()}, name


@pytest.mark.parametrize(
    ("flags", "told", "warned"),
    [
        ([], ["evaluating"], True),
        (["--quiet"], [], True),
        (["--verbose"], ["the model is loaded", "evaluating"], True),
    ],
)
def test_what_is_told_besides_the_result(flags, told, warned, evaluate, capsys) -> None:
    assert cli.main([*EVAL, *flags]) == 0
    out, err = capsys.readouterr()
    assert "loss        2.0000" in out and "evaluating" not in out
    lines = ["the model is loaded", "evaluating"]
    assert [line for line in lines if line in err] == told
    assert ("warning: one row is odd" in err) == warned


def test_the_log_has_what_is_shown_each_line_once_and_its_time(evaluate, capsys, tmp_path) -> None:
    log = tmp_path / "log.txt"
    assert cli.main([*EVAL, "--log-file", str(log)]) == 0
    out, err = capsys.readouterr()
    lines = [LINE.fullmatch(line)[1] for line in log.read_text().splitlines()]
    shown = [line for line in (err + out).splitlines() if line.strip()]
    assert sorted(lines) == sorted(shown) and "loss        2.0000 nats per token" in lines
    assert cli.main([*EVAL, "--split", "train", "--quiet", "--log-file", str(log)]) == 0
    assert len(log.read_text().splitlines()) > len(lines)  # new lines are appended


def test_the_log_has_the_error_with_which_a_command_ends(capsys, tmp_path) -> None:
    log = tmp_path / "log.txt"
    asked = ["inspect", "nowhere.csv", "--log-file", str(log)]
    assert cli.main(asked) == 2
    said = capsys.readouterr().err.strip().removeprefix("mlx-segtrain: ")
    assert LINE.fullmatch(log.read_text().strip())[1] == said
    assert cli.main(["inspect", "nowhere.csv", "--log-file", str(tmp_path)]) == 2
    assert "--log-file" in capsys.readouterr().err
    Terminal().say("later")
    assert "later" not in log.read_text()  # --log-file applies only until the command ends


def test_whole_lines_are_noted_whatever_parts_they_come_in() -> None:
    noted: list[str] = []
    with copying(noted.append):
        print("a \x1b[31mred\x1b[0m", end="")
        print(" word\nand an end", end="")
        print("a fault", file=sys.stderr)
    assert noted == ["a \x1b[31mred\x1b[0m word", "a fault", "and an end"]


def test_a_log_is_plain_text(tmp_path: Path) -> None:
    own = Output(log_file=tmp_path / "log")
    own.note("a \x1b[31mred\x1b[0m word\n\n")
    own.close()
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.endswith(" a red word")
