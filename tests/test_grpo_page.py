"""Tests a grpo run's completions by step: in the file, over HTTP, and on the page."""

import json

import httpx
import pytest

from lib.browsing import BROWSER, PHONE, User, expect, fits, serving
from lib.folders import write_llama
from mlx_segtrain.training.completions import read_step


def write(path, steps, size):
    with open(path, "w") as file:
        for step in steps:
            for i in range(3):
                file.write(json.dumps({"step": step, "completion": i, "text": "x" * size}) + "\n")


@pytest.mark.parametrize("size", [3, 40_000])
def test_a_step_is_found_in_a_long_file(tmp_path, size):
    path = tmp_path / "completions.jsonl"
    write(path, range(1, 30), size)
    for step in range(1, 30):
        last, found = read_step(path, step, 9)
        assert last == 29 and [(x["step"], x["completion"]) for x in found] == [
            (step, i) for i in range(3)
        ]
    assert [x["completion"] for x in read_step(path, None, 2)[1]] == [0, 1]
    assert read_step(path, 30, 9) == (29, [])
    with open(path, "a") as file:  # the run is still writing a line
        file.write('{"step": 30, "text": "')
    assert read_step(path, None, 9)[0] == 29
    path.write_text("")
    assert read_step(path, None, 9) == (0, [])


@pytest.mark.acceptance
@pytest.mark.skipif(BROWSER is None, reason="no browser is on the PATH")
def test_the_page_shows_what_was_generated(tmp_path):
    from playwright.sync_api import sync_playwright

    work = tmp_path / "work"
    write_llama(work / "tiny", bits=4)
    (work / "prompts").mkdir()
    rows = "".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(4))
    for name in ("train", "valid"):
        (work / "prompts" / f"{name}.jsonl").write_text(rows)
    with serving(work, tmp_path / "cache") as site:
        how = {"data_dir": str(work / "prompts"), "method": "grpo", "rewards": ["regex:[aeiou]"]}
        how |= {"batch_size": 2, "group_size": 3, "max_completion_tokens": 8, "iters": 3}
        how |= {"model_dir": str(work / "tiny"), "max_seq_length": 64, "steps_per_report": 1}
        id = httpx.post(f"{site.url}/api/finetune/submit", json=how).json()["job_id"]
        assert site.wait(id)["status"] == "done"
        found = site.api(f"/api/jobs/{id}/completions")
        (log,) = site.cache.rglob("completions.jsonl")
        lines = log.read_text().splitlines()
        assert (found["last"], found["step"]) == (3, 3)
        assert found["completions"] == [own for x in lines if (own := json.loads(x))["step"] == 3]
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            user = User(browser, site, None)
            page = user.open(f"/finetune/job/{id}")
            card = page.get_by_role("region", name="Completions")
            expect(card.get_by_role("heading", level=3)).to_have_count(2)
            expect(card.get_by_text("of 3", exact=True)).to_be_visible()
            best = card.locator("details").first
            rewards = sorted(own["reward"] for own in found["completions"][:3])
            expect(best).to_contain_text(f"reward {rewards[-1]:.3f}")
            best.locator("summary").click()
            expect(best.get_by_text("advantage", exact=True)).to_be_visible()
            card.get_by_role("button", name="Previous step").click()
            expect(card.get_by_label("Step")).to_have_value("2")
            names = ("Length", "Clipped", "Kl", "Truncated")
            for name in names:
                expect(page.get_by_role("heading", name=name, exact=False).first).to_be_visible()
            phone = user.open(f"/finetune/job/{id}", viewport=PHONE)
            expect(phone.get_by_text("of 3", exact=True)).to_be_visible()
            assert fits(phone)
            browser.close()
        assert not user.faults
