"""Tests a run's output: plain lines in a pipe, a progress bar in a terminal, and events without
NaN."""

import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlx_segtrain import InputError, events
from mlx_segtrain.adapters import folding
from mlx_segtrain.adapters.folding import Folded
from mlx_segtrain.commands.output import Output
from mlx_segtrain.commands.terminal import ROOM, Terminal
from mlx_segtrain.commands.views import show_checks, show_fold, show_report
from mlx_segtrain.commands.words import command_line, duration
from mlx_segtrain.data import Preview, Report
from mlx_segtrain.data.inspection import Bin, Epoch
from mlx_segtrain.ops import selfcheck as doctor


def run_events(iters: int = 20) -> list[events.Event]:
    def train(step: int) -> events.Event:
        return events.train_metric(
            step,
            iters,
            metrics={},
            loss=2.5 / step,
            grad_norm=1.0,
            learning_rate=1e-4,
            tokens_per_sec=12345.6,
            supervised_tokens_per_sec=1234.5,
            step_s=2.0,
            left_s=2.0 * (iters - step),
            peak_gb=3.25,
            active_gb=1.0,
        )

    return [
        events.started(),
        events.stage("load", 0.01, "loading the model"),
        events.stage("train", 0.05, "training", iters=iters, step=0),
        events.val_metric(0, iters, loss=math.log(8.0), tokens=100, metrics={}),
        train(10),
        train(20),
        events.val_metric(20, iters, loss=800.0, tokens=100, metrics={}),
        events.stage("done", 1.0, "", adapter_path="out", applied_ranks={}),
        events.done(Path("out")),
    ]


def show(width: int, terminal: bool, steps: bool = False, **how: Any) -> str:
    """Returns a run's output. With `steps`, it includes every step."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, highlight=False)
    with Terminal(console, Output(**how)) as terminal_:
        for event in run_events():
            if steps and event.get("kind") == "train":
                terminal_.step(event)
            terminal_(event)
    return out.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    # Lines must not be wrapped, even if they are longer than the terminal's width.
    lines = show(40, terminal=False).splitlines()
    assert lines == [
        "loading the model",
        "training",
        "step 0: validation loss 2.0794, perplexity 8.00",
        "step 10/20: loss 0.2500  1,234 supervised of 12,346 tokens/s  peak 3.25 GB  20s left",
        "step 20/20: loss 0.1250  1,234 supervised of 12,346 tokens/s  peak 3.25 GB  0s left",
        "step 20: validation loss 800.0000",
    ]


def test_a_bar_on_a_terminal() -> None:
    text = show(120, terminal=True)
    assert "\x1b[" in text and "━" in text
    assert "20/20" in text and "peak 3.25 GB" in text
    assert "validation loss 2.0794" in text


@pytest.mark.parametrize("width", [80, 160])
def test_the_bar_moves_with_every_step_and_fits_in_a_line(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, highlight=False)
    train = [event for event in run_events(1000) if event.get("kind") == "train"]
    with Terminal(console) as terminal:
        terminal(events.plan(0.02, "", 3_300_000_000, 8_000_000_000))
        terminal(events.stage("train", 0.05, "", iters=1000, step=0))
        for event in train:
            terminal.step(event | {"left_s": 1234.5})
            terminal._bar.refresh()
        (task,) = terminal._bar.tasks
        assert (task.completed, task.total) == (20, 1000)
    shown = [line for line in re.split(r"[\r\n]", plain(out.getvalue())) if "━" in line]
    assert any(line.rstrip().endswith("10/1000  " + FIGURES[width]) for line in shown)
    # A terminal echoes ^C after the bar. If the bar filled the line, the echo would wrap.
    assert all(len(line) <= width - ROOM and "…" not in line for line in shown)


#: The numbers beside the progress bar, for each terminal width.
FIGURES = {
    80: "loss 0.2500  12,346 tokens/s  3.25 of 8.00 GB  20m34s left",
    160: "loss 0.2500  1,234 supervised of 12,346 tokens/s  peak 3.25 of 8.00 GB  20m34s left",
}


def test_the_bar_ends_with_the_last_validation_and_nothing_left() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=True, highlight=False)
    with Terminal(console) as terminal:
        for event in run_events():
            terminal(event | ({"left_s": 9.0} if event.get("kind") == "train" else {}))
    last = [line for line in re.split(r"[\r\n]", plain(out.getvalue())) if "━" in line][-1]
    assert last.rstrip().endswith("peak 3.25 GB  0s left  validation 800.0000")


def plain(text: str) -> str:
    """Removes terminal escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_quiet_shows_warnings_and_results_alone() -> None:
    out = io.StringIO()
    with Terminal(Console(file=out, width=80, force_terminal=True), Output(quiet=True)) as terminal:
        for event in run_events():
            terminal(event)
            if event.get("kind") == "train":
                terminal.step(event)
        terminal(events.warning("the disk is full"))
        terminal.fact("training loss", "0.1")
    assert plain(out.getvalue()) == "warning: the disk is full\ntraining loss    0.1\n"


def test_verbose_shows_every_step_on_a_line_once() -> None:
    for terminal in (True, False):
        text = show(200, terminal, steps=True, verbose=True)
        assert "━" not in text
        assert text.count("step 10/20: loss 0.2500") == 1
        assert "rate 0.0001  gradient 1" in text


def test_ranks_are_compared_in_a_line() -> None:
    names = ("busy_s", "waited_s", "tokens_per_sec", "peak_gb")
    figures = [(0.5, 0.25, 2000.0, 1.0), (0.6, 0.15, 1500.0, 1.25), (0.4, 0.35, 2500.0, 1.0)]
    ranks = [dict(zip(names, own, strict=True)) for own in figures]
    metric = events.with_ranks(run_events()[4], ranks)
    assert (metric["slowest"], metric["skew_s"]) == (1, pytest.approx(0.2))
    for how in ({}, {"verbose": True}):
        out = io.StringIO()
        with Terminal(Console(file=out), Output(**how)) as terminal:
            terminal(metric)
        assert out.getvalue().splitlines()[-1] == (
            "rank 1 is the slowest of 3: 0.600 s of work per step, 50% more than rank 2; the ranks "
            "wait 0.150 to 0.350 s, work at 1,500 to 2,500 tokens/s, and have a peak memory "
            "of 1.00 to 1.25 GB"
        )


def test_a_log_file_gets_lines_with_times(tmp_path: Path) -> None:
    for _ in range(2):
        show(80, terminal=True, steps=True, log_file=tmp_path / "run.log")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert len(lines) == 12 and all(re.match(r"20\d\d-\d\d-\d\dT[\d:+-]+ ", line) for line in lines)
    assert [line.split(" ", 1)[1] for line in lines[6:]] == show(40, terminal=False).splitlines()
    with pytest.raises(InputError, match=r"--log-file .* cannot be written"):
        Output(log_file=tmp_path)


def test_lines_break_between_words_on_a_terminal_only() -> None:
    text = "the quick " * 12 + "https://example.com/" + "x" * 60
    for terminal in (True, False):
        out = io.StringIO()
        with Terminal(Console(file=out, width=40, force_terminal=terminal)) as shown:
            shown(events.warning(text))
        lines = [line for line in plain(out.getvalue()).splitlines() if line.strip()]
        assert " ".join(line.strip() for line in lines) == f"warning: {text}"
        assert len(lines) == (5 if terminal else 1)


def test_a_command_is_pasted_as_it_is_shown() -> None:
    argv = ["mlx-segtrain", "chat", "--model", "a b" * 9, "--system", "It's a test " * 8, "--temp"]
    for width in (20, 80, 1000):
        text = command_line(argv, width)
        assert shlex.split(text.replace("\\\n", "")) == argv
    assert len(command_line(argv, 80).splitlines()) == 3
    assert command_line([*argv[:2], "--prompt", "…"], 80) == "mlx-segtrain chat --prompt …"


def test_markup_in_a_message_is_text() -> None:
    out = io.StringIO()
    with Terminal(Console(file=out, width=80)) as terminal:
        terminal(events.stage("load", 0.01, "loading [bold]x[/bold]"))
        terminal(events.failed(ValueError("the exception that follows says it")))
    assert out.getvalue() == "loading [bold]x[/bold]\n"


def test_events_are_json_and_progress_rises() -> None:
    stream = run_events()
    json.dumps(stream, allow_nan=False)
    progress = [event["progress"] for event in stream if "progress" in event]
    assert progress == sorted(progress) and progress[0] > 0 and progress[-1] == 1.0
    assert stream[3]["perplexity"] == pytest.approx(8.0)
    assert stream[6]["perplexity"] is None  # e^800 is not a finite float


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def report(terminal: bool, **changes: object) -> str:
    tokens = [("<u>", False, 0.0), ("[hi]", False, 0.0), ("good", True, 1.0), ("bye", True, 1.0)]
    values = {
        "format": "messages",
        "n_train": 1200,
        "n_valid": 30,
        "length_min": 4,
        "length_median": 5,
        "length_p95": 6,
        "length_max": 7,
        "tokens": 6000,
        "supervised_tokens": 2400,
        "truncated": 1,
        "dropped": 2,
        "previews": [Preview("train.jsonl:1", tokens)],
    }
    out = io.StringIO()
    console = Console(file=out, width=20, force_terminal=terminal, highlight=False)
    show_report(Report(**{**values, **changes}), console)  # type: ignore[arg-type]
    return out.getvalue()


def test_report_marks_trained_tokens_in_plain_text() -> None:
    assert report(terminal=False).splitlines() == [
        "format   messages",
        "rows     1,200 to train, 30 to validate",
        "length   4 to 7 tokens, median 5, 95 % have at most 6",
        "tokens   6,000 to process, 2,400 of them in the loss",
        "rows cut 1 truncated, 2 dropped",
        "",
        "tokens in the loss are in ⟦ ⟧, all others are context:",
        "",
        "train.jsonl:1",
        "<u>[hi]⟦goodbye⟧",
    ]


def test_report_of_lengths_and_epochs() -> None:
    more = {
        "histogram": [Bin(4, 4, 4000), Bin(5, 8, 10), Bin(9, 1024, 1000)],
        "longest": [("a.csv:7", 1024), ("a.csv:9", 7)],
        "epoch": Epoch(5010, 1252.5, 0.25, 7500),
        "packed": Epoch(80, 20, 0.031),
        "duplicates": 3,
        "formats": {"text": 1000, "messages": 200},
    }
    found = report(terminal=False, **more).splitlines()
    assert found[0] == "format   200 messages, 1,000 text"
    assert found[4:11] == [
        f"             4 to     4 {'█' * 40} 4,000",
        "             5 to     8 ▏ 10",
        f"             9 to 1,024 {'█' * 10} 1,000",
        "longest  a.csv:7 (1,024 tokens), a.csv:9 (7 tokens)",
        "epoch    1,252.5 steps, 25.0% of the tokens are padding, about 2h05m",
        "packed   20 steps, 80 rows that are 96.9% full (see --packing)",
        "repeated 3 rows repeat an earlier row (see --dedup)",
    ]


def test_report_colours_each_token_on_a_terminal() -> None:
    text = report(terminal=True)
    assert "\x1b[4;32mgood\x1b[0m\x1b[7;32mbye\x1b[0m" in text
    assert "⟦" not in text


def test_report_without_a_tokenizer() -> None:
    text = report(terminal=False, length_max=None, previews=[])
    assert "tokens  " not in text and "--model" in text


def checks(gpu: bool, reason: str) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, highlight=False)
    one = doctor.Check("attention", "window", 0.5 if reason else 0.001, reason=reason)
    two = doctor.Check("attention", "causal", 0.001, ms=1.234, plain_ms=56.7)
    show_checks(doctor.Report("A GPU", gpu, "0.32.4", "0.1.0", [one, two]), console)
    return out.getvalue()


def test_checks_of_kernels() -> None:
    reason = "error: " + 40 * "long "  # longer than a line, but must not be wrapped
    text = checks(gpu=True, reason=reason)
    lines = [line.split() for line in text.splitlines()]
    assert ["device", "A", "GPU", "(GPU)"] in lines
    assert ["attention", "window", "off", "5.0e-01", "–", "–"] in lines
    assert ["attention", "causal", "ok", "1.0e-03", "1.23", "56.70"] in lines
    assert f"\nattention (window): {reason}\n" in text
    assert "another implementation replaces it" in text
    wrong = checks(gpu=False, reason=reason)  # CPU kernels are never disabled
    assert " wrong " in wrong and "off" not in wrong
    good = checks(gpu=True, reason="")
    assert "off" not in good and "agrees" in good and "attention (window)" not in good


def test_rows_that_are_tokenized_have_a_bar_on_a_terminal_and_few_lines_elsewhere():
    said = [events.tokenizing("train.jsonl", n / 10, 1000 * n, 500.0, 9.0 - n) for n in range(10)]
    for terminal in (True, False):
        out = io.StringIO()
        with Terminal(Console(file=out, force_terminal=terminal, width=120)) as show:
            for event in said:
                show(event)
            bars = list(show._bar.tasks)
            show(events.stage("data", 0.05, "train.jsonl: all rows"))
            assert not show._bar.tasks
        assert "train.jsonl: all rows" in out.getvalue()
        if terminal:
            (bar,) = bars
            assert (bar.completed, bar.total) == (0.9, 1)
            assert bar.fields["status"].endswith("90%, 9,000 rows, 500 rows/s  0s left")
        else:
            assert not bars and out.getvalue().count("tokenizing train.jsonl:") == 1


def test_a_merge_is_summed_up_before_the_layers_that_lost_the_most(capsys: Any) -> None:
    layers = [Folded(f"layers.{i}", 4, 0.1, 1.0, i / 20, 0.5) for i in range(12)]
    show_fold(folding.Report(Path("out"), layers, 3, 2_500_000_000))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["model    out, 2.50 GB", "merged   12 linear layers", lines[2]]
    assert "(4 more: see --json)" in lines[5]
    shown = [line.split()[0] for line in lines if line.strip().startswith("layers.")]
    assert shown == [f"layers.{i}" for i in range(11, 3, -1)]
    assert lines[-1].startswith("warning: 10 of 12 linear layers lost more than a tenth")
