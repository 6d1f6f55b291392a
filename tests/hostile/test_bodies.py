"""Tests request bodies that need far more memory or time than their size suggests."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lib.attack import bystander, memory_mb, patience
from lib.served import Server, write_place
from mlx_segtrain.serving import service
from mlx_segtrain.serving.settings import Settings

AS_JSON = {"content-type": "application/json"}
SIZE = 8_000_000


def filled(begin, part, end):
    return begin + part * ((SIZE - len(begin)) // len(part)) + end


def strings(n, many):
    return b"{" + b",".join(b'"%d":%s' % (i, many) for i in range(n)) + b"}"


CHAT, TEXT, TRAIN = "/v1/chat/completions", "/v1/completions", "/api/finetune/submit"
BODIES = {
    "bad messages": (CHAT, filled(b'{"messages":[', b"1,", b"1]}")),
    "objects for messages": (CHAT, filled(b'{"messages":[', b"{},", b"{}]}")),
    "lists for messages": (CHAT, filled(b'{"messages":[', b"[],", b"[]]}")),
    "parts": (CHAT, filled(b'{"messages":[{"role":"user","content":[', b"{},", b"{}]}]}")),
    "fields of a message": (CHAT, filled(b'{"messages":[', b'{"":0},', b"{}]}")),
    "biases": (CHAT, b'{"messages":[],"logit_bias":' + strings(600_000, b'"x"') + b"}"),
    "unknown fields": (TRAIN, strings(700_000, b"0")),
    "texts for tokens": (TEXT, filled(b'{"prompt":[', b'"a",', b"1]}")),
    "tokens with a text": (TEXT, filled(b'{"prompt":[', b"1,", b'"a"]}')),
    "numbers": (TEXT, filled(b'{"prompt":[', b"0.1,", b"1]}")),
    "a list for a name": (TRAIN, filled(b'{"model_dir":[', b"0,", b"1]}")),
    "a string with escapes": (TRAIN, filled(b'{"model_dir":"', b'\\"', b'"')),
    "a string without an end": (TRAIN, filled(b'{"model_dir":"', b"x", b"")),
    "strings": (TRAIN, filled(b"", b'""', b"")),
    "a form": ("/login", filled(b"", b"a&", b"token=x")),
    "no JSON at all": (CHAT, filled(b"", b"\xff", b"")),
    "a comment with a quote": (TRAIN, filled(b'{"a": // "\n [', b"{},", b"{}]}")),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("bodies"))
    with Server(place, place / "model", fresh=True) as server:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert server.http.post(CHAT, json=body).status_code == 200
        yield server


def test_bodies_that_hold_millions(server):
    """A body with 4 million invalid messages once used 8 GB and blocked all other clients for a
    minute."""
    with bystander(server) as other, httpx.Client(base_url=server.url, timeout=60) as http:
        for name, (path, body) in BODIES.items():
            kind = "x-www-form-urlencoded" if path == "/login" else "json"
            begun = time.monotonic()
            answer = http.post(path, content=body, headers={"content-type": f"application/{kind}"})
            took = time.monotonic() - begun
            assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text)
            assert took < 4 * patience() and len(answer.content) < 2000, (name, took)
    assert max(other.health) < patience() and max(other.answers) < 5 * patience()
    assert other.grown_mb < 500, other.grown_mb


def test_many_large_bodies_at_once(server):
    """The total size of all bodies is limited, which also limits the memory that they use after
    parsing."""
    body = json.dumps({"prompt": [5] * 1_000_000, "max_tokens": 1}).encode()
    assert len(body) < 8 << 20

    def send(_):
        with httpx.Client(base_url=server.url, timeout=60) as http:
            return http.post(TEXT, content=body, headers=AS_JSON).status_code

    with bystander(server) as other, ThreadPoolExecutor(24) as pool:
        codes = list(pool.map(send, range(48)))
    assert set(codes) <= {400, 429, 503} and 400 in codes, codes
    assert max(other.health) < 1.5 * patience() and other.grown_mb < 500, other.grown_mb


def test_bodies_that_never_end_are_bounded_together(server):
    """Each of 60 clients sends 6 MB of a 7 MB body, and then waits."""
    rest, wires = memory_mb(server.process.pid), []
    head = f"POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"

    def hold():
        wire = socket.create_connection(("127.0.0.1", server.port))
        wires.append(wire)
        wire.sendall(f"{head}content-length: 7000000\r\n\r\n".encode())
        try:
            for _ in range(60):
                wire.sendall(b" " * 100_000)
        except OSError:
            pass  # most of the clients must be refused

    threads = [threading.Thread(target=hold) for _ in range(60)]
    try:
        with bystander(server) as other:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert memory_mb(server.process.pid) - rest < 300, memory_mb(server.process.pid) - rest
        assert max(other.health) < patience()
    finally:
        for wire in wires:
            wire.close()
    end = time.monotonic() + 10
    large = json.dumps({"prompt": "x" * 200_000, "max_tokens": 1}).encode()
    while server.http.post(TEXT, content=large, headers=AS_JSON).status_code == 503:
        assert time.monotonic() < end, "closed requests are still counted"
        time.sleep(0.1)


def test_memory_is_given_back(tmp_path, monkeypatch):
    """The server returns freed memory to the system. Otherwise, the C library would keep up to
    1 GB."""
    monkeypatch.setattr(service, "TIDY_S", 0.1)
    own = service.Service(Settings(store=tmp_path, roots=(tmp_path,)))

    async def main():
        await own.start()
        await asyncio.sleep(0.3)
        rest = service.resident()
        blocks = [bytearray(50_000) for _ in range(6000)]
        last = blocks[-1]  # keeps the end of the heap in use, so the heap cannot shrink
        await asyncio.sleep(0.3)
        del blocks
        end = time.monotonic() + 10
        while service.resident() - rest > 60e6:
            assert time.monotonic() < end, (service.resident(), rest)
            await asyncio.sleep(0.05)
        assert len(last) == 50_000
        await own.close()

    asyncio.run(main())


def test_a_large_prompt_is_still_a_prompt(server):
    """The limits are far above the sizes of real conversations and prompts."""
    turns = [{"role": "user", "content": 'He said: "{[,:"\\'} for _ in range(9000)]
    answer = server.http.post(CHAT, json={"messages": turns, "max_tokens": 1})
    assert answer.status_code == 400 and "context length" in answer.json()["error"]["message"]
    code = '{"a": [1, 2, {"b": "c"}], "d": ""},\n' * 10_000
    answer = server.http.post(TEXT, json={"prompt": code, "max_tokens": 1})
    assert answer.status_code == 400 and "context length" in answer.json()["error"]["message"]
    answer = server.http.post(TEXT, json={"prompt": [5] * 1_000_000, "max_tokens": 1})
    assert answer.status_code == 400 and "context length" in answer.json()["error"]["message"]
