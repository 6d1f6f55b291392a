"""Tests `mlx-segtrain init`, which writes a YAML configuration with a description of every
field."""

import sys
from pathlib import Path

import pytest

from mlx_segtrain.commands import main as cli
from mlx_segtrain.commands.init import text_of
from mlx_segtrain.config import TrainConfig, load_config

#: Fields that conflict with another field in this set.
ALONE = {"iters", "epochs", "grad_checkpoint", "segment_size", "resume", "overwrite"}


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_three_questions(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    asked, answers = [], iter(["", "org/model", "rows.csv", ""])
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    assert cli.main(["init"]) == 0
    assert [text.split("?")[0] for text in asked] == [
        "Which model",
        "Which model",  # asked again, because the answer was empty and there is no default
        "Which data",
        "How many passes over the data",
    ]
    config = load_config(Path("run.yaml"), {})
    assert (str(config.model_dir), str(config.data_dir)) == ("org/model", "rows.csv")
    assert (config.epochs, config.adapter_path) == (3, Path("adapters"))
    out = capsys.readouterr().out
    assert "wrote run.yaml" in out and "mlx-segtrain train --config run.yaml" in out


def test_without_a_terminal_flags_answer(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    given = ["--model", "m: #1", "--data", "d", "--iters", "7", "--lr", "1e-5", "--adapter", "a"]
    assert cli.main(["init", "x.yaml", *given]) == 0
    config = load_config(Path("x.yaml"), {})
    assert (config.iters, config.epochs, config.learning_rate) == (7, None, 1e-5)
    assert config.model_dir == Path("m: #1")
    before = Path("x.yaml").read_text()
    assert cli.main(["init", "x.yaml", *given]) == 2
    assert "x.yaml already exists: choose another name, or pass --force." in capsys.readouterr().err
    assert cli.main(["init", "y.yaml", "--model", "m"]) == 2
    assert "data_dir is missing: pass --data" in capsys.readouterr().err
    assert Path("x.yaml").read_text() == before and not Path("y.yaml").exists()
    assert cli.main(["init", "x.yaml", "--force", *given, "--rank", "4"]) == 0
    assert load_config(Path("x.yaml"), {}).rank == 4


def test_bad_answers_write_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda text: "many")
    assert cli.main(["init", "--model", "m", "--data", "d"]) == 2
    assert "epochs must be a finite number > 0; got 'many'" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_every_field_is_there_with_a_default_that_can_be_used() -> None:
    text = text_of({"model_dir": "m", "data_dir": "d", "adapter_path": "a"})
    names = TrainConfig.model_fields.keys()
    for name in names - ALONE - {"model_dir", "data_dir", "adapter_path"}:
        lines = [line for line in text.splitlines() if line.startswith(f"# {name}: ")]
        assert len(lines) == 1, name
        Path("x.yaml").write_text(text.replace(lines[0], lines[0].removeprefix("# ")))
        assert load_config(Path("x.yaml"), {}) == load_config(
            None, {"model_dir": "m", "data_dir": "d", "adapter_path": "a"}
        )
    assert all(f"{name}: " in text for name in names)
    assert max(map(len, text.splitlines())) <= 100
