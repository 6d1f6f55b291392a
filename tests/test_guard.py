"""Tests access control without a server: the guard and allowed folders."""

import asyncio
import os
import time

import pytest

from mlx_segtrain.errors import InputError
from mlx_segtrain.serving.api import guard
from mlx_segtrain.serving.api.guard import Guard
from mlx_segtrain.serving.roots import Outside, Roots
from mlx_segtrain.serving.sessions import LASTS_S, MOST, Sessions
from mlx_segtrain.serving.settings import Settings


async def echo(scope, receive, send):
    """An app that returns the body's length. Like FastAPI, it treats every error as an invalid
    body."""
    size, more, status = 0, scope["type"] == "http", 200
    try:
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    except Exception:
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % size})


def ask(
    headers=(), body=(b"",), *, token=None, any_address=False, kind="http", sessions=None, **scope
):
    """Sends a request through the guard, and returns the response's status, headers and body."""
    parts = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(body)}
        for i, part in enumerate(body)
    ]
    sent = []

    async def receive():
        if not parts:
            await asyncio.sleep(60)
        message = parts.pop(0)
        if message["body"] is None:
            await asyncio.sleep(60)
        return message

    async def send(message):
        sent.append(message)

    app = Guard(echo, hosts=["box.local"], token=token, any_address=any_address)
    app.sessions = sessions or app.sessions
    given = {"host": "localhost:8090", **dict(headers)}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    whole = {"type": kind, "method": "POST", "path": "/api/jobs", "headers": pairs, **scope}
    asyncio.run(app(whole, receive, send))
    if kind == "websocket":
        return sent
    (start, *rest) = sent
    assert start["type"] == "http.response.start" and len(rest) == 1
    return start["status"], dict(start["headers"]), rest[0].get("body", b"")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(name, 200) for name in ("localhost", "LOCALHOST:1", "127.0.0.1:8090", "[::1]:8090")],
        *[("box.local:80", 200), ("evil.example", 403), ("localhost.evil.example", 403)],
        *[("localhost:x@evil", 403), ("[::1]evil", 403), ("[[127.0.0.1", 403)],
        *[("10.0.0.7", 403), ("", 403), ("[::2]", 403), ("localhost@evil.example", 403)],
    ],
)
def test_host(host, status, caplog):
    assert ask({"host": host})[0] == status
    assert ("refused (403)" in caplog.text) == (status == 403)


def test_a_header_that_stands_twice():
    for name in ("host", "origin", "content-length"):
        assert ask({name.upper(): "localhost", name: "localhost"})[0] == 400


def test_on_another_address_any_address_is_a_name():
    assert ask({"host": "10.0.0.7:8090"}, any_address=True)[0] == 200
    assert ask({"host": "evil.example"}, any_address=True)[0] == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://localhost:8090"}, 200),
        ({"origin": "https://localhost:8090"}, 200),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        # A form submitted from another site.
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
    ],
)
def test_origin(headers, status):
    assert ask(headers)[0] == status
    sent = ask(headers, kind="websocket", path="/finetune")
    # WebSockets are refused for every client.
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_link_from_elsewhere_may_lead_here():
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert ask(link, method="GET")[0] == 200


def test_token(caplog):
    wants = {"token": "correct horse"}
    assert ask(**wants)[0] == 401
    assert ask({"authorization": "Bearer wrong"}, **wants)[0] == 401
    assert ask({"authorization": "Basic correct horse"}, **wants)[0] == 401
    assert ask({"authorization": "Bearer caf\xe9"}, **wants)[0] == 401
    assert ask({"cookie": f"{guard.COOKIE}=wrong"}, **wants)[0] == 401
    assert ask({"cookie": "=;;=,"}, **wants)[0] == 401
    assert ask({"authorization": "bearer correct horse"}, **wants)[0] == 200
    # Browsers send cookies to all ports of this machine, so the cookie must not contain the token.
    assert ask({"cookie": f'a=b; {guard.COOKIE}="correct horse"'}, **wants)[0] == 401
    sessions = Sessions()
    one, other = sessions.open(), sessions.open()
    cookies = {"cookie": f'a=b; {guard.COOKIE}="{one}"'}
    assert ask(cookies, sessions=sessions, **wants)[0] == 200
    # The session was opened by another server, so this server does not know it.
    assert ask(cookies, sessions=Sessions(), **wants)[0] == 401
    sessions.close(one)
    assert ask(cookies, sessions=sessions, **wants)[0] == 401 and sessions.holds(other)
    assert ask(path="/healthz", **wants)[0] == 200
    status, headers, _ = ask({"accept": "text/html"}, method="GET", **wants)
    assert (status, headers[b"location"]) == (303, b"/login")
    assert ask(kind="websocket", **wants)[0]["type"] == "websocket.close"
    assert "correct" not in caplog.text


def test_bodies(monkeypatch, caplog):
    monkeypatch.setattr(guard, "MOST_BYTES", 1000)
    assert ask(body=[b"x" * 400, b"x" * 600])[2] == b"1000"
    status, headers, body = ask({"content-length": "1000000000"})
    assert status == 413 and headers[b"connection"] == b"close" and b"the limit of 1000" in body
    status, _, body = ask(body=[b"x" * 400] * 10)  # without a content-length
    assert status == 413 and b"more than 1000" in body
    monkeypatch.setattr(guard, "PART_S", 0.05)
    status, _, body = ask(body=[b"x", None])
    assert status == 408 and b"in time" in body
    assert caplog.text.count("refused (413)") == 2 and "refused (408)" in caplog.text


def test_answers_tell_browsers_to_be_careful():
    headers = ask()[1]
    assert headers[b"x-content-type-options"] == b"nosniff"
    policy = dict(x.split(maxsplit=1) for x in headers[b"content-security-policy"].split(b"; "))
    assert policy[b"frame-ancestors"] == b"'none'" and policy[b"default-src"] == b"'self'"
    for name in (b"connect-src", b"form-action", b"base-uri", b"script-src", b"style-src"):
        assert policy[name] == b"'self'"
    assert b"unsafe" not in headers[b"content-security-policy"]
    assert headers[b"cross-origin-opener-policy"] == b"same-origin"


def test_sessions_end(monkeypatch):
    sessions, now = Sessions(), time.monotonic()
    ids = [sessions.open() for _ in range(MOST + 1)]
    assert len(set(ids)) == len(ids) and len(ids[0]) > 40
    assert not sessions.holds(ids[0]) and all(map(sessions.holds, ids[1:]))
    assert not any(map(sessions.holds, ("", "x", "\ud800", ids[1][:-1])))
    monkeypatch.setattr(time, "monotonic", lambda: now + LASTS_S + 60)
    assert not sessions.holds(ids[-1])
    again = sessions.open()
    sessions.close_all()
    assert not sessions.holds(again)


def test_errors_have_the_form_of_their_path():
    assert b'{"error": {"message"' in ask({"host": "x"}, path="/v1/models")[2]
    assert b'{"ok": false, "error"' in ask({"host": "x"}, path="/api/jobs")[2]


def test_a_path_in_the_log_is_no_control_sequence(caplog):
    ask({"host": "x"}, path="/a\x1b[31m\nrefused (200)")
    assert "\x1b" not in caplog.text and caplog.text.count("\n") == 1


def test_roots(tmp_path):
    root, other = tmp_path / "root", tmp_path / "rooted"
    (root / "in").mkdir(parents=True)
    other.mkdir()
    (root / "in" / "train.jsonl").write_text("{}")
    roots = Roots([root])
    assert roots.resolve(root) == roots.resolve(str(root / "in" / "..")) == root
    assert roots.resolve(root / "new" / "folder") == root / "new" / "folder"
    (root / "within").symlink_to(root / "in")
    assert roots.resolve(root / "within") == root / "in"
    (root / "out").symlink_to(other)
    (root / "sly").mkdir()
    (root / "sly" / "train.jsonl").symlink_to("/etc/passwd")
    for path in (
        *(other, "/", "/etc/passwd", "~root", f"{root}/../rooted", root / "out", root / "out/x"),
        *(root / "sly", root / "sly" / "train.jsonl", "in/../../../.."),
    ):
        with pytest.raises(Outside, match="is not below a directory"):
            roots.resolve(path)
    (root / "loop").symlink_to(root / "loop")
    for path in ("", "a\0b", f"{root}/{'x' * 300}/y", "~nobody-of-this-name/x", root / "loop"):
        with pytest.raises(InputError):
            roots.resolve(path)


def test_a_server_that_anyone_could_use_is_not_set_up():
    with pytest.raises(InputError, match="--token"):
        Settings(host="0.0.0.0")
    with pytest.raises(InputError, match="fewer than 8"):
        Settings(token="short")
    settings = Settings(host="0.0.0.0", token="long enough")
    assert "long enough" not in repr(settings)
    assert os.getcwd() in map(str, settings.folders)
