"""Tests links that are created after a path was checked and before it is used."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from lib.attack import CANARY, write_canary
from mlx_segtrain.serving.jobs.queue import Jobs

#: Reads and writes a file below a root in a confined process, in every way that Python offers.
CONFINED = """
import builtins, codecs, io, json, os, pathlib, sys
from mlx_segtrain.serving.roots import Outside, Roots
from mlx_segtrain.serving.opening import confine
root = pathlib.Path(sys.argv[1])
confine(Roots([root]))
file = root / "file"
def number(path, *how):
    with os.fdopen(os.open(path, *how)) as opened:
        return opened.read()
ways = {
    "open": lambda: open(file).read(),
    "bytes": lambda: open(os.fsencode(file), "rb").read(),
    "relative": lambda: (os.chdir(root), open("file").read()),
    "around": lambda: open(f"{root}/../{root.name}/file").read(),
    "all arguments": lambda: open(file, "r", -1, "utf-8", None, None, True, None).read(),
    "opener": lambda: open(file, opener=lambda path, flags: os.open(path, flags)).read(),
    "io": lambda: io.open(file).read(),
    "text": lambda: file.read_text(),
    "path": lambda: file.open("rb").read(),
    "number": lambda: number(file, os.O_RDONLY),
    "codecs": lambda: codecs.open(str(file), encoding="utf-8").read(),
    "write": lambda: open(file, "w").write("lost"),
    "append": lambda: open(file, "a").write("lost"),
    "write text": lambda: file.write_text("lost"),
    "truncate": lambda: number(file, os.O_RDWR | os.O_TRUNC),
}
def outcome(way):
    try:
        return str(way())
    except Outside as error:
        return "refused"
print(json.dumps({name: outcome(way) for name, way in ways.items()}))
"""
#: Reads a file repeatedly for two seconds, and prints how many times it read each version of the
#: content.
READS = """
import pathlib, sys, time
from mlx_segtrain.serving.roots import Outside, Roots
from mlx_segtrain.serving.opening import confine
root = pathlib.Path(sys.argv[1])
confine(Roots([root]))
seen, end = {}, time.monotonic() + 2
while time.monotonic() < end:
    try:
        text = (root / "file").read_text()
    except Outside:
        text = "refused"
    except FileNotFoundError:
        continue
    seen[text] = seen.get(text, 0) + 1
print(seen)
"""


def python(script, *args):
    command = [sys.executable, "-c", script, *map(str, args)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_every_way_to_open_a_link_to_elsewhere(tmp_path):
    root, outside = tmp_path / "root", write_canary(tmp_path / "outside")
    root.mkdir()
    (root / "file").symlink_to(outside / "secret")
    seen = json.loads(python(CONFINED, root))
    assert set(seen.values()) == {"refused"}, seen
    assert (outside / "secret").read_text() == CANARY  # the file was not truncated either
    (root / "file").unlink()
    (root / "real").write_text("mine")
    (root / "file").symlink_to(root / "real")  # the Hugging Face cache has such links
    seen = json.loads(python(CONFINED, root))
    assert seen.pop("relative") == "(None, 'mine')"
    writes = {name: seen.pop(name) for name in ("write", "append", "write text", "truncate")}
    assert set(seen.values()) == {"mine", "b'mine'"} and writes["truncate"] == "", (seen, writes)


def test_a_link_that_comes_and_goes(tmp_path):
    """The file that was checked is the file that is opened, no matter when the link changes."""
    root, outside = tmp_path / "root", write_canary(tmp_path / "outside")
    root.mkdir()
    (root / "file").write_text("mine")
    stop = threading.Event()

    def exchange():
        while not stop.is_set():
            (root / "link").symlink_to(outside / "secret")
            os.replace(root / "link", root / "file")
            (root / "new").write_text("mine")
            os.replace(root / "new", root / "file")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        seen = python(READS, root)
    finally:
        stop.set()
        thread.join()
    assert CANARY not in seen and "mine" in seen and "refused" in seen


@pytest.mark.parametrize("name", ["data/valid.jsonl", "model/chat_template.jinja"])
def test_a_link_that_comes_when_a_job_has_been_checked(tmp_path, llama, data, name):
    outside = write_canary(tmp_path / "outside")
    shutil.copytree(llama, tmp_path / "root" / "model")
    shutil.copytree(data, tmp_path / "root" / "data")
    link = tmp_path / "root" / name

    def check(values):
        """Runs the server's check and then creates a link, as an attacker who waits for this moment
        would."""
        link.unlink(missing_ok=True)
        link.symlink_to(outside / ("train.jsonl" if name.endswith("l") else "default.jinja"))

    paths = {
        part: str(tmp_path / "root" / part.removesuffix("_dir"))
        for part in ("model_dir", "data_dir")
    }

    async def run():
        jobs = Jobs(tmp_path / "store", check, [tmp_path / "root"])
        await jobs.start()
        try:
            id = jobs.submit("evaluate", {**paths, "split": "valid", "max_seq_length": 64}).id
            return await asyncio.wait_for(jobs.ended(id), 120), jobs.log(id).read_text()
        finally:
            await jobs.close()

    begun = time.monotonic()
    row, log = asyncio.run(run())
    assert (
        row.status == "failed" and "is not below a directory that this server may use" in row.error
    ), log
    assert CANARY not in log and time.monotonic() - begun < 120


def test_a_base_that_an_adapter_names(tmp_path, llama):
    """A server does not look for the base model in folders that it may not read."""
    script = """if True:
        import json, pathlib, sys
        from mlx_segtrain.lora.folder import open_folder
        from mlx_segtrain.serving.roots import Roots
        from mlx_segtrain.serving.opening import confine
        root, base = map(pathlib.Path, sys.argv[1:])
        def found(named):
            (root / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1,
                "base_model_name_or_path": str(named)}))
            return open_folder(root).base_folder
        (root / "base").mkdir()
        (root / "base" / "config.json").write_text("{}")
        (root / "link").symlink_to(base)
        (root / "adapter_model.safetensors").write_text("")
        assert found(base) == base and found("a" * 5000) is None and found("") is None
        confine(Roots([root]))
        assert found(base) is None and found(root / "link") is None, found(base)
        assert found(root / "base") == root / "base"
    """
    root = tmp_path / "root"
    root.mkdir()
    python(script, root, llama)
