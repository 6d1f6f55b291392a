"""Helpers for browser tests of the page: a server with its folders, and a user who opens pages."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from playwright.sync_api import expect

from lib import forks

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
#: The timeout in milliseconds. The default of 5000 is too short for busy machines.
expect.set_options(timeout=15_000)
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@dataclass
class Site:
    """A server with its folders."""

    url: str
    work: Path
    cache: Path
    pid: int

    def api(self, path: str, method: str | None = None, **values: Any) -> dict[str, Any]:
        body = json.dumps(values).encode() if values else None
        head = {"content-type": "application/json"}
        request = Request(self.url + path, body, head, method=method)
        with urlopen(request) as answer:
            return json.load(answer)

    def train(self, **values: Any) -> str:
        """Trains the tiny model and waits for the run to end."""
        own = {
            "model_dir": str(self.work / "tiny"),
            "data_dir": str(self.work / "counting"),
            **{"iters": 20, "max_seq_length": 64, "steps_per_report": 1, "steps_per_eval": 5},
        }
        id = self.api("/api/finetune/submit", **{**own, **values})["job_id"]
        self.wait(id)
        return id

    def job(self, id: str) -> dict[str, Any]:
        return self.api(f"/api/jobs/{id}")["job"]

    def wait(self, id: str) -> dict[str, Any]:
        end = time.monotonic() + 180
        while (job := self.job(id))["status"] in ("queued", "running"):
            assert time.monotonic() < end, f"{id} has not ended in time"
            time.sleep(0.1)
        return job


@contextmanager
def serving(work: Path, cache: Path, *options: str) -> Iterator[Site]:
    """Starts a server with these folders."""
    env = {**os.environ, "MLX_SEGTRAIN_CACHE": str(cache)}
    options = ("--port", "0", "--root", str(work), *options)
    process = forks.start_server(*options, env=env, cwd=work, stderr=2)
    try:
        address = process.stdout.readline().strip().removesuffix("/finetune")
        assert address.startswith("http://"), "the server has not started"
        yield Site(address, work, cache, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stdout.close()


@dataclass
class User:
    """Opens pages and records errors and requests to other hosts."""

    browser: Any
    site: Site
    shots: Path | None  # the folder for screenshots, if any
    faults: list[str] = field(default_factory=list)

    def page(self, viewport: dict[str, int] = DESK, scheme: str = "light") -> Any:
        context = self.browser.new_context(
            viewport=viewport, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("request", lambda request: self._check(request.url))
        return page

    def open(self, path: str = "/finetune", *, page: Any = None, **how: Any) -> Any:
        page = page or self.page(**how)
        page.goto(self.site.url + path)
        page.get_by_role("heading", level=1).wait_for()
        expect(page.locator(".looking")).to_have_count(0)
        return page

    def shot(self, page: Any, name: str) -> None:
        if self.shots is not None:
            page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def _note(self, message: Any) -> None:
        # The browser logs every response with an error status, but the page itself reports these
        # errors.
        refused = re.fullmatch(r"Failed to load resource: .* status of 4\d\d .*", message.text)
        asked = re.match(r"/(api|v1)/", message.location["url"].removeprefix(self.site.url))
        if message.type in ("error", "warning") and not (refused and asked):
            self.faults.append(f"console: {message.text}")

    def _check(self, url: str) -> None:
        if not url.startswith((self.site.url, "data:", "blob:")):
            self.faults.append(f"request elsewhere: {url}")


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=re.compile(re.escape(option))).click()
    expect(page.get_by_role("listbox")).to_have_count(0)


def points(page: Any, line: int = 0) -> int:
    """Returns the number of points on a line of the large chart."""
    return page.evaluate(
        """line => document.querySelector(".chart.tall")?.lines[line]?.points.length ?? 0""", line
    )


def until(check: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "the expected state was not reached"
        time.sleep(0.1)


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
