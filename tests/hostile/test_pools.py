"""Templates that loop forever or use too much memory, and slow inspections, must not affect other
clients."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from lib.attack import bystander, memory_mb, patience
from lib.endings import ended
from lib.folders import write_llama, write_rows
from lib.served import Server, write_place
from mlx_segtrain import InputError
from mlx_segtrain.serving.confined import parent as module
from mlx_segtrain.serving.confined.parent import Confined, Failed, Limits
from mlx_segtrain.serving.pools import Busy

#: A template that loops forever for the message "loop", and uses too much memory for the message
#: "grow".
TEMPLATE = (
    "{% set said = messages[0].content %}"
    "{% if said == 'loop' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif said == 'grow' %}{{ 'x' * 4000000000 }}"
    "{% elif said == 'slow' %}{% for a in range(99999) %}{% for b in range(20) %}{% endfor %}"
    "{% endfor %}{{ said }}{% else %}{{ said }}{% endif %}"
)


def write_hostile(path):
    write_llama(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("pools"))
    write_hostile(place / "hostile")
    with Server(place, place / "hostile", fresh=True) as server:
        assert say(server, "Hello")[0] == 200
        yield server


def say(server, text):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    with httpx.Client(base_url=server.url, timeout=120) as http:
        answer = http.post("/v1/chat/completions", json=body)
    return answer.status_code, answer.text


def test_seven_chats_with_a_template_that_loops(server):
    """Seven requests whose template looped forever once blocked all threads."""
    rest = memory_mb(server.process.pid)
    with ThreadPoolExecutor(14) as pool:
        attacks = [pool.submit(say, server, "loop") for _ in range(7)]
        attacks += [pool.submit(say, server, "grow") for _ in range(7)]
        time.sleep(0.5)
        with bystander(server) as other:
            time.sleep(6)
            assert sum(not attack.done() for attack in attacks) <= module.MOST_SLOW + 2
        answers = [attack.result() for attack in attacks]
    assert {status for status, _ in answers} <= {400, 429}, answers
    assert any("memory" in text for _, text in answers)
    assert any("are slow" in text or "processor time" in text for _, text in answers)
    assert len(other.answers) > 3 and max(other.answers) < 5 * patience(), other.answers
    assert max(other.health) < patience() and other.grown_mb < 500
    end = time.monotonic() + 20
    while memory_mb(server.process.pid) - rest > 100:
        assert time.monotonic() < end, (memory_mb(server.process.pid), rest)
        time.sleep(0.5)


def test_what_takes_a_while_is_answered_all_the_same(server):
    assert say(server, "slow")[0] == 200


def test_a_dozen_inspections_and_looks(server):
    data = server.cwd / "many"
    write_rows(data, 40_000)
    body = {"path": str(data), "model_dir": str(server.cwd / "model")}

    def inspect(_):
        with httpx.Client(base_url=server.url, timeout=300) as http:
            return http.post("/api/finetune/inspect-dataset", json=body)

    with ThreadPoolExecutor(12) as pool:
        attacks = [pool.submit(inspect, i) for i in range(12)]
        with bystander(server) as other:
            time.sleep(5)
            begun = time.monotonic()
            assert server.http.get("/api/models").status_code == 200
            plan = {"model_dir": str(server.cwd / "model"), "max_seq_length": 64}
            assert server.http.post("/api/finetune/plan", json=plan).status_code == 200
            assert time.monotonic() - begun < 4 * patience()
        (data / "train.jsonl").write_text("{}\n")  # later inspections end soon
        codes = {attack.result().status_code for attack in attacks}
    assert codes <= {200, 429} and other.grown_mb < 500
    assert max(other.health) < patience() and max(other.answers) < 5 * patience()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "train.jsonl"])
def test_seven_looks_at_a_pipe(server, name):
    place = server.cwd / f"pipe-{name}"
    write_llama(place / "model")
    write_rows(place / "data")
    file = place / ("data" if name == "train.jsonl" else "model") / name
    file.unlink()
    os.mkfifo(file)
    inspect = {"path": str(place / "data"), "model_dir": str(place / "model")}
    plan = {"model_dir": str(place / "model"), "max_seq_length": 64}

    def look(i):
        with httpx.Client(base_url=server.url, timeout=60) as http:
            if i % 2:
                return http.post("/api/finetune/inspect-dataset", json=inspect)
            return http.post("/api/finetune/plan", json=plan)

    begun = time.monotonic()
    with bystander(server) as other, ThreadPoolExecutor(7) as pool:
        answers = list(pool.map(look, range(7)))
    assert time.monotonic() - begun < 15 * patience()
    assert all(answer.status_code in (200, 400) for answer in answers), answers
    assert all(not x.json()["ok"] for x in answers[1::2])
    assert max(other.health) < patience() and max(other.answers) < 5 * patience()


# The processes


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    confined = Confined(write_hostile(tmp_path_factory.mktemp("confined") / "model"))
    yield confined
    confined.close()


def chat(confined, text, limits=None):
    return confined.ask(
        "chat",
        limits or Limits(2, 64 << 20),
        "it",
        messages=[{"role": "user", "content": text}],
        variables={},
        most=100,
    )


def test_limits_of_a_process(hostile):
    good = chat(hostile, "Hello")
    assert len(good) == 5 and chat(hostile, "x" * 200) == 200
    begun = time.monotonic()
    with pytest.raises(Failed, match="it uses more than 64 MiB of memory"):
        chat(hostile, "grow")
    with pytest.raises(Failed, match="2 s of processor time"):
        chat(hostile, "loop")
    assert time.monotonic() - begun < 8 * patience()
    assert chat(hostile, "Hello") == good


def test_of_many_that_are_slow_the_slowest_ends(hostile):
    def one(i):
        try:
            return chat(hostile, "loop", Limits(30 - i, 64 << 20))
        except (Busy, Failed) as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        attacks = [pool.submit(one, i) for i in range(module.MOST_SLOW + 2)]
        ended = []
        end = time.monotonic() + 20 * patience()
        while len(ended) < 2:
            assert time.monotonic() < end
            ended = [attack.result() for attack in attacks if attack.done()]
            time.sleep(0.05)
        assert len(chat(hostile, "Hello")) == 5
        for slow in list(hostile._slow):
            slow.wire.shutdown(2)
    assert all(isinstance(error, Busy) for error in ended), ended


def test_a_killed_process_is_started_again(hostile):
    good = chat(hostile, "Hello")
    os.kill(hostile._keeper.pid, 9)
    for idle in hostile._idle:
        os.kill(idle.pid, 9)
    end = time.monotonic() + 20
    while True:
        try:
            assert chat(hostile, "Hello") == good
            break
        except (Busy, Failed):
            assert time.monotonic() < end
    module._ROOT.popen.kill()
    module._ROOT.popen.wait()
    other = Confined(hostile.folder)
    assert chat(other, "Hello") == good
    other.close()


def test_a_panic_of_the_tokenizer_is_its_own_answer(tmp_path):
    model = write_llama(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": cut}))
    confined = Confined(model)
    with pytest.raises(InputError):
        confined.ask("encode", Limits(2, 64 << 20), "it", text="Hello you", most=100)
    confined.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"decoder": {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}},
            "regular",
        ),
        (
            {
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": "z"}, "content": "zzzz"}
                        for _ in range(10)
                    ],
                }
            },
            "more than 8 times its length",
        ),
        ({"added_tokens": [{"id": 299, "content": "x" * 5000}]}, "a token has 5000 characters"),
    ],
)
def test_tokenizers_that_are_not_served(change, says, tmp_path):
    model = write_llama(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in change.get("added_tokens", ()):
        token.update({**flags, "special": True})
    change = {
        key: [*tokenizer[key], *value] if key == "added_tokens" else value
        for key, value in change.items()
    }
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, **change}))
    with pytest.raises(InputError, match=says):
        Confined(model).start()


def test_it_has_no_secrets_and_leaves_nothing_behind(tmp_path):
    """No process remains, even if the server is killed."""
    model = write_llama(tmp_path / "model")
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from mlx_segtrain.serving.confined.parent import Confined, Limits, _ROOT\n"
        f"confined = Confined(Path({str(model)!r}))\n"
        "confined.ask('encode', Limits(2, 64 << 20), 'it', text='a', most=9)\n"
        "print(_ROOT.popen.pid, confined._keeper.pid, confined._idle[0].pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    env = {**os.environ, "HF_TOKEN": "hf_SECRET", "MLX_SEGTRAIN_TOKEN": "SECRET"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        left = [psutil.Process(pid) for pid in pids]
        for pid in pids:
            with open(f"/proc/{pid}/environ", "rb") as environ:
                assert b"SECRET" not in environ.read()
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert len(os.listdir(f"/proc/{pid}/fd")) < 10
    finally:
        process.kill()
        process.wait()
    assert ended(left)


def test_pools_are_bounded():
    import asyncio

    pool, go = module.Pool("tests", 1, 2), threading.Event()

    async def main():
        calls = [asyncio.ensure_future(pool.run(go.wait)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="too many requests for tests"):
            await pool.run(go.wait)
        calls[0].cancel()  # the thread of this call continues and is still counted
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await pool.run(go.wait)
        go.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert await pool.run(lambda: 5) == 5

    asyncio.run(main())
    pool._threads.shutdown(wait=False)


def test_an_answer_that_comes_in_parts(monkeypatch):
    """On a busy machine, a worker may pause in the middle of its response for longer than a time
    slice. The response must still be read completely."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(module, "SLICE_S", 0.05)
    monkeypatch.setattr(Confined, "start", lambda self: None)
    monkeypatch.setattr(Confined, "_take", lambda self: module._Process(ours, 0))

    def answer():
        body = json.dumps({"value": 7}).encode()
        frame = struct.pack("<I", len(body)) + body
        for part in (frame[:2], frame[2:9], frame[9:]):
            theirs.sendall(part)
            time.sleep(0.2)

    with theirs, ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer)
        assert Confined().ask("any", Limits(1, 1), "it") == 7
        answered.result()


def test_an_account_with_limits_of_its_own(tmp_path):
    """Workers must also start under limits that were set with `ulimit -v` and `ulimit -t` and
    cannot be raised."""
    script = """if True:
        import resource, sys
        from mlx_segtrain.serving.confined.parent import Confined, Limits
        for kind, most in ((resource.RLIMIT_AS, 16 << 30), (resource.RLIMIT_CPU, 600)):
            resource.setrlimit(kind, (most, most))
        own = Confined(None if len(sys.argv) < 2 else sys.argv[1])
        for _ in range(2):
            print(len(own.ask("encode", Limits(5, 64 << 20), "it", text="Hello", most=100)))
        own.close()
    """
    model = write_llama(tmp_path / "model")
    command = [sys.executable, "-c", script, str(model)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0 and len(made.stdout.split()) == 2, made.stderr
