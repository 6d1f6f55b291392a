"""The documentation site builds without warnings, and its pages load nothing from other hosts."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lib.pages import PAGES, ROOT

pytestmark = pytest.mark.acceptance

#: HTML attributes whose URLs a browser fetches.
FETCHED = {"src", "srcset", "poster", "data", "action"}


class Resources(HTMLParser):
    """Collects the URLs that a browser loads for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {*FETCHED, "href"} if tag == "link" else FETCHED
        self.found += [value for name, value in attrs if name in names and value]


def resources(html: str) -> list[str]:
    parser = Resources()
    parser.feed(html)
    return parser.found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)],
        **{"cwd": ROOT, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        foreign = [own for own in resources(page.read_text("utf-8")) if re.match(r"(\w+:)?//", own)]
        assert not foreign, f"{page.relative_to(site)}: {foreign}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", text), sheet
    assert resources('<script src="//x/y.js"></script><img src="a">') == ["//x/y.js", "a"]


def test_every_page_is_in_the_navigation_and_every_command_in_the_reference(site: Path) -> None:
    from mlx_segtrain.commands.main import parsers

    home = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f'href="{page.stem}.html"' in home, page.stem
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for name in parsers()[1]:
        assert f'id="mlx-segtrain-{name}"' in commands, name
    routes = (site / "reference" / "http.html").read_text(encoding="utf-8")
    assert "POST /api/finetune/submit" in routes and "POST /v1/chat/completions" in routes
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert "segmented_value_and_grad" in python and "InputError" in python


def test_a_block_shows_what_it_needs(site: Path) -> None:
    assert "needs an NVIDIA GPU" in (site / "quickstart.html").read_text(encoding="utf-8")
