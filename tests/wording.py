"""Finds words that native readers find awkward, in all texts that people read.

`python tests/wording.py` prints each occurrence. `--allow` writes the number of occurrences in each
file to tests/wording_allowed.txt. tests/test_wording.py fails if a file contains more occurrences
than listed there.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALLOWED = ROOT / "tests" / "wording_allowed.txt"

#: Marks the start of a docstring, which must say what the function does.
DOCSTRING = "docstring:"
#: Patterns of words to avoid, and replacements.
WORDS = {
    rf"{DOCSTRING} (Of|By|What|That|Those)\b": "begin with what it does or returns",
    r"\bbehind\b": "after",
    r"\bof all but\b|\ball but\b": "except",
    r"\bgo(es)? on\b|\bwent on\b|\bgoes? on from\b": "continues",
    r"\bstands?\b(?! for| in for| alone)|\bstood\b": "is",
    r"\bthose that\b|\bthat which\b": "name the things",
    r"\b(is|are|was|were) told\b": "is reported, is logged",
    r"\banew\b": "again, from scratch",
    r"\btakes? up\b": "merges, contains, resumes",
    r"\bhas come to\b": "is now",
    r"\bin the place of\b": "instead of",
    r"\bby another name\b": "an alias of",
    r"\bcannot be had\b": "is not available",
    r"\bhow loud\b": "the ratio of rounding error",
    r"\bof strangers\b": "untrusted",
    r"\bas it (stands|stood)\b": "as it is",
    r"\bwhat there is\b": "name the things",
    r"\bso many\b(?! \w+ (that|as))": "N",
    r"\bmost tokens\b": "maximum tokens",
    r"\blinears\b": "linear layers",
    r"\bfold(s|ed)? (it |them |an adapter |the adapter )?into\b": "merge into",
    r"\bnobody knows\b|\bwithout a word\b": "silently",
    r"\bthe likeliest\b": "the most likely",
}
ANY = re.compile("|".join(WORDS), re.I)
#: Files with text written by others, and the file with this list.
SKIPPED = ("tests/wording.py", "serving/page/vendor/", "/_core.pyi")


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the human-readable texts in a file, each with the number of its first line."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield from _python(source)
    elif file.suffix in (".js", ".html"):
        for found in re.finditer(r'"([^"\n]*)"|`([^`]* [^`]*)`|>([^<>{}]+)<', source):
            yield source.count("\n", 0, found.start()) + 1, next(filter(None, found.groups()), "")
    else:
        yield from _prose(source)


def _python(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            begin = " ".join((ast.get_docstring(node) or "").split()[:4])
            yield node.lineno, f"{DOCSTRING} {begin}"
    for found in re.finditer(r"(?:^ *|  )(# .*)$", source, re.M):
        yield source.count("\n", 0, found.start(1)) + 1, found[1]


def _prose(source: str) -> Iterator[tuple[int, str]]:
    """Yields the paragraphs of a page outside its code blocks."""
    inside, begin, own = False, 1, []
    for number, line in enumerate([*source.splitlines(), ""], 1):
        if line.startswith("```") or not line.strip() or line.startswith(("|", "- ", "#")):
            yield begin, re.sub(r"`[^`]*`", "", " ".join(own))
            begin, own = number, []
        inside ^= line.startswith("```")
        if not inside and not line.startswith("    "):
            own.append(line)


def faults(file: Path) -> list[str]:
    """Returns a message for each word to avoid that occurs in a file, with its line and a
    replacement."""
    found = []
    for line, text in texts(file):
        if ANY.search(text := " ".join(text.split())):
            found += [
                f"{line}: “{own[0]}”: {better}"
                for pattern, better in WORDS.items()
                for own in re.finditer(pattern, text, re.I)
            ]
    return found


def files() -> list[Path]:
    """Returns all files with text that people read: documentation, Python, and the server's
    page."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*")]
    for folder, kinds in (("python", ("py", "js", "html")), ("tests", ("py",)), ("bench", ("py",))):
        found += [file for kind in kinds for file in (ROOT / folder).rglob(f"*.{kind}")]
    found = [file for file in found if file.suffix in (".md", ".py", ".js", ".html")]
    return sorted(file for file in found if not any(own in file.as_posix() for own in SKIPPED))


def allowed() -> dict[str, int]:
    """Returns how many occurrences each file may still have. After a merge, a file may be listed
    twice: the higher number applies."""
    found: dict[str, int] = {}
    for line in ALLOWED.read_text(encoding="utf-8").splitlines():
        count, name = line.split(" ", 1)
        found[name] = max(int(count), found.get(name, 0))
    return found


if __name__ == "__main__":
    every = {file.relative_to(ROOT).as_posix(): faults(file) for file in files()}
    if sys.argv[1:] == ["--allow"]:
        lines = [f"{len(found)} {name}\n" for name, found in every.items() if found]
        ALLOWED.write_text("".join(lines), encoding="utf-8")
    else:
        for name, found in every.items():
            for fault in found:
                print(f"{name}:{fault}")
