"""Tests that no new occurrences of the words in tests/wording.py are added."""

from pathlib import Path

import wording


def test_no_file_has_more_than_it_may() -> None:
    may = wording.allowed()
    worse = {}
    for file in wording.files():
        name = file.relative_to(wording.ROOT).as_posix()
        found = wording.faults(file)
        if len(found) > may.get(name, 0):
            worse[name] = found
    assert not worse, "rewrite these in plain words; see CONTRIBUTING.md for the style"


def test_each_kind_of_text_is_read(tmp_path: Path) -> None:
    """Checks that faults in docstrings, comments, messages, pages and scripts are found."""
    for name, text in {
        "a.py": '"""It goes on."""',
        "b.py": "x = 1  # behind the step",
        "c.py": 'raise ValueError(f"{x} cannot be had: {y}")',
        "d.md": "It is made\nanew.",
        "e.md": "Nothing goes\non.",
        "f.js": 'h("p", "those that fit")',
        "g.html": "<p>What there is</p>",
        "h.py": 'def f():\n    """Of each row the first."""',
    }.items():
        (tmp_path / name).write_text(text)
        assert len(wording.faults(tmp_path / name)) == 1, name
    (tmp_path / "good.md").write_text(
        "It stands for a name. `goes on` is code.\n\n```sh\n# behind\n```\n"
    )
    assert wording.faults(tmp_path / "good.md") == []


def test_what_is_allowed_is_there() -> None:
    """Entries for removed or renamed files must be removed from the list."""
    assert all((wording.ROOT / name).is_file() for name in wording.allowed())
