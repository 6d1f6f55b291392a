"""Reads the documentation's pages and their code blocks.

A fence can declare that a block needs something that not every machine has, such as ```sh needs:
cuda. A page can list the files that the reader already has, such as <!-- given: out rows.csv -->.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: The pages whose blocks are run, except blocks marked `needs:`.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "yaml", "json", "text"}
#: The values of a `needs:` mark. docs/hooks.py shows them to readers.
NEEDS = {"cuda", "mac", "network", "hosts", "packages", "server", "checkout"}
FENCE = re.compile(r"^```(\w*)(?: needs: (\w+))?$")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    needs: str | None
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yields the fenced blocks of a page. Raises ValueError for an unclosed or unknown fence."""
    begun: tuple[int, str, str | None] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if begun is not None:
            if line == "```":
                yield Block(page, *begun, "\n".join(lines) + "\n")
                begun, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            fence = FENCE.match(line)
            if not fence or fence[1] not in LANGUAGES or fence[2] not in {None, *NEEDS}:
                raise ValueError(f"{page.name}:{number}: {line} is not a fence known to the tests")
            begun = (number, fence[1], fence[2])
    if begun is not None:
        raise ValueError(f"{page.name}:{begun[0]}: the block is not closed")


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a page outside its code blocks, with their line numbers."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line


def given(page: Path) -> list[str]:
    """Returns the names of the files that a page's reader already has."""
    found = re.search(r"<!-- given: (.*) -->", page.read_text(encoding="utf-8"))
    return found[1].split() if found else []


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each command of a shell block as a pair: its text, and its words without comments."""
    own = ""
    for line in text.replace("\\\n", " ").splitlines():
        own += line
        try:
            words = shlex.split(own, comments=True)
        except ValueError:  # a quoted string continues on the next line
            own += "\n"
            continue
        if words:
            yield own, words
        own = ""
    if own:
        raise ValueError(f"a quote is not closed: {own}")
