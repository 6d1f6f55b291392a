"""Checks the documentation's line lengths and code blocks, and that its commands exist."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lib.pages import PAGES, ROOT, blocks, commands, prose
from mlx_segtrain.commands.main import parsers
from mlx_segtrain.config import CALLED, TrainConfig

EVERY = [(block, block.place) for page in PAGES for block in blocks(page)]
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
#: Commands of other programs that the pages use.
OTHERS = {
    *("pip", "python", "python3", "python3.12", "make", "curl", "apt", "git", "cd", "export"),
    *("caffeinate", "sudo", "xcode-select", "ssh", "hf", "mlx.launch", "mlx.distributed_config"),
    *("sysctl", "mkdir", "pmset", "source", "."),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_are_no_longer_than_120(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [n for n, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("|")]
    assert not long, f"{page.name}: lines {long} are too long"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_in_fences(page: Path) -> None:
    """Tests run only fenced blocks, so indented blocks may contain formulas and listings, but no
    commands."""
    command = re.compile(r" {4,}(mlx-segtrain|pip|python3?|make|curl|mlx\.launch|from|import) ")
    assert not [n for n, line in prose(page) if command.match(line)]


@pytest.mark.parametrize("block", [own for own, _ in EVERY], ids=[place for _, place in EVERY])
def test_a_block_is_what_it_says(block) -> None:
    if block.language == "python":
        ast.parse(block.text, block.place)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text) is not None
    elif block.language == "json":
        whole = block.text.startswith("[")
        assert all(map(json.loads, [block.text] if whole else block.text.splitlines()))
    elif block.language == "sh":
        for _, words in commands(block.text):
            check_command(words, block.place)


def check_command(words: list[str], place: str) -> None:
    """Checks that our commands can be parsed, and that files and targets in other commands
    exist."""
    while words and re.match(r"[A-Z_]+=", words[0]):  # environment variables
        words = words[1:]
    own = next((i for i, word in enumerate(words) if word.endswith("mlx-segtrain")), None)
    if "$(which mlx-segtrain)" in words:
        own = words.index("$(which mlx-segtrain)")
    if own is not None and words[0] != "mlx.distributed_config":
        arguments = words[own + 1 :]
        for mark in ("|", ">", "&", "&&", ";"):
            if mark in arguments:
                arguments = arguments[: arguments.index(mark)]
        _, rest = parsers()[0].parse_known_args(arguments)
        assert not rest, f"{place}: {shlex.join(words)}"
    elif words[0].startswith("recipes/"):
        assert (ROOT / words[0]).is_file(), f"{place}: {words[0]}"
    else:
        assert words[0] in OTHERS, f"{place}: {words[0]}"
    if words[0] == "make":
        assert words[1] in TARGETS, f"{place}: unknown target {words[1]}"
    if words[0] in ("python", "python3") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file() or words[1] == "train.py", f"{place}: {words[1]}"
    if words[0] == "pip":
        named = re.findall(r"(?:\.|mlx-segtrain)\[([\w,]+)\]", " ".join(words))
        assert {extra for names in named for extra in names.split(",")} <= EXTRAS, place


def sentences() -> list[str]:
    """Returns every string in the package. In f-strings, … replaces each value."""
    found = []
    for file in (ROOT / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (own.value if isinstance(own, ast.Constant) else "…" for own in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_errors_that_are_explained_exist() -> None:
    """The headings in docs/troubleshooting.md are messages that the program can print."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", text, re.M)
    assert len(headings) >= 15
    every = "\n".join(sentences())
    unknown = [own for own in headings if not _pattern(own).search(every)]
    assert not unknown


def _pattern(heading: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, heading.split("…"))))


def test_the_rows_of_mlx_bun_are_our_fields() -> None:
    """Each field in the table of docs/coming_from_mlx_bun.md exists, with the stated default."""
    text = (ROOT / "docs" / "coming_from_mlx_bun.md").read_text(encoding="utf-8")
    table = text[text.index("## Configuration") : text.index("## Environment variables")]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", table, re.M)
    assert len(rows) == 21  # the three required fields are not in the table
    for name, theirs, ours in rows:
        own = CALLED.get(name, name)
        assert own in TrainConfig.model_fields or name.startswith("dpo_"), name
        shown = ours.split(";")[0].split(":")[0].strip("`")
        if name not in ("learning_rate", "target_modules") and not name.startswith("dpo_w"):
            field = "lr_schedule" if name == "dpo_lr_schedule" else own
            config = TrainConfig(model_dir="m", data_dir="d", adapter_path="a", method="dpo")
            value = getattr(config, field)
            wanted = "sft" if name == "method" else str(value).lower()
            assert shown == wanted, (name, theirs, ours, value)
