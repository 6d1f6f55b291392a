"""Tests what other users of this machine, and other sites in the same browser, can see of a
server."""

import os
import stat
import sys

import httpx
import pytest

from lib.served import Server, ended
from mlx_segtrain.errors import InputError
from mlx_segtrain.serving.api.guard import COOKIE
from mlx_segtrain.serving.jobs.queue import Jobs

TOKEN = "a token of this test"


def modes(folder):
    """Returns the paths at and below a folder that other users can access, with their modes."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): oct(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o077}


def test_a_store_is_for_its_user_alone(tmp_path):
    before = os.umask(0)
    try:
        _, log = ended(tmp_path / "store", "evaluate", {"split": "valid"})
    finally:
        os.umask(before)
    names = {path.name.rpartition(".")[2] for path in (tmp_path / "store").rglob("*")}
    assert {"log", "lock", "json", "sqlite"} <= names and log
    assert modes(tmp_path / "store") == {}


def test_a_store_of_an_older_version_is_closed(tmp_path):
    store = tmp_path / "store"
    ended(store, "evaluate", {"split": "valid"})
    for path in (store, *store.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    ended(store, "merge")
    assert modes(store) == {}


def test_a_store_that_others_can_write_to_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir(mode=0o777)
    (tmp_path / "store").chmod(0o777)

    def chmod(*_, **__):
        raise PermissionError

    monkeypatch.setattr(type(tmp_path), "chmod", chmod)
    with pytest.raises(InputError, match="other users can write to"):
        Jobs(tmp_path / "store")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("private")
    with Server(place, MLX_SEGTRAIN_TOKEN=TOKEN, fresh=True) as server:
        yield server


def log_in(server):
    browser = httpx.Client(base_url=server.url)
    answer = browser.post("/login", data={"token": TOKEN})
    assert answer.status_code == 303 and answer.headers["location"] == "/finetune"
    return browser, answer.headers["set-cookie"]


def test_a_browser_has_a_session_and_not_the_token(server):
    browser, cookie = log_in(server)
    other, its_cookie = log_in(server)
    assert cookie.startswith(f"{COOKIE}=") and TOKEN not in cookie and cookie != its_cookie
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    assert browser.get("/api/jobs").status_code == other.get("/api/jobs").status_code == 200
    # Other programs on ports of localhost receive the cookie too, so it must not work as a bearer
    # token.
    stolen = browser.cookies[COOKIE]
    as_token = httpx.get(f"{server.url}/api/jobs", headers={"authorization": f"Bearer {stolen}"})
    assert as_token.status_code == 401
    assert httpx.get(f"{server.url}/api/jobs", cookies={COOKIE: TOKEN}).status_code == 401
    assert TOKEN not in server.said and stolen not in server.said


def test_a_session_can_be_ended(server):
    browser, _ = log_in(server)
    other, _ = log_in(server)
    id = browser.cookies[COOKIE]
    answer = browser.post("/logout")
    assert answer.status_code == 303 and answer.headers["location"] == "/login"
    assert COOKIE not in browser.cookies
    assert httpx.get(f"{server.url}/api/jobs", cookies={COOKIE: id}).status_code == 401
    assert other.get("/api/jobs").status_code == 200
    page = other.get("/finetune")
    assert page.status_code == 200 and "Log out" in page.text
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.delete(f"{server.url}/api/sessions").status_code == 401
    assert httpx.delete(f"{server.url}/api/sessions", headers=bearer).status_code == 200
    assert other.get("/api/jobs").status_code == 401


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_store_of_a_server_that_runs(server):
    own = server.cache
    assert modes(own) == {} and stat.S_ISREG((own / "jobs.sqlite").stat().st_mode)
