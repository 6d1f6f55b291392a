"""The page as people use it: a browser, a server's process, and SmolLM2 on the demo's data."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import expect, sync_playwright

from lib.folders import write_llama, write_rows
from lib.kinds import of_each_kind
from mlx_segtrain.commands.demo.docstrings import write_dataset
from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
from mlx_segtrain.config import load_config
from mlx_segtrain.files import cache_dir
from mlx_segtrain.planning.run import full_batch, plan_run
from mlx_segtrain.serving.jobs.store import Store
from mlx_segtrain.training.setup import plan_event

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is on the path"
    ),
]
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
#: The first row of the data set; which docstring would come first depends on the Python.
ROW = ("What does this Python function do?\n\nos.getcwd()", "Returns the current directory.")
#: Milliseconds for what a model computes; other things take the default.
LONG = 90_000


@dataclass
class Site:
    """A server with its folders."""

    url: str
    work: Path
    cache: Path

    def api(self, path: str, **values: Any) -> dict[str, Any]:
        body = json.dumps(values).encode() if values else None
        request = Request(self.url + path, body, {"content-type": "application/json"})
        with urlopen(request) as answer:
            return json.load(answer)

    def train(self, **values: Any) -> str:
        """A run of the tiny model, which has ended."""
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
        for _ in range(600):
            if (job := self.job(id))["status"] not in ("queued", "running"):
                return job
            time.sleep(0.1)
        raise AssertionError(f"{id} does not end")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    place = tmp_path_factory.mktemp("site")
    work, cache = place / "work", place / "cache"
    snapshot = smollm2_snapshot(cache_dir())
    shutil.copytree(snapshot, work / snapshot.name)
    write_llama(work / "tiny", bits=4)
    write_rows(write_rows(work / "counting"), 6, "valid.jsonl")
    write_dataset(work / "docstrings")
    turns = [{"role": r, "content": x} for r, x in zip(("user", "assistant"), ROW, strict=True)]
    # An evaluation of all rows takes a while on a CPU.
    for name, first, most in (("train", [{"messages": turns}], 59), ("valid", [], 8)):
        path = work / "docstrings" / f"{name}.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines(True)[:most]
        path.write_text("".join(json.dumps(row) + "\n" for row in first) + "".join(rows), "utf-8")
    with serving(work, cache) as own:
        yield own


@contextmanager
def serving(work: Path, cache: Path, *options: str) -> Iterator[Site]:
    """A server's process, whose folders these are."""
    command = [sys.executable, "-m", "mlx_segtrain.commands.main", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--root", str(work), *options],
        env={**os.environ, "MLX_SEGTRAIN_CACHE": str(cache)},
        cwd=work,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip().removesuffix("/finetune")
        assert address.startswith("http://"), "the server has not started"
        yield Site(address, work, cache)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.fixture
def hub_site(site, hub, tmp_path, monkeypatch) -> Iterator[Site]:
    """A server that may download from a hub, which has the tiny model."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.add("org/small-4bit", site.work / "tiny")
    hub.add("org/counting", site.work / "counting", "datasets")
    cache = tmp_path / "hf" / "hub"
    cache.mkdir(parents=True)
    options = ("--allow-downloads", "--root", str(cache))
    with serving(site.work, tmp_path / "cache", *options) as own:
        yield own


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@dataclass
class User:
    """Opens pages, and notes what a page must not do."""

    browser: Any
    site: Site
    shots: Path
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
        page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def _note(self, message: Any) -> None:
        # The browser says of each answer that is an error what its page says, too.
        refused = re.fullmatch(r"Failed to load resource: .* status of 4\d\d .*", message.text)
        asked = re.match(r"/(api|v1)/", message.location["url"].removeprefix(self.site.url))
        if message.type in ("error", "warning") and not (refused and asked):
            self.faults.append(f"console: {message.text}")

    def _check(self, url: str) -> None:
        if not url.startswith((self.site.url, "data:", "blob:")):
            self.faults.append(f"request elsewhere: {url}")


@pytest.fixture
def user(browser, site, tmp_path) -> Iterator[User]:
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    own = User(browser, site, shots)
    yield own
    for context in browser.contexts:
        context.close()
    assert not own.faults


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=re.compile(re.escape(option))).click()
    expect(page.get_by_role("listbox")).to_have_count(0)


def points(page: Any, line: int = 0) -> int:
    """Points of a line of the large chart."""
    return page.evaluate(
        """line => document.querySelector(".chart.tall")?.lines[line]?.points.length ?? 0""", line
    )


def until(check: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_from_model_and_data_to_an_adapter_that_answers(user, site):
    page = user.open()
    choose(page, "Model", "SmolLM2")
    expect(page.get_by_text("llama", exact=True)).to_be_visible()
    choose(page, "Data set", "docstrings")
    page.get_by_label("Longest row, tokens").fill("64")
    page.get_by_label("Steps", exact=True).fill("20")
    page.get_by_role("button", name="Evaluation and checkpoints").click()
    page.get_by_label("Report every, steps").fill("1")
    page.get_by_label("Evaluate every, steps").fill("10")
    page.get_by_role("button", name="Inspect data").click()
    expect(page.get_by_text("Rows to train", exact=True)).to_be_visible(timeout=LONG)
    marked = page.locator(".tokens:not(.legend) mark").first
    expect(marked).to_have_text(f"{ROW[1]}<|im_end|>")
    expect(page.get_by_text(re.compile("Fits: .* GB, longest [0-9,]+ tokens"))).to_be_visible()
    user.shot(page, "setup")
    page.get_by_role("button", name="Start training").click()

    page.wait_for_url(re.compile("/finetune/job/job_"))
    id = page.url.rpartition("/")[2]
    until(lambda: points(page) >= 2)
    before = points(page)
    until(lambda: points(page) > before)
    page.reload()
    until(lambda: points(page) > before)  # in the middle of it, with all that was
    assert site.job(id)["status"] == "running"
    user.shot(page, "running")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text(re.compile("Cancelled: step [0-9]+ is kept"))).to_be_visible(
        timeout=LONG
    )
    kept = points(page)
    user.shot(page, "cancelled")
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_text("Use the adapter")).to_be_visible(timeout=LONG)
    expect(page.get_by_text("Step 20 of 20")).to_be_visible()
    assert points(page) >= max(kept, 20)
    assert site.job(id)["status"] == "done"
    user.shot(page, "done")

    page.get_by_role("button", name="Chat with it").click()
    page.get_by_role("button", name="Load this model").click()
    expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=LONG)
    page.get_by_label("Most tokens").fill("6")
    page.get_by_label("Prompt").fill("What does <b>os.getcwd</b> do?")
    page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_text(re.compile("tokens?, .* tokens/s"))).to_have_count(2, timeout=LONG)
    base, own = page.locator(".answer .said").all_inner_texts()
    assert base.strip() and own.strip()
    expect(page.get_by_text("What does <b>os.getcwd</b> do?")).to_be_visible()  # as it was typed
    assert fits(page)
    user.shot(page, "chat")

    user.open(f"/finetune/job/{id}", page=page)
    page.get_by_role("button", name=re.compile("Fold")).click()
    page.get_by_role("button", name="Fold into the base").click()
    page.get_by_role("link", name=re.compile("^Fold: ")).click()
    expect(page.get_by_text("Share of the update lost in rounding")).to_be_visible(timeout=LONG)
    user.shot(page, "fold")


def test_a_curve_of_any_length_has_few_points_and_every_spike(user):
    found = user.open().evaluate(
        """async () => {
        const { Curve, MOST } = await import("/finetune/files/runs.js");
        const curve = new Curve();
        for (let step = 0; step < 100_000; step++) curve.add(step, step === 54_321 ? 9 : 1);
        const { points, extremes, lowest, buckets } = curve;
        const many = buckets.flat().length;
        curve.cut(1000);  // resumed from there: what came after is taken again
        const last = [curve.points.at(-1)[0]];
        for (const lacks of [null, NaN]) curve.add(1001, lacks);
        last.push(curve.points.at(-1)[0]);
        return { MOST, points: points.length, extremes, lowest, many, last };
        }"""
    )
    assert found["points"] <= found["MOST"] and len(found["extremes"]) <= 2 * found["MOST"]
    assert [54_321, 9] in found["extremes"] and found["lowest"] == 1
    assert found["many"] == 100_000 and max(found["last"]) <= 1000


def test_a_page_knows_what_was_planned_whatever_the_words_are(user, site):
    folders = {"model_dir": "tiny", "data_dir": "counting", "adapter_path": "planned"}
    values = {key: str(site.work / name) for key, name in folders.items()}
    config = load_config(None, {**values, "max_seq_length": 64})
    plan = plan_run(config, full_batch(config))
    planned = user.open().evaluate(
        """async (event) => {
        const { Run } = await import("/finetune/files/runs.js");
        const run = new Run("job_a");
        run.take(event, 1);
        return run.planned;
        }""",
        plan_event(plan, 0.02, "in other words"),
    )
    assert planned == [plan.planned.peak / 1e9, plan.budget / 1e9]


@pytest.fixture(scope="module")
def runs(site) -> list[str]:
    """Two that are done and differ, and one that failed."""
    more = site.work / "pairs"
    more.mkdir()
    (more / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    odd = str(site.work / "<img src=x onerror=boom()>")  # names are text wherever they are shown
    return [
        site.train(rank=4),
        site.train(learning_rate=0.003, adapter_path=odd),
        site.train(data_dir=str(more)),
    ]


def test_losses_of_two_runs_in_one_chart(user, runs):
    page = user.open("/finetune/jobs")
    for id in runs[:2]:
        page.get_by_label(f"Compare {id}").click()
    until(lambda: points(page, 0) >= 20 and points(page, 2) >= 20)
    expect(page.get_by_role("columnheader", name="learning_rate")).to_be_visible()
    expect(page.get_by_role("cell", name="0.003")).to_be_visible()
    page.locator(".chart.tall").hover()
    expect(page.locator(".chart.tall")).to_contain_text("<img src=x onerror=boom()>")
    user.shot(page, "compare")
    page.reload()  # its address says what is compared
    until(lambda: points(page, 2) >= 20)


def test_a_model_by_its_name_on_the_hub(user, hub_site, hub):
    user.site, hub.pause_s = hub_site, 0.2
    page = user.open()
    model = page.get_by_label("Model", exact=True)
    model.fill("org/small-4bit")
    expect(
        page.get_by_role("option", name="org/small-4bit · on the Hugging Face hub")
    ).to_be_visible()
    model.press("Tab")
    said = "neither a path here nor in this machine's cache of the hub"
    expect(page.locator(".notice", has_text=said)).to_be_visible()
    page.get_by_role("button", name="Download").click()
    expect(page.get_by_text(re.compile(r"downloading org/small-4bit: 0\.\d MB of"))).to_be_visible()
    user.shot(page, "download")
    hub.pause_s = 0
    expect(page.get_by_text("Computed by")).to_be_visible()
    assert model.input_value().startswith("org/small-4bit · llama")
    page.get_by_label("Longest row, tokens").fill("64")
    page.get_by_label("or its path").fill("org/counting")
    page.get_by_role("button", name="Download").click()
    expect(page.get_by_text("org/counting is on this machine.")).to_be_visible()
    page.get_by_role("button", name="Inspect data").click()
    expect(page.get_by_text("Rows to train", exact=True)).to_be_visible(timeout=LONG)
    page.get_by_label("Steps", exact=True).fill("2")
    expect(page.locator(".notice.good")).to_be_visible()
    user.shot(page, "downloaded")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/finetune/job/*")
    expect(page.get_by_role("heading", name="org/small-4bit on org/counting")).to_be_visible()
    assert hub_site.wait(page.url.rpartition("/")[2])["status"] == "done"
    user.open("/finetune", page=page)
    model.fill("org/none")
    model.press("Enter")
    page.get_by_role("button", name="Download").click()
    expect(page.get_by_role("alert").filter(has_text="nor a model of the hub")).to_be_visible()
    page.close()  # before its server ends


def test_the_page_shows_jobs_of_each_kind(user, site):
    """A job whose kind the page does not know took the list of all jobs with it."""
    with of_each_kind(site.cache) as jobs:
        page = user.open("/finetune/jobs")
        for id, (_, title, name) in jobs.items():
            row = page.get_by_role("row").filter(has_text=f"{title} · {id}")
            expect(row).to_contain_text(name)
        expect(page.get_by_text("https://hub.example/me/one")).to_be_visible()
        for id, (_, title, name) in jobs.items():
            user.open(f"/finetune/job/{id}", page=page)
            expect(page.get_by_text(f"{title} · {id}")).to_be_visible()
            expect(page.get_by_role("heading", name=name)).to_be_visible()


def test_older_jobs_are_a_click_away(user, site):
    jobs = Store(site.cache / "jobs.sqlite")
    jobs.connection.execute("BEGIN")
    ids = [jobs.add("export", "{}", None).id for _ in range(120)]
    for id in ids:
        jobs.update(id, status="failed")
    jobs.connection.execute("COMMIT")
    try:
        page = user.open("/finetune/jobs")
        expect(page.get_by_text(ids[-1])).to_be_visible()
        expect(page.get_by_text(ids[0])).to_have_count(0)
        page.get_by_role("button", name="Older jobs").click()
        expect(page.get_by_text(ids[0])).to_be_visible()
        page.wait_for_timeout(2500)  # it stays, whatever the next looks bring
        expect(page.get_by_text(ids[0])).to_be_visible()
    finally:
        for id in ids:
            jobs.remove(id)
        jobs.close()


def test_a_failure_says_why_and_a_job_is_deleted_after_a_question(user, site, runs):
    page = user.open(f"/finetune/job/{runs[2]}")
    expect(page.get_by_role("alert")).to_contain_text("give method dpo, orpo, simpo or kto")
    user.shot(page, "failed")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert site.job(runs[2])["status"] == "failed"
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete the job").click()
    page.wait_for_url("**/finetune/jobs")
    expect(page.get_by_text(runs[0])).to_be_visible()
    expect(page.get_by_text(runs[2])).to_have_count(0)


def test_what_is_wrong_is_said_at_its_field_and_at_the_start(user):
    page = user.open()
    choose(page, "Model", "tiny")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("alert").filter(has_text="Choose a data set first")).to_be_visible()
    page.get_by_label("Rank", exact=True).fill("1")
    said = "rank must be an integer >= 2; got 1"
    expect(page.locator(".field .wrong", has_text=said)).to_be_visible()
    page.get_by_label("Rank", exact=True).fill("")
    expect(page.locator(".field .wrong", has_text=said)).to_have_count(0)
    said = "max_seq_length is 512, but the model was made for at most 128 tokens"
    expect(page.locator(".field .wrong", has_text=said)).to_be_visible()
    page.get_by_label("Longest row, tokens").fill("64")
    page.get_by_role("button", name="Memory").click()
    page.get_by_label("Memory budget, GB").fill("0.001")
    expect(page.locator(".notice", has_text="more than the budget of 1 MB")).to_be_visible()
    user.shot(page, "no-room")
    page.get_by_label("or its path").fill("/nowhere")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("alert").filter(has_text="outside of what this server")).to_be_visible()


def test_the_keyboard_alone_starts_a_run(user, site):
    page = user.open()
    keys = page.keyboard

    def tab_to(name: str) -> None:
        seen = []
        for _ in range(60):
            keys.press("Tab")
            own = page.evaluate(
                """() => { const own = document.activeElement, style = getComputedStyle(own);
                const ring = own.closest(".q-field--focused") || style.outlineStyle !== "none";
                const label = own.labels?.[0]?.innerText || own.ariaLabel || own.innerText;
                return [(label || "").trim().split("\\n").pop(), !!ring] }"""
            )
            seen.append(own[0])
            if own[0] == name:
                assert own[1], f"{name} has the focus, but does not show it"
                return
        raise AssertionError(f"{name} is not reached, but {seen}")

    tab_to("Model")
    keys.press("Enter")
    page.get_by_role("option").first.wait_for()
    keys.type("tiny")
    keys.press("Enter")
    tab_to("or its path")
    keys.type(str(site.work / "counting"))
    tab_to("Steps")
    keys.type("3")
    tab_to("Longest row, tokens")
    keys.type("64")
    keys.press("Enter")  # in any field
    page.wait_for_url(re.compile("/finetune/job/job_"))
    expect(page.get_by_text("Step 3 of 3")).to_be_visible(timeout=LONG)


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_a_phone_has_no_sideways_scrolling_on_any_page(user, runs, scheme):
    page = user.page(PHONE, scheme)
    chosen = f"/finetune/jobs?compare={','.join(runs[:2])}"
    for name, path in {
        "setup": "/finetune",
        "job": f"/finetune/job/{runs[0]}",
        "jobs": chosen,
        "chat": "/finetune/chat",
        "nothing": "/finetune/job/none",
    }.items():
        user.open(path, page=page)
        page.wait_for_timeout(400)
        assert fits(page), name
        user.shot(page, f"phone-{name}-{scheme}")


def test_the_theme_follows_the_system_until_it_is_chosen(user):
    page = user.open(scheme="dark")

    def background() -> int:
        return page.evaluate("+getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")

    assert background() < 60
    page.emulate_media(color_scheme="light")
    until(lambda: background() > 200)
    for name, dark in (("light", False), ("dark", True)):
        page.get_by_role("button", name=re.compile("Theme")).click()
        expect(page.get_by_role("button", name=f"Theme: {name}")).to_be_visible()
        until(lambda dark=dark: (background() < 60) == dark)
    user.open("/finetune/jobs", page=page)
    assert background() < 60
    user.shot(page, "jobs-dark")


def test_swagger_s_page_keeps_to_the_policy(user, site):
    page = user.page()
    page.goto(f"{site.url}/docs")
    submit = page.locator("[data-path='/api/finetune/submit']")
    expect(submit).to_be_visible(timeout=LONG)


def test_a_server_that_has_nothing_says_what_to_do(browser, tmp_path):
    (tmp_path / "work").mkdir()
    token = "only-for-this-test"
    with serving(tmp_path / "work", tmp_path / "cache", "--token", token) as site:
        user = User(browser, site, tmp_path)
        page = user.page()
        page.goto(f"{site.url}/finetune")
        page.get_by_label("The token of this server").fill(token)
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_text("put the folder of an MLX model there")).to_be_visible()
        expect(page.get_by_text("put train.jsonl (and valid.jsonl) into a folder")).to_be_visible()
        user.open("/finetune/jobs", page=page)
        expect(page.get_by_text("No job yet: start one under New run.")).to_be_visible()
        user.open("/finetune/chat", page=page)
        expect(page.get_by_text("No model found")).to_be_visible()
        bearer = {"authorization": f"Bearer {token}"}
        urlopen(Request(f"{site.url}/api/sessions", headers=bearer, method="DELETE")).close()
        page.wait_for_url("**/login")  # an open page, too
        page.context.close()
