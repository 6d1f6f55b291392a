"""The form of the documentation: lines, blocks, and commands that exist, whatever they need."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lib.pages import PAGES, ROOT, blocks, commands, prose
from mlx_segtrain.commands.main import parsers

EVERY = [(block, block.place) for page in PAGES for block in blocks(page)]
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
#: Commands of others that pages show.
OTHERS = {
    *("pip", "python", "python3", "python3.12", "make", "curl", "apt", "git", "cd", "export"),
    *("caffeinate", "sudo", "xcode-select", "ssh", "hf", "mlx.launch", "mlx.distributed_config"),
    *("sysctl", "mkdir", "pmset", "source", "."),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_are_no_longer_than_120(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [n for n, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("|")]
    assert not long, f"{page.name}: lines {long}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_in_fences(page: Path) -> None:
    """A block that is only indented is text, which nothing runs: formulas and listings."""
    command = re.compile(r" {4,}(mlx-segtrain|pip|python3?|make|curl|mlx\.launch|from|import) ")
    assert not [n for n, line in prose(page) if command.match(line)]


@pytest.mark.parametrize("block", [own for own, _ in EVERY], ids=[place for _, place in EVERY])
def test_a_block_is_what_it_says(block) -> None:
    if block.language == "python":
        ast.parse(block.text, block.place)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text) is not None
    elif block.language == "json":
        assert all(yaml.safe_load(line) for line in block.text.splitlines())
    elif block.language == "sh":
        for words in commands(block):
            check_command(words, block.place)


def check_command(words: list[str], place: str) -> None:
    """That a command of ours parses, and what others are given exists."""
    while words and re.match(r"[A-Z_]+=", words[0]):
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
        assert words[1] in TARGETS, f"{place}: make {words[1]}"
    if words[0] in ("python", "python3") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file() or words[1] == "train.py", f"{place}: {words[1]}"
    if words[0] == "pip":
        named = re.findall(r"(?:\.|mlx-segtrain)\[([\w,]+)\]", " ".join(words))
        assert {extra for names in named for extra in names.split(",")} <= EXTRAS, place
