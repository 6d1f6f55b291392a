"""Tests kills at arbitrary moments, full or broken disks, and power cuts. Only the file being
written may be lost.

A tiny run writes every kind of file. Runs are forks of a process that has imported everything.
KILLS and FAULTS set the number of moments to try; FAULTS=0 tries all moments.
"""

import ctypes
import errno
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from lib.forks import processes
from lib.runs import config_of, files_of
from mlx_segtrain import InputError, RunError, files, train
from mlx_segtrain.training import checkpoint

pytestmark = pytest.mark.acceptance

KILLS, FAULTS = (int(os.environ.get(name, n)) for name, n in (("KILLS", 8), ("FAULTS", 6)))
OPTIONS = {"iters": 5, "steps_per_save": 1, "steps_per_eval": 2, "keep_best": True}
OPTIONS |= {"save_checkpoints": True}


def config(model, data, folder, **more):
    return config_of(model, data, folder, **{**OPTIONS, "resume": "auto", **more})


def in_child(queue, model, data, folder, fault, more):
    """Trains in a forked process, and sends back the error, the number of calls that modified the
    disk, and the warnings."""
    mx.set_default_device(mx.cpu)
    os.environ.update(fault)
    told = []
    try:
        train(config(model, data, folder, **more), told.append)
        said = ""
    except (InputError, RunError) as error:
        said = f"{type(error).__name__}: {error}"
    warnings = [event["message"] for event in told if event["type"] == "warning"]
    calls = ctypes.CDLL(None).fault_calls() if "LD_PRELOAD" in os.environ else 0
    queue.put((said, calls, warnings))
    sys.exit(bool(said))


class Forks:
    """Starts runs in separate processes."""

    def __init__(self, model, data):
        self.model, self.data, self.context = model, data, processes()

    def start(self, folder, fault=None, more=None):
        queue = self.context.SimpleQueue()
        arguments = (queue, self.model, self.data, folder, fault or {}, more or {})
        process = self.context.Process(target=in_child, args=arguments)
        process.start()
        return process, queue

    def run(self, folder, fault=None, more=None):
        """Returns the exit code and a tuple (error, calls, warnings). If the run was killed, the
        second value is None instead."""
        process, queue = self.start(folder, fault, more)
        process.join(60)
        assert process.exitcode is not None, "the run hangs"
        return process.exitcode, None if queue.empty() else queue.get()


@pytest.fixture(scope="module")
def forks(llama4, data):
    if sys.platform != "linux":
        pytest.skip("faults.c is preloaded, which needs Linux")
    return Forks(llama4, data)


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """Returns the folder of a run without any faults."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forks.run(folder)[0] == 0
    return folder


def assert_nothing_torn(run):
    """Checks that all files except temporary ones are complete. Only the last line of the log may
    be incomplete."""
    for path in run.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(run).parts):
            continue
        if path.suffix == ".safetensors":
            mx.eval(mx.load(str(path)))
        elif path.suffix == ".json":
            json.loads(path.read_text())
    log = run / "metrics.jsonl"
    for line in log.read_text().splitlines(True)[:-1] if log.exists() else []:
        json.loads(line)
    for folder in checkpoint.found(run).values():
        assert checkpoint.torn(folder) is None
    for folder in (run / "checkpoints").glob("step-*"):
        assert {"adapters.safetensors", "adapter_config.json"} <= set(os.listdir(folder))


def assert_ends_as(run, whole, lost=()):
    """Checks that a run has exactly the files of `whole`, except for the folders `lost`."""
    mine, its = (
        {name: x for name, x in files_of(folder).items() if "state" not in name.parts}
        for folder in (run, whole)
    )
    assert mine == {name: x for name, x in its.items() if name.parent not in lost}
    names, expected = (
        {x.relative_to(folder) for x in folder.rglob("*")} for folder in (run, whole)
    )
    assert names == {x for x in expected if x not in lost and x.parent not in lost}
    tensors = [
        mx.load(str(folder / "state/step-00005/state.safetensors")) for folder in (run, whole)
    ]
    for name, x in tensors[1].items():
        assert mx.array_equal(tensors[0][name], x), name
    steps = [
        [json.loads(x).get("step") for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (run, whole)
    ]
    assert [x for x in steps[0] if x in range(6)].count(5) >= 2


def test_killed_at_random_moments(forks, whole, tmp_path):
    """Kills and resumes a run until it is finished, and then repeats this with another run."""
    chance = random.Random(0)
    began = time.monotonic()
    assert forks.run(tmp_path / "timed")[0] == 0
    longest = time.monotonic() - began
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"run-{runs}"
        runs += 1
        while True:
            process, _ = forks.start(folder)
            process.join(chance.uniform(0, 1.1 * longest) if kills < KILLS else 60)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                if folder.exists():
                    assert_nothing_torn(folder)
            else:
                assert process.exitcode == 0
                break
        assert_ends_as(folder, whole)
        shutil.rmtree(folder)
    print(f"{kills} kills, {runs} runs")


def points(calls):
    """Returns the numbers of the calls that should fail, counted from 1: FAULTS evenly spaced
    calls, or all calls if FAULTS is 0."""
    n = min(FAULTS or calls, calls)
    return sorted({1 + i * calls // n for i in range(n)})


@pytest.fixture(scope="module")
def calls(forks, tmp_path_factory):
    """Returns the number of calls in a run that modify the disk."""
    folder = tmp_path_factory.mktemp("counted") / "run"
    code, (_, calls, _) = forks.run(folder, {"FAULT_ROOT": str(folder)})
    assert code == 0 and calls > 100
    return calls


@pytest.mark.parametrize("kind", ["kill", str(errno.ENOSPC)])
@pytest.mark.parametrize("more", [{"keep_checkpoints": 1}, {"overwrite": True, "resume": False}])
def test_faults_over_a_run_that_is_there(more, kind, forks, whole, tmp_path):
    """Faults occur while a finished run is overwritten or resumed."""

    def copy(name):
        return shutil.copytree(whole, tmp_path / name)

    folder = copy("counted")
    code, (_, calls, _) = forks.run(folder, {"FAULT_ROOT": str(folder)}, more)
    assert code == 0
    for at in points(calls):
        folder = copy(f"run-{at}")
        fault = {"FAULT_ROOT": str(folder), "FAULT_AT": str(at), "FAULT_KIND": kind}
        forks.run(folder, {**fault, "FAULT_STAYS": "1"}, more)
        assert_nothing_torn(folder)
        assert (folder / "adapters.safetensors").exists()
        assert forks.run(folder, None, more)[0] == 0, at
        kept = list(checkpoint.found(folder))
        assert kept == [5] if more.get("keep_checkpoints") else kept == [5, 4]
        assert (
            files_of(folder).items()
            >= {name: x for name, x in files_of(whole).items() if "state" not in name.parts}.items()
        )
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["kill", "torn"])
def test_killed_at_every_write(kind, forks, whole, calls, tmp_path):
    for at in points(calls):
        folder = tmp_path / f"run-{at}"
        fault = {"FAULT_ROOT": str(folder), "FAULT_AT": str(at), "FAULT_KIND": kind}
        code, _ = forks.run(folder, fault)
        assert code == -9, at
        if folder.exists():
            assert_nothing_torn(folder)
        assert forks.run(folder)[0] == 0, at
        assert_ends_as(folder, whole)
        shutil.rmtree(folder)


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_loses_itself_alone(number, stays, forks, whole, calls, tmp_path):
    """After one failed write, the run continues or ends with a one-sentence error. If all later
    writes fail too, existing files stay intact."""
    for at in points(calls):
        folder = tmp_path / f"run-{at}"
        fault = {"FAULT_ROOT": str(folder), "FAULT_AT": str(at), "FAULT_KIND": str(number)}
        code, said = forks.run(folder, {**fault, "FAULT_STAYS": str(int(stays))})
        assert said is not None, (at, code)  # neither a traceback nor a crash
        error, _, warnings = said
        assert (code == 0) == (not error)
        assert os.strerror(number) in f"{error} {warnings}" or not (error or stays), (at, said)
        if folder.exists():
            assert_nothing_torn(folder)
        kept = list(checkpoint.found(folder))
        again, (error, _, _) = forks.run(folder)
        assert again == 0 and not error, (at, error)
        lost = set()
        if code == 0:  # an evaluation's adapter is not rewritten later
            assert kept[0] == 5
            mine, its = ({x.name for x in (f / "checkpoints").iterdir()} for f in (folder, whole))
            lost = {Path("checkpoints") / name for name in its - mine}
            assert len(lost) <= 1
        assert_ends_as(folder, whole, lost)
        shutil.rmtree(folder)


# ---- power cuts: unsynced data is lost

linux = pytest.mark.skipif(sys.platform != "linux", reason="file names are read from /proc")


class Disk:
    """Simulates power cuts at each fsync and after each rename, and records what the folder would
    then contain.

    A file's content reaches the disk when the file is synced. Its name reaches the disk immediately
    or when the folder is synced: real disks may do either.
    """

    def __init__(self, root, monkeypatch):
        self.root = root
        self.content, self.names, self.held = {}, {}, []
        self.cuts, self.saved = [], 0
        real_sync, real_replace, real_save = os.fsync, os.replace, checkpoint.save

        def fsync(fd):
            self.cut()
            real_sync(fd)
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if path == self.root.parent or self.root in (path, *path.parents):
                self.held.append(os.dup(fd))  # keeps the inode from being reused
                number = os.fstat(fd).st_ino
                if path.is_dir():
                    self.names[number] = {x.name: self.hold(x) for x in path.iterdir()}
                else:
                    self.content[number] = path.read_bytes()

        def replace(a, b):
            real_replace(a, b)
            self.cut()

        def save(*args, **kwargs):
            real_save(*args, **kwargs)
            self.saved += 1

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(checkpoint, "save", save)

    def hold(self, path):
        self.held.append(os.open(path, os.O_RDONLY))
        return path.stat().st_ino, path.is_dir()

    def cut(self):
        if not self.root.parent.exists():
            return
        parent = self.root.parent.stat().st_ino
        for early in (False, True):
            found = {}
            if early and self.root.exists():
                self.walk_live(self.root, found)
            elif self.root.name in self.names.get(parent, {}):
                self.walk_synced(self.names[parent][self.root.name][0], self.root, found)
            self.cuts.append((self.saved, found))

    def walk_live(self, folder, found):
        for path in folder.iterdir():
            if path.is_dir():
                found[path.relative_to(self.root)] = None
                self.walk_live(path, found)
            else:
                found[path.relative_to(self.root)] = self.content.get(path.stat().st_ino, b"")

    def walk_synced(self, number, folder, found):
        for name, (own, is_folder) in self.names.get(number, {}).items():
            path = folder / name
            found[path.relative_to(self.root)] = None if is_folder else self.content.get(own, b"")
            if is_folder:
                self.walk_synced(own, path, found)

    def close(self):
        for fd in self.held:
            os.close(fd)


@linux
def test_the_power_goes(llama4, data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        (tmp_path / "disk").mkdir()
        disk = Disk(tmp_path / "disk" / "run", patched)
        train(config(llama4, data, disk.root))
        disk.cut()
        disk.close()
    distinct = {}
    for saved, found in disk.cuts:
        key = tuple(sorted((str(name), x) for name, x in found.items() if x is not None))
        distinct[key] = (max(saved, distinct.get(key, (0, {}))[0]), found)
    cuts = list(distinct.values())
    assert len(cuts) > 60 and {saved for saved, _ in cuts} == {0, 1, 2, 3, 4, 5}
    n = min(FAULTS or len(cuts), len(cuts))
    for i in sorted({j * len(cuts) // n for j in range(n)} | {len(cuts) - 1}):
        saved, found = cuts[i]
        folder = tmp_path / f"cut-{i}" / "run"
        for name, content in found.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                (folder / name).mkdir(exist_ok=True)
            else:
                (folder / name).write_bytes(content)
        whole_ones = [checkpoint.torn(x) is None for x in checkpoint.found(folder).values()]
        assert all(whole_ones)
        result = train(config(llama4, data, folder))
        assert (result.resumed_from or 0) >= saved, i
        assert_ends_as(folder, whole)


@linux
def test_a_rename_without_a_sync_would_be_seen(llama4, data, tmp_path, monkeypatch):
    """Shows that the simulation detects faults: without syncs, checkpoints are incomplete."""
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk" / "run", monkeypatch)
    monkeypatch.setattr(files, "sync", lambda path: None)
    train(config(llama4, data, disk.root))
    disk.cut()
    disk.close()
    last = [found for _, found in disk.cuts if found][-1]
    states = [x for name, x in last.items() if name.name == "state.safetensors"]
    assert states and not any(states)
