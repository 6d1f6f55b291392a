"""/finetune/chat: the same prompt to the base and to an adapter, side by side."""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nicegui import background_tasks, ui

from ...errors import InputError, RunError
from ..service import Service
from . import text
from .fields import Labelled, id_of
from .frame import Announcer, button, card, empty, frame, looking, notice, tag
from .setup import MANY, described

logger = logging.getLogger("mlx_segtrain.serving")

#: Seconds between two updates of an answer.
TICK_S = 0.08
Message = dict[str, str]


async def chat(service: Service, model: str | None, adapter: str | None) -> None:
    with frame(service, "Chat", "/finetune/chat") as announce:
        tag("h1", "Chat")
        await ChatView(service, announce).show(model, adapter)


@dataclass
class Side:
    """A column: who answers, and what was said so far."""

    name: str
    messages: list[Message] = field(default_factory=list)


class ChatView:
    def __init__(self, service: Service, announce: Announcer):
        self.service, self.announce = service, announce
        self.client = ui.context.client
        self.sides = [Side("Base"), Side("With adapter")]
        self.task: asyncio.Task[None] | None = None
        self.shown: tuple[Any, ...] = ()  # what is said of the model

    async def show(self, model: str | None, adapter: str | None) -> None:
        with looking("models"):
            models = await self.service.models()
        if self.client.is_deleted:
            return
        self.models = {own.path: own for own in models}
        self.client.on_delete(self._stop)
        with card("Who answers"):
            with ui.element("div").classes("fields chat"):
                field = Labelled("Model", "", "", "")
                with field.slot:
                    options = {own.path: described(own) for own in models}
                    self.model = ui.select(options, with_input=len(options) > MANY)
                field.holds(self.model)
                field = Labelled("Adapter", "Of those on disk that fit the model.", "", "")
                with field.slot:
                    self.adapter = ui.select({}, clearable=True)
                field.holds(self.adapter)
                self.most = _number("Most tokens", "128")
                self.temperature = _number("Temperature", "0", "0 takes the likeliest token.")
            self.load_line = ui.element("div").classes("actions")
            self.state = ui.element("div").props("aria-live=polite")
        with card("Conversation"):
            self.turns = ui.element("div").classes("stack")
            with self.turns:
                self.hint = tag(
                    "p", "Ask something: the base and the adapter answer side by side.", "empty"
                )
            with ui.element("form").classes("stack").props("novalidate") as form:
                form.on("submit.prevent", self._send)
                field = Labelled("Prompt", "Enter sends, Shift+Enter begins a new line.", "", "")
                with field.slot:
                    self.prompt = ui.textarea().props("autogrow rows=2")
                field.holds(self.prompt)
                self.prompt.on("keydown.enter.exact.prevent", self._send)
                self.problem = ui.element("div").props("role=alert")
                with ui.element("div").classes("actions"):
                    self.send = button("Send", None, "primary", "send").props("type=submit")
                    self.stop = button("Stop", self._stop, "danger", "stop")
                    button("Clear", self._clear)
        self.stop.set_visibility(False)
        base = self.service.base
        first = model or (str(base.path) if base else None)
        if first in self.models:
            self.model.set_value(first)
        self.model.on_value_change(self._model_changed)
        await self._model_changed()
        if adapter in self.adapter.options:
            self.adapter.set_value(adapter)
        ui.timer(2, self._refresh)

    # Model and adapter

    @property
    def loaded(self) -> bool:
        base = self.service.base
        return base is not None and str(base.path) == self.model.value

    async def _model_changed(self) -> None:
        options: dict[str, str] = {}
        if self.model.value:
            found = await self.service.adapters(Path(self.model.value))
            options = {str(own.path): text.tail(str(own.path), 2) for own in found}
        if self.client.is_deleted:
            return
        self.adapter.set_options(options, value=next(iter(options), None))
        self._clear()
        self.shown = ()
        self._refresh()

    def _refresh(self) -> None:
        waits = self.service.waits
        state = (self.model.value, self.loaded, waits)
        if state == self.shown:
            return
        self.shown = state
        self.load_line.clear()
        self.state.clear()
        with self.load_line:
            if self.model.value and not self.loaded:
                button("Load this model", self._load, "primary", "memory")
        with self.state:
            if not self.models:
                empty("No model found: put the folder of an MLX model below a root of the server.")
            elif not self.model.value:
                empty("Choose a model to chat with.")
            elif waits:
                notice("A job computes now: the chat waits until it has ended.", "warn")
            elif not self.loaded:
                base = self.service.base
                now = f"{base.id} is loaded, not this model." if base else "No model is loaded."
                notice(f"{now} To load it takes a moment; answers that are being given end first.")
        self.send.set_enabled(self.loaded and not waits)

    async def _load(self) -> None:
        self.load_line.clear()
        with self.load_line:
            ui.spinner(size="20px").props("aria-hidden=true")
            tag("span", f"Loading {text.tail(self.model.value)} …", "muted")
        self.announce("Loading the model.")
        problem = ""
        try:
            await self.service.serve(self.model.value)
        except (InputError, RunError) as error:
            problem = str(error)
        if self.client.is_deleted:
            return
        self.shown = ()
        self._refresh()
        if problem:
            with self.state:
                notice(problem, "bad")
        self.announce(problem or "The model is loaded.")

    # Conversation

    def _clear(self) -> None:
        self._stop()
        for side in self.sides:
            side.messages.clear()
        self.turns.clear()
        with self.turns:
            self.hint = tag(
                "p", "Ask something: the base and the adapter answer side by side.", "empty"
            )

    def _stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def _send(self) -> None:
        asked = (self.prompt.value or "").strip()
        self.problem.clear()
        if not asked or self.task is not None or not self.send.enabled:
            return
        self.prompt.set_value("")
        self.task = background_tasks.create(self._answer(asked), name="chat")

    async def _answer(self, asked: str) -> None:
        self.send.set_enabled(False)
        self.stop.set_visibility(True)
        try:
            how = {
                "max_tokens": int(self.most.value or 128),
                "temperature": float(self.temperature.value or 0),
            }
            selected = [await self.service.select(None)]
            if path := self.adapter.value:
                selected.append(await self.service.select(path))
                self.sides[1].name = f"With {selected[1].id}"
            self.hint.set_visibility(False)
            with self.turns, ui.element("div").classes("turn"):
                tag("div", asked, "asked")
                columns = [_column(side.name) for side in self.sides[: len(selected)]]
            seen = "scrollIntoView({block: 'nearest'})"
            self.client.run_javascript(f"document.getElementById('{id_of(self.prompt)}').{seen}")
            self.announce("The models answer.")
            pairs = zip(self.sides, selected, columns, strict=False)
            await asyncio.gather(*(self._one(asked, how, *pair) for pair in pairs))
            self.announce("The answers are there.")
        except ValueError as error:
            said = str(error) if isinstance(error, InputError) else "a setting is no number."
            self._complain(said)
        except RunError as error:
            self._complain(str(error))
        except Exception:
            logger.exception("the chat failed")
            self._complain("the server failed at this: its log says why.")
        finally:
            self.task = None
            if not self.client.is_deleted:
                self.stop.set_visibility(False)
                self.shown = ()
                self._refresh()

    async def _one(
        self, asked: str, how: dict[str, Any], side: Side, selected: Any, column: "Column"
    ) -> None:
        side.messages.append({"role": "user", "content": asked})
        said, loop = "", asyncio.get_running_loop()
        began = shown = loop.time()
        made = 0
        pieces = None
        try:
            pieces = await self.service.chat(side.messages, selected, **how)
            async for piece in pieces:
                said, made = said + piece.text, piece.tokens
                if loop.time() - shown > TICK_S:
                    shown = loop.time()
                    column.said.set_text(said)
            took = max(loop.time() - began, 1e-6)
            column.count.set_text(f"{text.counted(made, 'token')}, {made / took:.1f} tokens/s")
        except asyncio.CancelledError:
            if not self.client.is_deleted:
                column.count.set_text(f"stopped after {text.counted(made, 'token')}")
            raise
        finally:
            if pieces is not None:
                await pieces.aclose()
            side.messages.append({"role": "assistant", "content": said})
            if not self.client.is_deleted:
                column.said.set_text(said)

    def _complain(self, message: str) -> None:
        if not self.client.is_deleted:
            with self.problem:
                notice(message, "bad")


@dataclass(frozen=True)
class Column:
    said: Any
    count: Any


def _column(name: str) -> Column:
    with ui.element("div").classes("answer"):
        tag("div", name, "who wrap")
        said = tag("div", "…", "said")
        return Column(said, tag("div", "", "small muted"))


def _number(label: str, default: str, about: str = "") -> ui.input:
    field = Labelled(label, about, "", "")
    with field.slot:
        made = ui.input(placeholder=default).props("inputmode=decimal autocomplete=off")
    field.holds(made)
    return made
