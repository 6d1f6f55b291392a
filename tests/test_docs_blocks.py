"""Runs every code block in the documentation as printed, except blocks that need more than a server
(see `needs:` in lib/pages.py).

The blocks of a page run in a folder that contains a tiny model (MODEL), a data set (data) and the
files that the page lists as given. Commands of this package run in the test's process.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.folders import write_llama, write_pairs, write_rows
from lib.pages import NEEDS, PAGES, ROOT, Block, blocks, commands, given
from lib.served import Server
from mlx_segtrain.commands import main as cli
from mlx_segtrain.commands.demo.sums import write_sums

pytestmark = pytest.mark.acceptance

#: Shell syntax that the test cannot interpret.
SHELL = re.compile(r"[|<>&;`]|\$\(")
FILE = re.compile(r"# ([\w./-]+\.(?:yaml|py))$")
ADDRESS = "localhost:8090"


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with all files that pages may assume to exist."""
    path = tmp_path_factory.mktemp("things")
    write_llama(path / "MODEL", bits=4, layers=1, max_position_embeddings=65536)
    write_rows(path / "data", 12)
    write_rows(path / "data", 4, "valid.jsonl", first=12)
    write_pairs(path / "pairs")
    write_sums(path / "sums")
    rows = [f"Count to {i}.,{' '.join(map(str, range(1, i)))}" for i in range(2, 12)]
    for name, columns in (("rows", "prompt,completion"), ("replies", "query,reply")):
        (path / f"{name}.csv").write_text("\n".join([columns, *rows]) + "\n")
    train = ["train", "--model", str(path / "MODEL"), "--data", str(path / "data"), "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([*train, "--iters", "2", "--adapter", str(path / "out")]) == 0
    for name in ("first", "second"):
        shutil.copytree(path / "out", path / name)
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, things: Path, tmp_path: Path, monkeypatch) -> None:
    own = [block for block in blocks(page) if block.needs in (None, "server")]
    own = [block for block in own if block.language in ("sh", "python", "yaml")]
    if not own:
        return
    for name in ("MODEL", "data", *given(page)):
        copy = shutil.copytree if (things / name).is_dir() else shutil.copy
        copy(things / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "stdin", sys.stdin)  # so that monkeypatch restores it
    names: dict[str, object] = {"__name__": page.stem}
    with contextlib.ExitStack() as stack:
        address = ADDRESS
        if any(block.needs == "server" for block in own):
            server = stack.enter_context(Server(tmp_path, "MODEL", "--root", tmp_path))
            address = server.url.removeprefix("http://")
        for block in own:
            text = block.text.replace(ADDRESS, address)
            if found := FILE.match(text.partition("\n")[0]):
                Path(found[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(found[1]).write_text(text)
            elif block.language == "python":
                exec(compile(text, block.place, "exec"), names)
            elif block.language == "sh":
                run(block, text)


def run(block: Block, text: str) -> None:
    """Runs the commands of a shell block in order."""
    for line, words in commands(text):
        if words[:2] == ["mlx-segtrain", "serve"]:  # only parsed: servers are tested elsewhere
            assert cli.parsers()[0].parse_known_args(words[1:])[1] == []
        elif words[0] == "mlx-segtrain" and not SHELL.search(line.split(" #")[0]):
            said, sys.stdin = io.StringIO(), io.StringIO("Hello\n")
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = cli.main(words[1:])
            assert code == 0, f"{block.place}: {line}\n{said.getvalue()}"
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", line.replace("recipes/", f"{ROOT}/recipes/")],
                **{"capture_output": True, "text": True, "stdin": subprocess.DEVNULL},
            )
            assert done.returncode == 0, f"{block.place}: {line}\n{done.stdout}{done.stderr}"


def test_needs_are_shown_to_readers() -> None:
    text = (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8")
    assert set(re.findall(r'^    "(\w+)": "(?:needs|while|in a)', text, re.M)) == NEEDS
