"""What every page has: header, navigation, theme, announcements; and the parts of pages."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from ..jobs.row import Status
from ..service import Service
from . import text

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
THEMES = {"auto": None, "light": False, "dark": True}
THEME_ICONS = {"auto": "brightness_auto", "light": "light_mode", "dark": "dark_mode"}
PAGES = {"/finetune": "New run", "/finetune/jobs": "Jobs", "/finetune/chat": "Chat"}
ICONS: dict[Status, str] = {
    "queued": "schedule",
    "running": "autorenew",
    "done": "check_circle",
    "failed": "error",
    "cancelled": "cancel",
}


def tag(name: str, content: str = "", classes: str = "") -> TextElement:
    """An HTML element with a text, which is escaped."""
    return TextElement(tag=name, text=content).classes(classes)


def button(
    content: str,
    on_click: Callable[..., Any] | None = None,
    kind: str = "",
    icon: str | None = None,
) -> ui.button:
    """kind: primary, danger or none."""
    made = ui.button(content, on_click=on_click, icon=icon, color=None)
    return made.props("no-caps unelevated").classes(f"btn {kind}")


def link(content: str, target: str, classes: str = "") -> ui.link:
    return ui.link(content, target).classes(f"link {classes}")


@contextmanager
def card(title: str, level: str = "h2") -> Iterator[ui.element]:
    """A section with its heading."""
    with ui.element("section").classes("card") as made:
        if title:
            heading = tag(level, title, "heading")
            made.props["aria-labelledby"] = heading.html_id
        yield made


@contextmanager
def facts(classes: str = "") -> Iterator[None]:
    with ui.element("dl").classes(f"facts {classes}"):
        yield


def fact(name: str, value: str) -> TextElement:
    """A name and its value, within facts()."""
    with ui.element("div"):
        tag("dt", name)
        return tag("dd", value)


def badge(status: Status) -> ui.element:
    """A job's status: word, icon and colour say the same."""
    with ui.element("span").classes(f"badge {status}") as made:
        ui.icon(ICONS[status]).props("aria-hidden=true")
        tag("span", status)
    return made


def notice(content: str, kind: str = "") -> ui.element:
    """A sentence in a box; kind: good, warn, bad or none."""
    icons = {"good": "check_circle", "warn": "warning", "bad": "error", "": "info"}
    with ui.element("div").classes(f"notice {kind}") as made:
        ui.icon(icons[kind]).props("aria-hidden=true")
        tag("p", content)
    return made


def empty(content: str) -> None:
    """What to do where there is nothing yet."""
    tag("p", content, "empty")


@contextmanager
def looking(what: str) -> Iterator[None]:
    """Says so while the disk is looked through: the page is there before."""
    said = tag("p", f"Looking for {what} …", "looking empty")
    yield
    if not said.is_deleted:
        said.delete()


class Announcer:
    """Says to who cannot see the page what has changed."""

    def __init__(self) -> None:
        self.label = ui.label().classes("sr-only").props("role=status aria-live=polite")

    def __call__(self, content: str) -> None:
        self.label.set_text(content)


@contextmanager
def frame(service: Service, title: str, here: str) -> Iterator[Announcer]:
    """The page around what is made within it."""
    ui.page_title(f"{title} – mlx_segtrain")
    ui.add_head_html(f"<style>{STYLE}</style>")
    with ui.context.client.layout, ui.element("header").classes("top") as header:
        ui.link("Skip to the page", "#content").classes("skip")
        ui.link("mlx_segtrain", "/finetune").classes("brand")
        with ui.element("nav").props('aria-label="Pages"'):
            for path, name in PAGES.items():
                to = ui.link(name, path)
                if path == here:
                    to.props("aria-current=page")
        _running(service)
        _theme()
        if service.settings.token is not None:
            with ui.element("form").props("method=post action=/logout"):
                button("", None, "icon-only", "logout").props(
                    'type=submit aria-label="Log out" title="Log out"'
                )
    header.move(target_index=0)  # it is no part of what is the main part by the library
    with ui.element("div").classes("page").props("id=content tabindex=-1"):
        announce = Announcer()
        yield announce


def _running(service: Service) -> None:
    """The job that computes now, on every page."""
    with ui.link(target="/finetune/jobs").classes("now") as to:
        ui.element("span").classes("dot").props("aria-hidden=true")
        words = tag("span")

    def look() -> None:
        rows = service.jobs.running()
        queued = len(service.jobs.live) - len(rows)
        to.set_visibility(bool(rows))
        if rows:
            more = f", {queued} waiting" if queued > 0 else ""
            job = rows[0].job_kind.title
            words.set_text(f"{job} {text.percent(rows[0].progress)}{more}")
            to.props["href"] = f"/finetune/job/{rows[0].id}"

    look()
    ui.timer(2, look)


def _theme() -> None:
    """Goes round system, light, dark; a cookie keeps it, so that pages come in it."""
    names = list(THEMES)
    name = ui.context.client.request.cookies.get("theme", "auto")
    name = name if name in THEMES else "auto"
    dark = ui.dark_mode(THEMES[name])

    def show() -> None:
        said = {"auto": "as the system", "light": "light", "dark": "dark"}[name]
        told = f"Theme: {said}"
        made.props.update({"icon": THEME_ICONS[name], "aria-label": told, "title": told})

    def turn() -> None:
        nonlocal name
        name = names[(names.index(name) + 1) % len(names)]
        dark.set_value(THEMES[name])
        cookie = f"theme={name}; path=/; max-age=31536000; samesite=strict"
        ui.run_javascript(f"document.cookie = {json.dumps(cookie)}")
        show()

    made = button("", turn, "icon-only")
    show()


async def confirm(question: str, detail: str, action: str) -> bool:
    """Asks before what cannot be undone."""
    with ui.dialog() as dialog, ui.element("div").classes("card dialog"):
        heading = tag("h2", question, "heading")
        dialog.props["aria-labelledby"] = heading.html_id
        tag("p", detail)
        with ui.element("div").classes("actions end"):
            button("Keep it", lambda: dialog.submit(False)).props("autofocus")
            button(action, lambda: dialog.submit(True), "danger")
    answer = bool(await dialog)
    dialog.delete()
    return answer
