"""Compares the numbers in `plan --ranks` with a simulated ring and an actual adapter."""

import json

import pytest

from lib.folders import write_model
from lib.runs import config_of, weights_of
from lib.tiny_models import build, config
from mlx_segtrain import train
from mlx_segtrain.commands.main import main
from mlx_segtrain.planning.scaling import LATENCY


def ring(n, numbers, link, batch_s):
    """Simulates a ring that passes segments around, first to sum and then to distribute them.
    Returns the bytes sent by the busiest rank and the time of a step."""
    segments = [len(range(i, numbers, n)) for i in range(n)]
    sent, seconds = [0] * n, batch_s
    for turn in range(2 * (n - 1)):
        sizes = [4 * segments[(rank - turn) % n] for rank in range(n)]
        sent = [x + size for x, size in zip(sent, sizes, strict=True)]
        seconds += LATENCY + max(sizes) / link
    return max(sent), seconds


def planned(capsys, model, *more):
    assert main(["plan", "--model", str(model), "--max-seq-length", "100", *more]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("dora", [False, True])
def test_bytes_and_seconds_are_those_of_a_ring(dora, llama, data, tmp_path, capsys):
    out = tmp_path / "run"
    train(config_of(llama, data, out, iters=1, rank=4, use_dora=dora))
    numbers = sum(x.size for x in weights_of(out).values())
    how = ["--rank", "4", "--ranks", "3", "--link", "0.5", "--step-seconds", "0.02"]
    text = planned(capsys, llama, *how, *["--use-dora"] * dora, "--json")
    steps = {own["ranks"]: own for own in json.loads(text)["ranks"]}
    assert list(steps) == [2, 3, 4, 8, 16, 32, 64, 128, 256]
    for n, own in steps.items():
        sent, seconds = ring(n, numbers, 0.5e9, 0.02)
        assert own["sent"] == pytest.approx(sent, rel=1e-2)
        assert own["compute_s"] + own["add_s"] == pytest.approx(seconds, rel=1e-2)
        assert own["speedup"] == pytest.approx(n * 0.02 / seconds, rel=1e-2)


def test_the_table_has_a_line_for_each_number(llama, capsys):
    text = planned(capsys, llama, "--ranks", "5", "--step-seconds", "0.01")
    table = text.partition("ranks  ")[2].splitlines()[1:]
    assert [int(line.split()[0]) for line in table] == [2, 4, 5, 8, 16, 32, 64, 128, 256]
    assert table[0].endswith("1.96 times (98%)")


def test_what_is_not_counted_of_grpo(llama, capsys):
    how = ["--method", "grpo", "--max-completion-tokens", "40", "--batch-size", "5"]
    text = planned(capsys, llama, *how, "--ranks", "2")
    assert " 24 completions at once" in text, "24 completions are three groups of 8"
    assert (
        text.splitlines()[-1]
        .strip()
        .startswith("This assumes one update with one pass on each rank")
    )


def test_options_without_ranks_are_refused(llama, capsys):
    assert main(["plan", "--model", str(llama), "--link", "3"]) == 2
    assert "have no effect without --ranks" in capsys.readouterr().err
    pipeline = ["plan", "--model", str(llama), "--max-seq-length", "100", "--parallel", "pipeline"]
    for more, said in {
        ("--rank-budgets", "1"): "a plan for `parallel: pipeline` needs the number of ranks",
        ("--ranks", "2", "--rank-budgets", "1"): "--rank-budgets has 1 values, but --ranks is 2",
        ("--ranks", "2", "--link", "3"): "--link and --step-seconds only apply with --parallel",
        ("--ranks", "4"): "there are 4 ranks for 3 layers: start at most 3 ranks",
    }.items():
        assert main([*pipeline, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_pipeline_has_a_line_for_each_rank(llama, capsys):
    how = ["--rank", "4", "--parallel", "pipeline", "--grad-accumulation-steps", "3"]
    text = planned(capsys, llama, *how, "--ranks", "2", "--rank-budgets", "1", "0.5")
    lines = [line for line in text.splitlines() if line.startswith("rank ")]
    assert lines[0].startswith("rank 0        layers 1-") and "of 1.00 GB" in lines[0]
    assert lines[1].startswith("rank 1        layers ") and "of 0.50 GB" in lines[1]
    assert "for each batch" in lines[0] and " on for" in lines[0] and " back for" in lines[1]
    assert any("busy 75%" in line for line in lines)


def test_a_family_whose_work_is_not_known_is_refused(tmp_path, capsys):
    folder = write_model(tmp_path / "cohere", config("cohere"), build("cohere"))
    assert main(["plan", "--model", str(folder), "--ranks", "2"]) == 2
    assert "--ranks is not supported for cohere" in capsys.readouterr().err
