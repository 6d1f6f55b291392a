"""Checks that `make` and the tests do not depend on anything specific to a developer's machine.

The README's commands are tested by `.ci/run`, which runs them in an empty environment.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib import peers

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests").glob("**/*.py"))
#: For each target, the extras that it installs (besides `cpu` on Linux), or None if it installs
#: nothing.
TARGETS = {
    **{"demo": [], "dev": ["dev"], "wheel": None, "help": None, "clean": None, "mac": []},
    **{name: ["dev"] for name in ("check", "test", "lint", "docs", "bench", "models")},
    "release-check": [],
}


def dry_run(folder: Path, system: str, *words: str) -> list[list[str]]:
    """Returns the commands that `make -n` prints if there is no virtual environment and `uname`
    prints `system`."""
    fake = folder / "uname"
    fake.write_text(f"#!/bin/sh\necho {system}\n")
    fake.chmod(0o755)
    done = subprocess.run(
        ["make", "-n", "-C", ROOT, f"VENV={folder / 'venv'}", *words],
        # This command must not inherit MAKEFLAGS from `make test`.
        env={"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line.replace("`", "")) for line in lines if "pip" in line]


def installed(commands: list[list[str]]) -> list[str]:
    """Returns the arguments of the `pip install` commands, without options."""
    found = []
    for words in commands:
        if "install" in words:
            rest = words[words.index("install") + 1 :]
            found += [word for word in rest if not word.startswith("-")]
    return found


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("peers", [False, True])
@pytest.mark.parametrize("system", ["Linux", "Darwin"])
@pytest.mark.parametrize("target", TARGETS)
def test_what_a_target_installs(target, system, peers, tmp_path):
    got = installed(dry_run(tmp_path, system, target, *(["PEERS=1"] if peers else [])))
    wheel = f"$(echo {tmp_path}/venv/wheel/*.whl)"
    extras = TARGETS[target]
    if extras is None:
        assert got == []
        return
    # This target installs compilers and MLX (for its headers and symbols), but not the package
    # itself.
    if target == "mac":
        assert got[0] == "tests/mac/requirements.txt"
        assert [word.partition("==")[0] for word in got[1:]] == ["mlx-cpu", "mlx", "nanobind"]
        return
    if target == "release-check":  # only tools; the files that they check are already built
        names = {word.partition(">=")[0] for word in got}
        assert names == {"auditwheel", "build", "check-wheel-contents", "twine"}
        return
    cpu = ["cpu"] if system == "Linux" else []  # MLX has no such extra on macOS
    extras = [*cpu, *extras, *(["peers"] if peers and extras else [])]
    bracket = f"[{','.join(extras)}]" if extras else ""  # pip does not accept empty brackets
    assert got == ([f".{bracket}"] if target == "dev" else [wheel, wheel + bracket])


def test_every_target_is_looked_at():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(phony.split()) == set(TARGETS)


def test_peers_that_are_missing_are_said(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PEERS", "")
    with pytest.raises(pytest.skip.Exception, match=r"torch and peft not .* `make test PEERS=1`"):
        peers.load_peers()
    monkeypatch.setenv("PEERS", "1")  # if these packages are required, no test may be skipped
    monkeypatch.setitem(sys.modules, "lib.hf_peers", None)
    with pytest.raises(ImportError):
        peers.load_peers()


def strings_and_imports(path: Path) -> tuple[set[str], set[str]]:
    """Returns a file's strings, except docstrings, and the packages that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts, packages = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            texts.add(node.value)
        elif isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.partition(".")[0])
    return texts, packages


#: Test files with strings such as "python" that name the language of a code block.
FENCES = {"pages", "test_docs", "test_docs_blocks", "wording"}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_counts_on_torch_or_on_a_python_on_the_path(path):
    texts, packages = strings_and_imports(path)
    if path.name != "hf_peers.py":
        assert not packages & {"torch", "peft"}, "use the fixture `hf` instead"
    command = r"python3? ." if path.stem in FENCES else r"python3?( |$)"
    assert not [x for x in texts if re.match(command, x)], "use sys.executable instead"
