"""The page /finetune: set a run up, watch it, use what it made. It calls the service, as /api does.

setup.py   /finetune: model, data, parameters, plan      fields.py  the form, from the schema
job.py     /finetune/job/ID: a job, live                 runs.py    what its events come to
jobs.py    /finetune/jobs: all jobs; comparison          after.py   evaluate, fold, export, merge
chat.py    /finetune/chat: base and adapter              frame.py   header, theme, parts of pages
data.py    what a data set trains, with tokens.js        charts.py, logview.py, text.py  of job.py
"""

from fastapi import FastAPI
from nicegui import Client, ui
from nicegui.language import Language

from ..service import Service
from . import chat, job, jobs, setup
from .runs import Runs

#: Pages that are open, and of these such as no browser has connected to yet.
MOST_PAGES, MOST_UNOPENED = 200, 50
#: A loss that falls.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="7" fill="#1d5fc4"/>
<path d="M6 8c4 12 8 15 20 16" fill="none" stroke="#fff" stroke-width="3.5"/></svg>"""


def make_room() -> bool:
    """Whether another page may be made: each takes 3 MB as long as it is open, and of those that no
    browser has opened yet the oldest go."""
    waiting = [own for own in Client.instances.values() if not own.has_socket_connection]
    waiting.sort(key=lambda own: own.created)
    for own in waiting[: max(0, len(waiting) - MOST_UNOPENED)]:
        own.delete()
    return len(Client.instances) < MOST_PAGES


def mount(app: FastAPI, service: Service) -> None:
    """Adds the pages behind all routes that the app has."""
    runs = Runs(service)

    @ui.page("/finetune")
    async def _setup(origin: str | None = None) -> None:
        await setup.setup(service, origin)

    @ui.page("/finetune/jobs")
    def _jobs(compare: str = "") -> None:
        jobs.jobs(service, runs, compare)

    @ui.page("/finetune/job/{id}")
    async def _job(id: str) -> None:
        await job.job(service, runs, id)

    @ui.page("/finetune/chat")
    async def _chat(model: str | None = None, adapter: str | None = None) -> None:
        await chat.chat(service, model, adapter)

    language: Language = "en-US"
    ui.run_with(
        app,
        mount_path="/",
        title="mlx_segtrain",
        favicon=ICON,
        dark=None,
        language=language,
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=10,
        binding_refresh_interval=None,
    )
