"""The demo's data set is clean, split by module, and reproducible."""

import json
import sys
from pathlib import Path

import pytest

from mlx_segtrain.commands.demo import docstrings
from mlx_segtrain.commands.demo.docstrings import summary_line, write_dataset

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "docstrings"
    counts = write_dataset(path)
    assert counts == {name: len(turns(path, name)) for name in ("train", "valid")}
    return path


def turns(data_dir: Path, name: str) -> list[list[dict[str, str]]]:
    lines = (data_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def modules(rows: list[list[dict[str, str]]]) -> set[str]:
    return {user["content"].split("\n")[-1].partition(".")[0] for user, _ in rows}


def test_thousands_of_rows_and_a_quick_validation(data_dir: Path):
    assert len(turns(data_dir, "train")) > 2000
    assert 50 <= len(turns(data_dir, "valid")) <= 100


def test_no_module_is_in_both_files(data_dir: Path):
    train, valid = modules(turns(data_dir, "train")), modules(turns(data_dir, "valid"))
    assert not train & valid
    assert len(valid) >= 5
    assert train | valid <= sys.stdlib_module_names
    assert not (train | valid) & docstrings.SKIPPED


def test_rows_are_clean(data_dir: Path):
    rows = turns(data_dir, "train") + turns(data_dir, "valid")
    for user, assistant in rows:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].startswith("What does this Python ")
        assert 3 <= len(assistant["content"].split()) <= 40
        assert "\n" not in assistant["content"]
        assert "._" not in user["content"].partition("(")[0]
    assert len({user["content"] for user, _ in rows}) == len(rows)
    assert len({assistant["content"].casefold() for _, assistant in rows}) == len(rows)


def test_a_known_function(data_dir: Path):
    rows = turns(data_dir, "train") + turns(data_dir, "valid")
    answers = {user["content"].split("\n\n")[1]: row["content"] for user, row in rows}
    assert (
        answers["textwrap.indent(text, prefix, predicate=None)"]
        == "Adds 'prefix' to the beginning of selected lines in 'text'."
    )


def test_the_same_bytes_again(data_dir: Path, tmp_path: Path):
    write_dataset(tmp_path)
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / name).read_bytes() == (data_dir / name).read_bytes()


def test_another_seed_holds_out_other_modules(data_dir: Path, tmp_path: Path):
    write_dataset(tmp_path, seed=1)
    assert modules(turns(tmp_path, "valid")) != modules(turns(data_dir, "valid"))


def test_no_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(docstrings.InputError, match="does not contain the sources"):
        write_dataset(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("docstring", "line"),
    [
        ("Return the\n    sum of two.\n\nMore text.", "Return the sum of two."),
        ("Do one thing. Then another.", "Do one thing."),
        ('Say "a thing (or two)". Then rest.', 'Say "a thing (or two)".'),
        ("Use e.g. Unicode ... Text here.", "Use e.g. Unicode ... Text here."),
        ("Too short.", None),
        ("word " * 41, None),
        ("f(x) -- return the sum", None),
        ("pkg.F(x, y) is a long echo", None),
        ("Take a value -> another value", None),
        ("Return one of these:", None),
        ("", None),
    ],
)
def test_summary_line(docstring: str, line: str | None):
    assert summary_line(docstring, "f") == line
