"""The process of a job must not load modules from unexpected places, and must not inherit the
server's secrets or open files."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from lib.folders import write_llama, write_rows
from lib.served import ended
from mlx_segtrain import processes
from mlx_segtrain.serving.jobs import queue as jobs_module
from mlx_segtrain.serving.jobs.kinds import KINDS
from mlx_segtrain.serving.jobs.queue import Jobs

#: Modules that a job imports. A file with one of these names on the module path would be run
#: instead.
MODULES = ("yaml", "pydantic", "numpy", "mlx", "mlx_segtrain", "json", "sitecustomize", "site")
#: Code that runs in place of a job, and prints the environment, arguments and open files that it
#: receives.
TELLS = """
import json, os, sys
files = [int(name) for name in os.listdir("/dev/fd")]
print(json.dumps({
    "env": dict(os.environ), "cwd": os.getcwd(), "args": sys.argv[1:],
    "files": [n for n in files if n > 2 and os.path.exists(f"/dev/fd/{n}")],
}))
"""


def test_modules_in_the_folder_where_the_server_starts_are_not_run(tmp_path, monkeypatch):
    start = tmp_path / "start"
    start.mkdir()
    ran = tmp_path / "ran"
    for name in MODULES:
        (start / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(start)
    monkeypatch.setenv("PYTHONPATH", "")  # Python treats this as the working directory
    monkeypatch.setattr(processes, "STARTED_IN", str(start))
    for first in ("", str(start), "."):  # the first entry of the module path with `python -m`
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [first, *sys.path])
            values = {"model_dir": "/nowhere", "data_dir": "/nowhere", "split": "valid"}
            row, log = ended(tmp_path / "store", "evaluate", values)
            assert row.status == "failed" and "/nowhere" in (row.error or ""), log
            assert not ran.exists(), ran.read_text()


def test_a_job_is_of_the_package_that_the_server_is_of(tmp_path):
    """A job runs the server's copy of the package, even if another copy is installed."""
    package = tmp_path / "mlx_segtrain"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(processes.__file__, package)
    (package / "main.py").write_text("def main(*args):\n    print(__file__, *args)\n    return 3\n")
    for first in (tmp_path, "."):
        script = f"""
            import subprocess, sys
            sys.path.insert(0, {str(first)!r})
            from mlx_segtrain import processes
            made = processes.command("mlx_segtrain.main", "a", "b c")
            sys.exit(subprocess.run(made, cwd="/").returncode)
        """
        made = subprocess.run(
            # -S disables the site module. Otherwise, an editable installation would be found first.
            [sys.executable, "-I", "-S", "-c", textwrap.dedent(script)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 3, made.stderr
        assert made.stdout == f"{tmp_path / 'mlx_segtrain' / 'main.py'} a b c\n"


def test_what_a_file_makes_libraries_print_is_no_event(tmp_path):
    """transformers prints some settings verbatim, so a model's files can put forged events into a
    job's output. A forged progress event with the value 10⁴⁰ once stopped the queue."""
    model, data = write_llama(tmp_path / "model"), write_rows(tmp_path / "data", 3)
    forged = json.dumps({"type": "metric", "progress": 10**40, "message": {}})
    for name, change in (
        ("config.json", {"rope_scaling": {"rope_type": f"x\n{forged}\n", "factor": 2.0}}),
        ("tokenizer_config.json", {"padding_side": "x"}),
    ):
        file = model / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    values = {"model_dir": str(model), "data_dir": str(data), "split": "train"}
    row, log = ended(tmp_path / "store", "evaluate", values)
    found = [json.loads(line) for line in log.splitlines()]
    assert row.status == "failed" and 0 <= row.progress <= 1, log
    assert not [event for event in found if event["type"] == "metric"]
    assert [event for event in found if "10000" in event.get("line", "")]  # the text was printed


@pytest.fixture
def telling(monkeypatch):
    def command(module, *args):
        return [sys.executable, "-I", "-c", TELLS, module, *args]

    monkeypatch.setattr(processes, "command", command)


SECRETS = {
    **{"MLX_SEGTRAIN_TOKEN": "s1", "AWS_SECRET_ACCESS_KEY": "s2", "GITHUB_TOKEN": "s3"},
    **{"HF_TOKEN": "s4", "WANDB_API_KEY": "s5", "SSH_AUTH_SOCK": "s6", "LD_PRELOAD": ""},
    **{"PYTHONPATH": "s8", "PYTHONSTARTUP": "s9", "OPENAI_API_KEY": "s10"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_knows_little(telling, tmp_path, monkeypatch, kind):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    with open(tmp_path / "open", "w") as ours:
        os.set_inheritable(ours.fileno(), True)
        _, log = ended(tmp_path / "store", kind, HF_TOKEN="set by a client")
    told = json.loads(next(line for line in log.splitlines() if line.startswith('{"env"')))
    environment = told["env"]
    hub = {"push": {"HF_TOKEN"}, "download": {"HF_TOKEN"}}
    wanted = {**hub, "finetune": {"WANDB_API_KEY"}}.get(kind, set())
    assert set(environment) & set(SECRETS) == wanted
    if kind in hub:
        assert environment["HF_TOKEN"] == "set by a client"
    assert environment["LC_ALL"] == "C.UTF-8" and environment["PATH"] == os.environ["PATH"]
    assert told["cwd"] == str((tmp_path / "store" / "jobs").resolve())
    assert told["args"][:2] == ["mlx_segtrain.serving.jobs.worker", kind]
    assert told["files"] == [int(told["args"][3])]  # the job inherits only the lock


#: Code that runs in place of a job, and ignores SIGTERM, as compiled code may do.
DEAF = """
import json, os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(json.dumps({"type": "started", "pid": os.getpid()}), flush=True)
time.sleep(600)
"""


def test_a_job_that_looks_at_no_signal_is_killed_in_the_end(tmp_path, monkeypatch):
    """A job that ignores signals is killed. Otherwise a hostile tokenizer could run for hours while
    other jobs wait."""
    monkeypatch.setattr(processes, "command", lambda *args: [sys.executable, "-I", "-c", DEAF])
    monkeypatch.setattr(jobs_module, "KILLED_AFTER_S", 0.5)

    async def run():
        jobs = Jobs(tmp_path)
        await jobs.start()
        try:
            id = jobs.submit("evaluate", {}).id
            while jobs.live[id].pid is None or not jobs.log(id).read_text().count("pid"):
                await asyncio.sleep(0.05)
            jobs.cancel(id)
            await asyncio.sleep(0.7)
            assert jobs.get(id).status == "running"
            jobs.cancel(id)
            return await asyncio.wait_for(jobs.ended(id), 20)
        finally:
            await jobs.close()

    assert asyncio.run(run()).status == "cancelled"
