"""Tests the page in a browser with a real server and the first 6 of SmolLM2's 30 layers."""

import csv
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from lib.browsing import BROWSER, DESK, PHONE, Site, User, choose, fits, points, serving, until
from lib.folders import write_first_layers, write_llama, write_rows
from lib.kinds import of_each_kind
from mlx_segtrain.commands.demo.docstrings import write_dataset
from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
from mlx_segtrain.config import load_config
from mlx_segtrain.events import train_metric, with_ranks
from mlx_segtrain.files import cache_dir
from mlx_segtrain.planning.run import full_batch, plan_run
from mlx_segtrain.serving.api.pages import FILES, VERSION
from mlx_segtrain.serving.jobs.store import Store
from mlx_segtrain.training.setup import plan_event

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(BROWSER is None, reason="no browser is on the PATH"),
]
#: The first row of the data set. It is inserted here because the data set's own first row depends
#: on the Python version.
ROW = ("What does this Python function do?\n\nos.getcwd()", "Returns the current directory.")
#: The timeout for steps in which a model computes, in milliseconds. All other steps use the
#: default.
LONG = 240_000
#: The URL of the page's modules, for tests that import a module.
OURS = f"/finetune/files/{VERSION}"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    place = tmp_path_factory.mktemp("site")
    work, cache = place / "work", place / "cache"
    (work / "pairs").mkdir(parents=True)
    pair = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (work / "pairs" / "train.jsonl").write_text(pair)
    snapshot = smollm2_snapshot(cache_dir())
    write_first_layers(work / snapshot.name, snapshot, 6)
    write_llama(work / "tiny", bits=4)
    write_rows(write_rows(work / "counting"), 6, "valid.jsonl")
    write_dataset(work / "docstrings")
    turns = [{"role": r, "content": x} for r, x in zip(("user", "assistant"), ROW, strict=True)]
    # Only some rows are kept, because evaluating all of them would be slow on a CPU.
    for name, first, most in (("train", [{"messages": turns}], 59), ("valid", [], 8)):
        path = work / "docstrings" / f"{name}.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines(True)[:most]
        path.write_text("".join(json.dumps(row) + "\n" for row in first) + "".join(rows), "utf-8")
    with serving(work, cache, "--ranks", "2") as own:
        yield own


@pytest.fixture
def hub_site(site, hub, tmp_path, monkeypatch) -> Iterator[Site]:
    """Starts a server that may download the tiny model from a hub."""
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


@pytest.fixture
def user(browser, site) -> Iterator[User]:
    shots = None
    if "SCREENSHOTS" in os.environ:  # off by default, because the images are only for people
        shots = Path(os.environ["SCREENSHOTS"])
        shots.mkdir(parents=True, exist_ok=True)
    own = User(browser, site, shots)
    yield own
    for context in browser.contexts:
        context.close()
    assert not own.faults


@pytest.fixture(scope="module")
def titles(site) -> dict[str, str]:
    """Returns the labels of the form's fields."""
    return {own["name"]: own["title"] for own in site.api("/api/finetune/defaults")["fields"]}


def test_from_model_and_data_to_an_adapter_that_answers(user, site, titles):
    page = user.open()
    choose(page, "Model", "SmolLM2")
    expect(page.get_by_text("8,192 tokens", exact=True)).to_be_visible()
    expect(page.get_by_text(re.compile(" free for a run$"))).to_be_visible()
    page.get_by_role("button", name="Quick try").click()
    page.get_by_label(titles["max_seq_length"]).fill("64")
    choose(page, "Data set", "docstrings")
    expect(page.get_by_text("Training rows", exact=True)).to_be_visible(timeout=LONG)
    marked = page.locator(".tokens:not(.legend) mark").first
    expect(marked).to_have_text(f"{ROW[1]}<|im_end|>")
    expect(page.get_by_text(re.compile("Fits: .* GB, longest [0-9,]+ tokens"))).to_be_visible()
    page.get_by_label("Name of the run").fill("the first one")
    user.shot(page, "setup")
    page.get_by_role("button", name="Start training").click()

    page.wait_for_url(re.compile("/finetune/job/job_"))
    id = page.url.rpartition("/")[2]
    expect(page.get_by_role("heading", name="the first one")).to_be_visible()
    until(lambda: points(page) >= 2)
    before = points(page)
    until(lambda: points(page) > before)
    page.reload()
    until(lambda: points(page) > before)  # the run continues, and earlier points are shown
    assert site.job(id)["status"] == "running"
    expect(page.get_by_text(re.compile("^Memory on .* in use, peak .*, planned"))).to_be_visible()
    user.shot(page, "running")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text(re.compile("Cancelled: step [0-9]+ is saved"))).to_be_visible(
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
    page.get_by_role("button", name="System prompt and sampling").click()
    page.get_by_label("Max tokens").fill("6")
    page.get_by_label("Prompt", exact=True).fill("What does <b>os.getcwd</b> do?")
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(page.get_by_text(re.compile("tokens?, .* tokens/s"))).to_have_count(2, timeout=LONG)
    base, own = page.locator(".answer .said").all_inner_texts()
    assert base.strip() and own.strip()
    # The text is shown exactly as typed.
    expect(page.get_by_text("What does <b>os.getcwd</b> do?")).to_be_visible()
    assert fits(page)
    user.shot(page, "chat")

    user.open(f"/finetune/job/{id}", page=page)
    page.get_by_role("button", name=re.compile("Merge into base model")).click()
    page.get_by_role("button", name="Merge into the base").click()
    page.get_by_role("link", name=re.compile("^Merge into base: ")).click()
    expect(page.get_by_text("Share of the update lost in rounding")).to_be_visible(timeout=LONG)
    user.shot(page, "fold")


def test_a_curve_of_any_length_has_few_points_and_every_spike(user):
    found = user.open().evaluate(
        """async () => {
        const { Curve, MOST } = await import("OURS/runs.js");
        const curve = new Curve();
        for (let step = 0; step < 100_000; step++) curve.add(step, step === 54_321 ? 9 : 1);
        const { points, extremes, lowest, buckets } = curve;
        const many = buckets.flat().length;
        curve.cut(1000);  // resumed from step 1000, so the steps after it are repeated
        const last = [curve.points.at(-1)[0]];
        for (const lacks of [null, NaN]) curve.add(1001, lacks);
        last.push(curve.points.at(-1)[0]);
        return { MOST, points: points.length, extremes, lowest, many, last };
        }""".replace("OURS", OURS)
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
        const { Run } = await import("OURS/runs.js");
        const run = new Run("job_a");
        run.take(event, 1);
        return run.planned;
        }""".replace("OURS", OURS),
        plan_event(plan, 0.02, "in other words"),
    )
    assert planned == [plan.planned.peak / 1e9, plan.budget / 1e9]


def test_between_two_reports_memory_and_steps_go_on(user):
    told = user.open().evaluate(
        """async () => {
        const { Run } = await import("OURS/runs.js");
        const run = new Run("job_a");
        run.take({ type: "stage", stage: "train", message: "", iters: 100, step: 0 }, 1);
        const metric = { type: "metric", kind: "train", step: 1, loss: 2, message: "", step_s: 9 };
        run.take({ ...metric, active_gb: 1, peak_gb: 2, left_s: 990 }, 2);
        run.take({ type: "step", step: 7, active_gb: 1.5, peak_gb: 3, left_s: 900 }, 3);
        const { live, step, left, lines, train } = run;
        return [live.active_gb, live.peak_gb, step, left, lines.length, train.step];
        }""".replace("OURS", OURS)
    )
    assert told == [1.5, 3, 7, 900, 2, 1]  # the log contains only reported steps


def test_values_have_the_unit_of_their_method(user):
    evaluated = {"kind": "evaluate", "status": "done"}
    said = user.open("/finetune/jobs").evaluate(
        """async (rows) => {
        const { inShort, shownResult } = await import("OURS/results.js");
        const whole = (row) => shownResult(row)[1].textContent;
        return rows.map((row) => [inShort(row), whole(row)]);
        }""".replace("OURS", OURS),
        [
            evaluated
            | {"loss_unit": "per pair", "result": {"loss": 0.5, "tokens": 3, "split": "valid"}},
            evaluated
            | {
                **{"loss_unit": "per completion", "rewarded": True},
                "result": {"reward": 0.75, "rows": 2, "truncated": 0.5, "pass_at": {"1": 0.25}}
                | {"base": {"reward": 0.5, "pass_at": {"1": 0.125}, "metrics": {}}},
            },
            {"kind": "finetune", "status": "done", "loss_unit": "nats per token"}
            | {"result": {"final_val_loss": 1.5}},
            {"kind": "finetune", "status": "done", "loss_unit": "per completion", "rewarded": True}
            | {"result": {"final_val_loss": -0.75}},
        ],
    )
    (pair, whole), (reward, rewards), (run, _), (rewarded, _) = said
    assert pair == "loss 0.5000 per pair over 3 tokens (valid)"
    assert "0.5000 per pair" in whole
    assert reward == "base → adapter 0.5000 → 0.7500 (+0.2500, +50.0\xa0%) over 2 prompts"
    assert "12.5\xa0% → 25.0\xa0%" in rewards and "Truncated completions50.0\xa0%" in rewards
    assert run == "validation loss 1.5000 nats per token"
    assert rewarded == "validation reward 0.7500"


def cpu_s(page: Any, site: Site, act: Any) -> float:
    """Returns the CPU seconds that the page's main thread and the server use for an action."""
    cdp = page.context.new_cdp_session(page)
    cdp.send("Performance.enable", {"timeDomain": "threadTicks"})

    def now() -> float:
        found = {x["name"]: x["value"] for x in cdp.send("Performance.getMetrics")["metrics"]}
        return found["TaskDuration"] + sum(psutil.Process(site.pid).cpu_times()[:2])

    before = now()
    act()
    return now() - before


@pytest.mark.parametrize("path", ["/finetune", "/finetune/jobs", "job", "/finetune/chat"])
def test_a_page_is_there_in_less_than_a_second(user, site, runs, path):
    """A page load needs less than one second of CPU time. Unlike the elapsed time, the CPU time
    does not depend on the load of the machine. A second load fetches no files."""
    path = f"/finetune/job/{runs[0]}" if path == "job" else path
    page = user.page()
    loads = [cpu_s(page, site, lambda: user.open(path, page=page)) for _ in range(2)]
    assert max(loads) < 1, loads
    entries = page.evaluate(
        """() => performance.getEntriesByType("resource")
        .filter((own) => own.name.includes("/files/"))
        .map(({ name, transferSize }) => [name, transferSize])"""
    )
    assert 5 < len(entries) <= 18 and not any(size for _, size in entries), entries
    fresh = user.open(path)
    first, sizes = fresh.evaluate(
        """() => [performance.getEntriesByName("first-contentful-paint")[0].startTime,
        performance.getEntriesByType("resource").filter((own) => own.name.includes("/files/"))
        .map(({ decodedBodySize }) => decodedBodySize)]"""
    )
    assert sum(sizes) < 170_000, sizes
    print(f"{path}: {loads} s of CPU time, first paint after {first:.0f} ms, {len(sizes)} files")


def test_settings_come_from_a_file(user, site, titles, tmp_path):
    page = user.open()
    own = tmp_path / "mine.yaml"
    lines = [f"model_dir: {site.work / 'tiny'}", f"data_dir: {site.work / 'counting'}"]
    lines += ["max_seq_length: 64", "iters: 3", "rank: 1", "target_modules: [q_proj, v_proj]"]
    lines += ["epoch: 2", "batch_size: many", "use_dora: true", "adapter_path: there"]
    own.write_text("\n".join(lines))

    def load() -> None:
        page.locator("[type=file][accept*=yaml]").set_input_files(str(own))

    load()
    expect(page.get_by_text("mine.yaml is loaded, without adapter_path")).to_be_visible()
    expect(page.get_by_text("unknown field epoch. Did you mean epochs?")).to_be_visible()

    def wrong(name: str) -> Any:
        return page.locator(".field.invalid", has=page.get_by_label(titles[name], exact=True))

    expect(wrong("rank")).to_contain_text("rank must be an integer >= 2; got 1")
    expect(wrong("batch_size")).to_contain_text("batch_size must be an integer >= 1; got 'many'")
    expect(page.get_by_label(titles["target_modules"])).to_have_value("q_proj, v_proj")
    expect(page.get_by_label(titles["use_dora"])).to_have_value("true")
    user.shot(page, "loaded")
    page.get_by_label(titles["rank"], exact=True).fill("4")
    expect(wrong("rank")).to_have_count(0)
    expect(wrong("batch_size")).to_be_visible()
    own.write_text("\n".join(lines[:5]).replace("rank: 1", "rank: 8"))
    load()
    expect(page.get_by_text("mine.yaml is loaded.")).to_be_visible()
    expect(page.locator(".field.invalid")).to_have_count(0)
    expect(page.get_by_label(titles["target_modules"])).to_have_value("")
    expect(page.get_by_text(re.compile("^Fits"))).to_be_visible()
    own.write_text("a: [")
    load()
    expect(
        page.get_by_text(re.compile("mine.yaml: the file, line 1: not valid YAML"))
    ).to_be_visible()


def test_settings_of_a_file_are_kept(user, site, tmp_path):
    """A value may be the default of another method or loss, and a text may have several lines."""
    page = user.open()
    own = tmp_path / "mine.yaml"
    for given in (
        {"method": "dpo", "lr_schedule": "constant", "learning_rate": 2e-4},
        {"method": "grpo", "grpo_loss": "dapo", "mask_truncated": False, "clip_high": 0.2},
        {"method": "grpo", "grpo_loss": "dr_grpo", "advantage_scaling": "group"},
        {"sample_prompts": ["Two\nlines", "  indented"]},
    ):
        given = {"model_dir": str(site.work / "tiny"), **given}
        own.write_text(yaml.safe_dump(given))
        with page.expect_response("**/api/finetune/read"):
            page.locator("[type=file][accept*=yaml]").set_input_files(str(own))
        expect(page.get_by_text("mine.yaml is loaded.")).to_be_visible()
        with page.expect_response("**/api/finetune/copy"):
            page.get_by_role("button", name="YAML", exact=True).click()
        copied = page.get_by_label("YAML", exact=True)
        expect(copied).to_have_value(re.compile(f"{list(given)[-1]}:"))
        assert yaml.safe_load(copied.input_value()) == {**given, "adapter_path": "adapters"}


def test_a_default_is_that_of_the_other_settings(user, titles):
    page = user.open()
    page.get_by_label(titles["method"], exact=True).select_option("grpo")
    truncated = page.get_by_label(titles["mask_truncated"])
    truncated.evaluate("own => own.closest('details').open = true")
    choices = truncated.locator("option")
    for loss, usual, scale in (("dapo", "yes", "0.28"), ("gspo", "no", "0.0004")):
        page.get_by_label(titles["grpo_loss"]).select_option(loss)
        assert choices.all_inner_texts()[0] == f"{usual} (default)"
        expect(page.get_by_label(titles["clip_high"])).to_have_attribute("placeholder", scale)
    page.get_by_label(titles["method"], exact=True).select_option("dpo")
    page.get_by_role("button", name="Standard").click()  # dpo's default schedule is the preset's
    expect(page.get_by_role("button", name="Standard", pressed=True)).to_have_count(1)


def test_a_wrong_setting_is_no_fault_of_the_data(user, titles):
    page = user.open()
    choose(page, "Model", "tiny")
    choose(page, "Data set", "counting")
    report = page.get_by_text("Training rows", exact=True)
    expect(report).to_be_visible()
    seed = page.get_by_label(titles["seed"], exact=True)
    seed.evaluate("own => own.closest('details').open = true")
    seed.fill("x")
    expect(page.locator(".field.invalid")).to_have_count(1)
    expect(page.locator(".field.invalid")).to_contain_text("seed must be an integer >= 0; got 'x'")
    seed.fill("1")
    expect(page.locator(".field.invalid")).to_have_count(0)
    expect(report).to_be_visible()


@pytest.fixture(scope="module")
def runs(site) -> list[str]:
    """Returns the ids of two finished runs with different settings, and of a failed run."""
    # The path contains HTML, which the page must show as text everywhere.
    odd = str(site.work / "<img src=x onerror=boom()>")
    return [
        site.train(rank=4),
        site.train(learning_rate=0.003, adapter_path=odd),
        site.train(data_dir=str(site.work / "pairs")),
    ]


def test_losses_of_two_runs_in_one_chart(user, site, runs):
    page = user.open("/finetune/jobs")
    for id in runs[:2]:
        page.get_by_label(f"Compare {id}").click()
    until(lambda: points(page, 0) >= 20 and points(page, 2) >= 20)
    expect(page.get_by_role("columnheader", name="learning_rate")).to_be_visible()
    expect(page.get_by_role("cell", name="0.003")).to_be_visible()
    page.locator(".chart.tall .u-over").hover()
    expect(page.locator(".tip")).to_contain_text("<img src=x onerror=boom()>")
    cells = [own.inner_text() for own in page.get_by_role("row").nth(1).get_by_role("cell").all()]
    assert cells[1:3] == ["4", "0.0002"]  # the default's value, not the word "default"
    last = [site.job(id)["result"]["final_val_loss"] for id in runs[:2]]
    second = page.get_by_role("row").nth(2)
    expect(second).to_contain_text(f"{last[1]:.4f}\n−{last[0] - last[1]:.4f}", use_inner_text=True)
    user.shot(page, "compare")
    with page.expect_download() as found:
        page.get_by_role("button", name="Save as CSV").click()
    rows = list(csv.DictReader(io.StringIO(found.value.path().read_text())))
    assert [row["job"] for row in rows] == runs[:2]
    assert [float(row["validation loss"]) for row in rows] == pytest.approx(last)
    page.reload()  # the URL contains the compared jobs
    until(lambda: points(page, 2) >= 20)


def test_a_result_that_is_missing_has_no_difference(user, runs):
    """The second run failed before its first step."""
    page = user.open("/finetune/jobs")
    for id in (runs[0], runs[2]):
        page.get_by_label(f"Compare {id}").click()
    until(lambda: points(page) >= 20)
    second = page.get_by_role("row").nth(2)
    expect(second).to_contain_text("–")
    cells = [own.inner_text() for own in second.get_by_role("cell").all()]
    assert "–" in cells and not [text for text in cells if text.startswith("–\n")], cells


def test_a_model_by_its_name_on_the_hub(user, hub_site, hub, titles):
    user.site, hub.pause_s = hub_site, 0.2
    page = user.open()
    model = page.get_by_label("Model", exact=True)
    hub.requests.clear()
    for typed in ("s", "sm", "sma", "small"):
        model.fill(typed)  # faster than a user types
    found = page.get_by_role("option", name="org/small-4bit · on the Hugging Face hub, 1.0 k")
    expect(found).to_be_visible()
    assert [path for _, path, _ in hub.requests].count("/api/models") == 1
    user.shot(page, "search")
    hub.searches_fail = True
    model.fill("small-8")
    expect(
        page.get_by_text("the hub answered a search with status 503: try again later.")
    ).to_be_visible()
    model.fill("org/small-4bit")
    expect(
        page.get_by_role("option", name="org/small-4bit · on the Hugging Face hub")
    ).to_be_visible()
    model.press("Tab")
    said = "neither a path nor in this machine's Hugging Face cache"
    expect(page.locator(".wrong", has_text=said)).to_be_visible()
    page.get_by_role("button", name="Download").click()
    comes = page.get_by_text(re.compile(r"downloading org/small-4bit: 0\.\d MB of"))
    expect(comes).to_be_visible(timeout=LONG)
    user.shot(page, "download")
    hub.pause_s = 0
    expect(page.get_by_text("Backend")).to_be_visible()
    expect(page.locator(".wrong", has_text=said)).to_have_count(0)
    assert model.input_value().startswith("org/small-4bit · llama")
    page.get_by_label(titles["max_seq_length"]).fill("64")
    data = page.get_by_label("Data set", exact=True)
    data.fill("org/counting")
    data.press("Tab")
    page.get_by_role("button", name="Download").click()
    expect(page.get_by_text("Training rows", exact=True)).to_be_visible(timeout=LONG)
    page.get_by_label(titles["iters"], exact=True).fill("2")
    expect(page.locator(".notice.good")).to_be_visible()
    user.shot(page, "downloaded")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/finetune/job/*")
    expect(page.get_by_role("heading", name="org/small-4bit on org/counting")).to_be_visible()
    assert hub_site.wait(page.url.rpartition("/")[2])["status"] == "done"

    page.get_by_role("button", name="Push to the Hugging Face hub").click()
    page.get_by_label("Repository").fill("me/mine")
    page.get_by_label("Hub token").fill("hf_" + "s" * 20)
    page.get_by_role("button", name="Push", exact=True).click()
    expect(page.get_by_role("link", name=f"{hub.url}/me/mine")).to_be_visible(timeout=LONG)
    assert "adapters.safetensors" in hub.pushed

    user.open("/finetune/library", page=page)
    page.get_by_label("Name on the Hugging Face hub").first.fill("org/none")
    page.get_by_role("button", name="Download", exact=True).first.click()
    failed = page.get_by_role("alert").filter(has_text="nor a model on the hub")
    expect(failed).to_be_visible(timeout=LONG)
    page.close()  # close the page before the server ends


def test_the_page_shows_jobs_of_each_kind(user, site):
    """A job of an unknown kind must not break the list of all jobs."""
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
        page.route("**/api/jobs*before=*", lambda route: route.abort())
        page.get_by_role("button", name="Older jobs").click()
        expect(page.get_by_role("alert")).not_to_be_empty()
        page.unroute("**/api/jobs*before=*")
        user.faults.clear()  # the browser reports the request that failed
        page.get_by_role("button", name="Older jobs").click()
        expect(page.get_by_text(ids[0])).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)
        page.wait_for_timeout(2500)  # the entry is still shown after the list is refreshed
        expect(page.get_by_text(ids[0])).to_be_visible()
    finally:
        for id in ids:
            jobs.remove(id)
        jobs.close()


def test_a_failure_says_why_and_a_job_is_deleted_after_a_question(user, site, runs):
    page = user.open(f"/finetune/job/{runs[2]}")
    expect(page.get_by_role("alert")).to_contain_text("use method dpo, orpo, simpo or kto")
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


def test_a_failed_job_offers_what_helps(user, site):
    """Resuming is not offered if the job would fail again for the same reason."""
    jobs, config = Store(site.cache / "jobs.sqlite"), {"model_dir": str(site.work / "tiny")}
    config |= {"data_dir": str(site.work / "counting"), "rank": 1, "max_seq_length": 96}
    offers = {
        "input": ({"Change the settings"}, {"fault_field": "rank", "error": "rank must be >= 2"}),
        "memory": ({"New run that uses less memory", "Resume"}, {}),
        "killed": ({"Resume", "New run that uses less memory"}, {}),
        "run": ({"Resume", "Change the settings"}, {}),
        "bug": ({"Show the log", "Resume"}, {}),
    }
    ids = {fault: jobs.add("finetune", json.dumps(config), None).id for fault in offers}
    try:
        page = user.page()
        for fault, (wanted, more) in offers.items():
            jobs.update(ids[fault], **{"status": "failed", "error": "no", "fault": fault, **more})
            user.open(f"/finetune/job/{ids[fault]}", page=page)
            expect(page.get_by_role("alert")).to_be_visible()
            shown = set(page.locator(".page button").all_inner_texts())
            every = {name for names, _ in offers.values() for name in names}
            assert shown & every == wanted, fault
        user.open(f"/finetune/job/{ids['input']}", page=page)
        page.get_by_role("button", name="Change the settings").click()
        wrong = page.locator(".field.invalid", has_text="rank must be >= 2")
        expect(wrong).to_be_in_viewport()  # the field's section is open
        user.open(f"/finetune/job/{ids['memory']}", page=page)
        page.get_by_role("button", name="New run that uses less memory").click()
        expect(page.locator("[title=max_seq_length]")).to_be_visible()
        half = page.get_by_label(page.locator("[title=max_seq_length]").inner_text())
        expect(half).to_have_value("48")
    finally:
        for id in ids.values():
            jobs.remove(id)
        jobs.close()


def test_ranks_of_a_run_are_compared_and_asked_for_again(user, site):
    """This server allows two processes, but one of the runs is from a server that allows three."""
    config = {"model_dir": str(site.work / "tiny"), "data_dir": str(site.work / "counting")}
    config |= {"max_seq_length": 64}
    figures = dict.fromkeys(("tokens_per_sec", "supervised_tokens_per_sec", "left_s"), 1.0)
    ranks = [
        {"busy_s": x, "waited_s": 1 - x, "tokens_per_sec": 1000 / x, "peak_gb": x, "active_gb": x}
        for x in (0.25, 0.5, 0.375)
    ]
    metric = with_ranks(train_metric(1, 2, loss=2.0, metrics={}, **figures), ranks)
    jobs = Store(site.cache / "jobs.sqlite")
    ids = [jobs.add("finetune", json.dumps({**config, "ranks": n}), None).id for n in (2, 3)]
    try:
        for id in ids:
            jobs.update(id, status="done")
            (site.cache / "jobs" / f"{id}.log").write_text(json.dumps(metric) + "\n")
        page = user.open(f"/finetune/job/{ids[1]}")
        card = page.get_by_role("region", name="Ranks")
        expect(card).to_contain_text("Rank 1 is the slowest: the others wait for it.")
        expect(card).to_contain_text("works 0.250 s longer per step")
        rows = card.locator("tbody tr").all_inner_texts()
        assert rows[0].split("\t") == ["Rank 0", "4,000", "0.250 s", "0.750 s", "250\u00a0MB"]
        assert len(rows) == 3
        expect(page.get_by_role("heading", name="Skew of ranks 0.250 s")).to_be_visible()
        user.shot(page, "ranks")
        for id, wanted in zip(ids, ("2", ""), strict=True):
            user.open(f"/finetune?origin={id}", page=page)
            expect(page.get_by_label("Processes")).to_have_value(wanted)
        page.get_by_label("Processes").fill("2")
        expect(page.get_by_text(re.compile(r"^Fits: .* GB per process, longest"))).to_be_visible()
        page.get_by_label("Processes").fill("3")
        page.get_by_role("button", name="Start training").click()
        wrong = page.locator(".field.invalid", has_text="this server allows at most 2 per job")
        expect(wrong).to_be_in_viewport()
        page.get_by_role("button", name="Command").click()
        expect(page.get_by_label("Command")).to_have_value(re.compile("^mlx.launch -n 3 -- "))
    finally:
        for id in ids:
            jobs.remove(id)
        jobs.close()


@pytest.mark.parametrize("size", (DESK, PHONE), ids=("desk", "phone"))
def test_what_is_wrong_is_said_at_its_cause_which_is_seen(user, titles, size):
    page = user.open(viewport=size)
    start = page.get_by_role("button", name="Start training")

    def wrong(said: str) -> Any:
        return page.locator(".field .wrong", has_text=said)

    choose(page, "Model", "tiny")
    start.click()
    expect(wrong("Choose a data set first")).to_be_in_viewport()
    expect(page.get_by_label("Data set", exact=True)).to_be_focused()
    user.shot(page, f"no-data-{size['width']}")
    choose(page, "Data set", "pairs")
    expect(wrong("Choose a data set first")).to_have_count(0)
    page.get_by_label(titles["max_seq_length"]).fill("64")
    # The data set is for another method.
    expect(wrong("which method sft does not accept")).to_be_visible(timeout=LONG)
    page.get_by_role("button", name="Use method dpo").click()
    expect(page.get_by_text("Training rows", exact=True)).to_be_visible(timeout=LONG)
    expect(wrong("which method sft does not accept")).to_have_count(0)
    rank = page.get_by_label(titles["rank"], exact=True)
    page.get_by_role("button", name="Rank, batch size and folder").click()
    rank.fill("1")
    said = "rank must be an integer >= 2; got 1"
    expect(wrong(said)).to_be_visible()
    page.get_by_role(
        "button", name="Rank, batch size and folder"
    ).click()  # collapses the section, which the error must open again
    start.click()
    expect(wrong(said)).to_be_in_viewport()
    expect(rank).to_be_focused()
    rank.fill("")
    expect(wrong(said)).to_have_count(0)
    page.get_by_role("button", name="Memory").click()
    page.get_by_label(titles["memory_budget_gb"]).fill("0.001")
    expect(page.locator(".notice", has_text="more than the budget of 1 MB")).to_be_visible()
    user.shot(page, f"no-room-{size['width']}")
    page.get_by_label(titles["memory_budget_gb"]).fill("")
    page.get_by_label("Data set", exact=True).fill("/nowhere")
    start.click()
    expect(wrong("not below a directory that this server")).to_be_in_viewport()
    assert fits(page)


def test_presets_set_what_they_say_and_a_server_takes_them(user, site, titles):
    page = user.open()
    choose(page, "Model", "tiny")
    page.get_by_label(titles["max_seq_length"]).fill("64")
    steps = page.get_by_label(titles["iters"], exact=True)
    for name in ("Thorough", "Standard", "Quick try"):
        page.get_by_role("button", name=name).click()
        expect(page.get_by_role("button", name=name, pressed=True)).to_have_count(1)
        expect(page.get_by_text(re.compile("^Fits"))).to_be_visible()
        expect(page.locator(".field.invalid")).to_have_count(0)
    expect(steps).to_have_value("20")
    steps.fill("21")  # differs from the preset
    expect(page.get_by_role("button", pressed=True).and_(page.locator(".preset"))).to_have_count(0)
    # The section is collapsed, but shows the number of changes.
    expect(page.get_by_text("2 settings changed")).to_be_visible()

    page.get_by_role("button", name="YAML", exact=True).click()
    copied = page.get_by_label("YAML", exact=True)
    expect(copied).to_be_visible()
    values = yaml.safe_load(copied.input_value())
    assert values == {
        **{"max_seq_length": 64, "iters": 21, "steps_per_report": 1, "steps_per_eval": 10},
        **{"model_dir": str(site.work / "tiny"), "adapter_path": "adapters"},
    }


def test_a_run_has_a_name_tags_and_a_note(user, site, runs):
    page = user.open(f"/finetune/job/{runs[0]}")
    page.get_by_role("button", name="Edit name").click()
    page.get_by_label("Name", exact=True).fill("<i>low</i> rank")
    page.get_by_label("Tags", exact=True).fill("small, second try")
    page.get_by_label("Note", exact=True).fill("Too low.")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("<i>low</i> rank")
    expect(page.get_by_text("Too low.")).to_be_visible()
    page.get_by_role("link", name="second try").click()
    expect(page.get_by_text(runs[0])).to_be_visible()
    expect(page.get_by_text(runs[1])).to_be_hidden()
    page.get_by_label("Find").fill("nothing has this")
    expect(page.get_by_text("No job contains all of these words.")).to_be_visible()
    job = site.job(runs[0])
    assert (job["name"], job["tags"]) == ("<i>low</i> rank", ["small", "second try"])


def test_charts_zoom_smooth_and_are_saved(user, runs):
    page = user.open(f"/finetune/job/{runs[0]}")
    until(lambda: points(page) >= 20)
    own = page.locator(".chart.tall")

    def scales() -> list[float]:
        return page.evaluate(
            """() => { const { x, y } = document.querySelector(".chart.tall").uplot.scales;
            return [x.min, x.max, y.min, y.max, y.distr]; }"""
        )

    least, most, low, high, *_ = scales()
    assert (least, most) == (0, 20) and low < high
    plot = own.locator(".u-over")
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.51, box["y"] + 50)
    tip = own.locator(".tip")
    expect(tip).to_contain_text("training")  # the tip shows lines that have a value at this step
    expect(tip).to_contain_text("validation")
    expect(tip).to_contain_text("step 10")
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 50, steps=4)
    page.mouse.up()
    until(lambda: 9 < scales()[0] < 11 and 17 < scales()[1] < 19)
    own.get_by_role("button", name="Show all").click()
    until(lambda: scales()[:4] == [0, 20, low, high])
    own.get_by_role("application").focus()
    for key in ("ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    expect(page.locator("#said")).to_contain_text("step 19; training: ")
    page.keyboard.press("+")
    until(lambda: scales()[1] - scales()[0] == 10)
    page.keyboard.press("0")
    until(lambda: scales()[:2] == [0, 20])
    own.get_by_label("Log scale").check()
    until(lambda: scales()[4] == 3)
    own.get_by_label("Smoothing").fill("0.9")
    series = 'document.querySelector(".chart.tall").uplot.series.length'
    # The series are the steps, the smoothed and the raw training loss, and the validation loss.
    until(lambda: page.evaluate(series) == 4)
    user.shot(page, "smoothed")
    with page.expect_download() as found:
        own.get_by_role("button", name="CSV").click()
    rows = list(csv.reader(found.value.path().open()))
    assert rows[0] == ["step", "training", "validation"] and len(rows) == 22


def test_the_mean_of_points_begins_where_they_do(user):
    means = user.open("/finetune/jobs").evaluate(
        """async () => {
        const { smoothed } = await import("OURS/charts.js");
        return smoothed([[1, 4], [2, 4], [3, 1]], 0.5);
        }""".replace("OURS", OURS)
    )
    assert means[:2] == [[1, 4], [2, 4]]
    assert means[2] == [3, pytest.approx((0.25 * 4 + 0.5 * 4 + 1) / 1.75)]


def test_base_and_adapter_are_one_line_of_an_evaluation(user, site, runs):
    page = user.open(f"/finetune/job/{runs[1]}")
    page.get_by_role("button", name="Evaluate", exact=False).first.click()
    page.get_by_role("button", name="Evaluate base and adapter").click()
    line = page.locator(".row-line", has_text="base → adapter")
    expect(line).to_be_visible(timeout=LONG)
    (job,) = [x for x in site.api("/api/jobs?kind=evaluate")["jobs"] if x["status"] == "done"]
    before, after = job["result"]["base"]["loss"], job["result"]["loss"]
    run = site.job(runs[1])["result"]
    assert after == pytest.approx(run["final_val_loss"], rel=1e-3)
    assert before == pytest.approx(run["first_val_loss"], rel=1e-3)
    expect(line).to_contain_text(
        f"{before:.4f} → {after:.4f} nats per token (−{before - after:.4f}, −"
    )
    user.shot(page, "evaluated")


def test_a_chat_of_two_adapters_is_there_after_a_reload(user, site, runs):
    site.api("/api/models/serve", model_dir=str(site.work / "tiny"))
    page = user.open("/finetune/chat")
    sent = []
    page.on("request", lambda x: "/v1/chat" in x.url and sent.append(json.loads(x.post_data)))
    low = Path(site.job(runs[0])["output_path"])
    for side, value in (("Left", low.name), ("Right", "<img src=x")):
        options = page.get_by_label(side, exact=True).locator("option")
        found = options.filter(has_text=value).first.get_attribute("value")
        page.get_by_label(side, exact=True).select_option(found)
    page.get_by_role("button", name="System prompt and sampling").click()
    page.get_by_label("System prompt").fill("Count.")
    page.get_by_label("Max tokens").fill("4")
    page.get_by_label("Temperature").fill("warm")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("one two")
    prompt.press("Enter")
    expect(page.locator(".wrong", has_text="Enter a number")).to_be_in_viewport()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top k").fill("3")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text(re.compile("tokens?, .* tokens/s"))).to_have_count(2, timeout=LONG)
    expect(page.locator(".who")).to_have_text([low.name, "<img src=x onerror=boom()>"])
    assert sent[0]["adapter"] == low.name and len(sent) == 2
    for own in sent:
        assert (own["temperature"], own["top_k"], own["max_tokens"]) == (0.5, 3, 4)
        roles = [(turn["role"], turn["content"]) for turn in own["messages"]]
        assert roles == [("system", "Count."), ("user", "one two")]
    said = page.locator(".said").all_inner_texts()
    user.shot(page, "chat-two")
    page.reload()
    expect(page.locator(".said")).to_have_text(said)
    expect(page.get_by_label("Left", exact=True)).to_have_value(str(low))
    expect(page.get_by_label("Top k")).to_have_value("3")
    prompt.fill("three")
    prompt.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)
    until(lambda: len(sent) == 4)
    assert [turn["role"] for turn in sent[2]["messages"]] == [
        "system",
        *["user", "assistant"],
        "user",
    ]
    page.get_by_role("button", name="Clear").click()
    page.reload()
    expect(page.get_by_text("Ask something")).to_be_visible()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["dev.jsonl", "train.jsonl"], ["train.jsonl as train.jsonl", "dev.jsonl as valid.jsonl"]),
        (["a-val.csv", "b.csv.gz"], ["b.csv.gz as train.csv.gz", "a-val.csv as valid.csv"]),
        (["rows.csv", "my_train.csv"], ["my_train.csv as train.csv", "rows.csv as valid.csv"]),
        (["devices.csv", "test.csv"], ["devices.csv as train.csv", "test.csv as valid.csv"]),
        (["valid.jsonl"], ["valid.jsonl as train.jsonl"]),
        (["a.csv", "b.csv"], "The names a.csv and b.csv do not say which file is for validation"),
        (["train.csv", "train.json"], "The names train.csv and train.json do not say"),
        (["train.csv", "dev.csv", "test.csv"], "Choose one file, or one for training and one"),
    ],
)
def test_files_of_rows_are_told_apart_by_their_names(browser, names, expected):
    page = browser.new_page()

    def give(route: Any) -> None:  # serves only the modules
        name = route.request.url.rpartition("/")[2]
        if name:
            route.fulfill(path=FILES / name, content_type="text/javascript")
        else:
            route.fulfill(body="", content_type="text/html")

    page.route("**/*", give)
    page.goto("http://localhost/")
    found = page.evaluate(
        """async (names) => {
          const { splits } = await import("/hub.js");
          try {
            const own = splits(names.map((name) => new File(["a"], name)));
            return own.map(([file, as]) => `${file.name} as ${as}`);
          } catch (error) {
            return error.message;
          }
        }""",
        names,
    )
    page.close()
    assert found[: len(expected)] == expected


def test_data_and_adapters_come_and_go(user, site, runs, tmp_path):
    rows = tmp_path / "my sums.csv"
    rows.write_text("prompt,completion\n" + "".join(f"{i}+1,{i + 1}\n" for i in range(9)))
    page = user.open()
    choose(page, "Model", "tiny")
    page.locator("[type=file]").first.set_input_files(str(rows))
    expect(page.get_by_text("Training rows", exact=True)).to_be_visible(timeout=LONG)
    expect(page.get_by_label("Data set", exact=True)).to_have_value(re.compile("uploaded: my-sums"))
    expect(page.get_by_text("my sums.csv is for training.")).to_be_visible()
    wrong = tmp_path / "notes.txt"
    wrong.write_text("no rows")
    page.locator("[type=file]").first.set_input_files(str(wrong))
    expect(page.locator(".wrong", has_text="called train or valid")).to_be_in_viewport()

    user.open("/finetune/library", page=page)
    sent: list[str] = []
    page.on("request", lambda own: sent.append(own.url) if own.method == "PUT" else None)
    row = page.get_by_role("row").filter(has_text="my-sums")
    with page.expect_download() as found:
        row.get_by_role("link", name="Download my-sums").click()
    with zipfile.ZipFile(found.value.path()) as archive:
        assert archive.read("train.csv") == rows.read_bytes()
    row.get_by_role("button", name="Delete my-sums").click()
    page.get_by_role("button", name="Delete it").click()
    expect(row).to_have_count(0)

    folder = Path(site.job(runs[0])["output_path"])
    own = page.get_by_role("row").filter(has_text=folder.name)
    with page.expect_download() as found:
        own.get_by_role("link", name=f"Download {folder.name}").click()
    with zipfile.ZipFile(found.value.path()) as archive:
        archive.extractall(tmp_path / "taken")
    names = ("adapters.safetensors", "adapter_config.json")
    (tmp_path / "broken").mkdir()
    shutil.copy(tmp_path / "taken" / names[1], tmp_path / "broken")
    (tmp_path / "broken" / names[0]).write_bytes(b"no weights")
    page.locator("[type=file]").last.set_input_files([str(tmp_path / "broken" / x) for x in names])
    expect(page.get_by_role("alert").filter(has_text=names[0])).to_be_visible()
    # The file that had already been uploaded is deleted, too.
    assert not list(site.cache.rglob("adapter-of-tiny"))
    sent.clear()
    page.locator("[type=file]").last.set_input_files([str(tmp_path / "taken" / x) for x in names])
    row = page.get_by_role("row").filter(has_text="adapter-of-tiny")
    expect(row).to_be_visible()
    # The configuration is uploaded before the weights, so a duplicate name is reported early.
    assert [url.rpartition("/")[2] for url in sent] == [*reversed(names)]
    user.shot(page, "library")
    row.get_by_role("button", name="Delete adapter-of-tiny").click()
    page.get_by_role("button", name="Delete it").click()
    expect(row).to_have_count(0)


def test_a_job_that_ends_is_told_on_other_pages(user, site):
    page = user.page()
    page.add_init_script(
        """localStorage.setItem("bell", "on"); globalThis.told = [];
        globalThis.Notification = class { static permission = "granted";
          constructor(title) { told.push(title) } };
        Object.defineProperty(document, "hidden", { get: () => globalThis.away ?? false });"""
    )
    user.open("/finetune/library", page=page)
    expect(page.get_by_role("button", name=re.compile("Notifications are on"))).to_be_visible()
    page.evaluate("globalThis.away = true")  # as if another tab were visible
    folders = {"model_dir": str(site.work / "tiny"), "data_dir": str(site.work / "counting")}
    id = site.api("/api/finetune/submit", **folders, iters=300, max_seq_length=64)["job_id"]
    expect(page.locator(".now")).to_be_visible(timeout=LONG)
    site.api(f"/api/jobs/{id}/cancel", method="POST")
    told = page.get_by_role("link", name="Training cancelled: tiny on counting")
    expect(told).to_be_visible(timeout=LONG)
    assert page.evaluate("told") == ["Training cancelled: tiny on counting"]
    told.click()
    page.wait_for_url(f"**/finetune/job/{id}")


def test_the_keyboard_alone_starts_a_run(user, site, titles):
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
                assert own[1], f"{name} has the focus but does not show it"
                return
        raise AssertionError(f"the Tab key never reaches {name}, only {seen}")

    tab_to("Model")
    keys.press("Enter")
    page.get_by_role("option").first.wait_for()
    keys.type("tiny")
    keys.press("Enter")
    tab_to("Data set")
    keys.type(str(site.work / "counting"))
    tab_to(titles["max_seq_length"])
    keys.type("64")
    tab_to(titles["iters"])
    keys.type("3")
    keys.press("Enter")  # starts the run from any field
    page.wait_for_url(re.compile("/finetune/job/job_"))
    expect(page.get_by_text("Step 3 of 3")).to_be_visible(timeout=LONG)


@pytest.mark.parametrize(
    ("size", "scheme"), ((PHONE, "light"), (PHONE, "dark"), (DESK, "light"), (DESK, "dark"))
)
def test_every_view_fits_and_axe_finds_nothing(user, runs, size, scheme):
    page = user.page(size, scheme)
    for name, path in {
        "setup": "/finetune",
        "job": f"/finetune/job/{runs[0]}",
        "jobs": f"/finetune/jobs?compare={','.join(runs[:2])}",
        "library": "/finetune/library",
        "chat": "/finetune/chat",
        "nothing": "/finetune/job/none",
    }.items():
        user.open(path, page=page)
        page.wait_for_timeout(400)
        assert fits(page), name
        user.shot(page, f"{name}-{size['width']}-{scheme}")
        # Open all sections to check them, too. Their names are removed first, because only one of
        # several sections with the same name can be open.
        page.evaluate(
            """() => document.querySelectorAll("details").forEach((own) => {
            own.removeAttribute("name"); own.open = true; })"""
        )
        assert fits(page), name
        found = Axe().run(page).response["violations"]
        assert not [(x["id"], [own["html"] for own in x["nodes"]]) for x in found], name


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
        user = User(browser, site, None)
        page = user.page()
        page.goto(f"{site.url}/finetune")
        page.get_by_label("Access token of this server").fill(token)
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_text("Put the folder of an MLX model there")).to_be_visible()
        expect(page.get_by_text("No data set found. Upload a file of rows")).to_be_visible()
        page.get_by_role("button", name="Create example rows").click()
        expect(page.get_by_text("Training rows", exact=True)).to_be_visible(timeout=LONG)
        expect(page.get_by_text("No data set found")).to_be_hidden()
        expect(page.get_by_text("Put the folder of an MLX model there")).to_be_visible()
        user.open("/finetune/jobs", page=page)
        expect(page.locator(".page").get_by_role("link", name="New run")).to_be_visible()
        user.open("/finetune/library", page=page)
        expect(page.get_by_text("No adapter yet. Train one, or upload one")).to_be_visible()
        user.open("/finetune/chat", page=page)
        expect(page.get_by_text("No model found")).to_be_visible()
        bearer = {"authorization": f"Bearer {token}"}
        urlopen(Request(f"{site.url}/api/sessions", headers=bearer, method="DELETE")).close()
        page.wait_for_url("**/login")  # pages that are already open are redirected, too
        page.context.close()
