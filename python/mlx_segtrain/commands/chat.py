"""The command chat: runs a conversation in the terminal and can switch between adapters or compare
them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_segtrain.commands import generate
from mlx_segtrain.commands.flags import Parser, add_flags
from mlx_segtrain.commands.generate import config_for, prompting_for
from mlx_segtrain.errors import InputError
from mlx_segtrain.fields import place

#: The name of the model without an adapter.
BASE = "base"
HELP = """\
/adapter NAME   switch to the adapter with this name or number; base means no adapter
/compare        answer each message without an adapter and with each adapter, until you
                enter /compare again
/retry          answer the last message again
/system TEXT    set the system message, or remove it if TEXT is omitted; starts a new conversation
/clear          start a new conversation
/help           show this list
/exit           end the chat, like Ctrl-D; Ctrl-C stops an answer"""


def add_command(command: Callable[..., Parser]) -> None:
    """Adds the command. `command(name, run, text)` creates its parser."""
    added = command("chat", _chat, "chat in the terminal, and compare adapters")
    add_flags(added, ("model_dir",), required=True)
    added.add_argument(
        "--adapter",
        "--adapter-path",
        dest="adapters",
        type=place,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="adapters to chat with: directories, or names on the Hugging Face hub. The first "
        "adapter answers until you switch to another.",
    )
    add_flags(added, ("prompt_format", "chat_template_kwargs"))
    generate.add_sampling(added)


@dataclass
class Voice:
    """The model with one adapter, or without an adapter. `ids` are the tokens in `cache`."""

    name: str
    adapter: Any
    prompting: Any
    ids: list[int] = field(default_factory=list)
    cache: Any = None


class Chat:
    """A conversation with one model, in which several voices (the model with or without an adapter)
    can respond."""

    def __init__(self, model: Any, tokenizer: Any, voices: list[Voice], args: Any) -> None:
        from mlx_segtrain.models import chain_of

        self.model, self.tokenizer, self.chain = model, tokenizer, chain_of(model)
        self.voices, self.voice = voices, voices[min(1, len(voices) - 1)]
        self.system, self.options = args.system, generate.options_of(args)
        self.turns: list[dict[str, str]] = []
        self.compares = False
        self._modules: list[Any] = []
        self._mounted: Voice | None = None

    def answers(self, say: Callable[[str], None]) -> None:
        """Prints the response of the current voice to the last turn or, if voices are being
        compared, the responses of all voices."""
        for voice in self.voices if self.compares else [self.voice]:
            if self.compares:
                say(f"\n[{voice.name}] ")
            text, begin, n = "", time.perf_counter(), 0
            try:
                for part in self.stream(voice):
                    text, n = text + part, n + 1
                    say(part)
            except KeyboardInterrupt:
                say(" …")
            seconds = time.perf_counter() - begin
            say("\n")
            if sys.stdout.isatty():
                say(f"\x1b[2m({n} tokens, {n / seconds:.1f} tokens/s)\x1b[0m\n")
            if voice is self.voice:
                kept = text
        self.turns.append({"role": "assistant", "content": kept})

    def stream(self, voice: Voice) -> Iterator[str]:
        """Yields the parts of a response. Reuses the voice's cache for the common prefix of the
        voice's previous prompt and the new prompt."""
        from mlx_lm.models.cache import (
            can_trim_prompt_cache,
            make_prompt_cache,
            trim_prompt_cache,
        )

        self._mount(voice)
        with generate.rendering():
            ids = self._ids(voice)
        # At least one token must be processed, to compute the logits of the first response token.
        same = generate.shared(voice.ids, ids[:-1])
        surplus = len(voice.ids) - same
        if voice.cache is None or (surplus and not can_trim_prompt_cache(voice.cache)):
            voice.cache, same = make_prompt_cache(self.model), 0
        elif surplus:
            trim_prompt_cache(voice.cache, surplus)
        cache, voice.cache, seen = voice.cache, None, list(ids)  # an interruption drops the cache
        parts = generate.stream(
            self.model, self.tokenizer, ids, self.options, same, prompt_cache=cache
        )
        for part in parts:
            seen.append(part.token)
            yield part.text
        held = getattr(cache[0], "offset", None)  # number of tokens in the cache
        if held is not None and held <= len(seen):
            voice.cache, voice.ids = cache, seen[:held]

    def _ids(self, voice: Voice) -> list[int]:
        """Returns the tokens of the conversation. If there is no chat template, returns only the
        tokens of its last message."""
        prompting = voice.prompting
        if prompting.is_raw(self.tokenizer):
            return prompting.ids(self.tokenizer, self.turns[-1]["content"], self.system)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return prompting.chat_ids(self.tokenizer, [*system, *self.turns])

    def _mount(self, voice: Voice) -> None:
        from mlx_segtrain.models.adapting import attach

        if self._mounted is voice:
            return
        for module in self._modules:
            module.clear()
        self._modules = attach(self.model, self.chain, voice.adapter)
        self.model.eval()
        self._mounted = voice

    def command(self, line: str) -> str | None:
        """Runs a command (a line that begins with a slash). Returns the text to show, or None to
        exit."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit", "q"):
            return None
        if name == "adapter":
            return self._switch(rest)
        if name == "compare":
            if len(self.voices) == 1:
                return "there is no adapter to compare with: start chat with --adapter DIR"
            self.compares = not self.compares
            names = ", ".join(voice.name for voice in self.voices)
            return f"answering with {names if self.compares else self.voice.name}"
        if name in ("clear", "system"):
            self.turns = []
            if name == "system":
                self.system = rest or None
            return "started a new conversation"
        if name == "help":
            return HELP
        return f"unknown command /{name}: /help lists the commands"

    def _switch(self, name: str) -> str:
        names = [voice.name for voice in self.voices]
        if name.isdecimal() and int(name) < len(names):
            self.voice = self.voices[int(name)]
        elif name in names:
            self.voice = self.voices[names.index(name)]
        else:
            listed = ", ".join(f"{i} {own}" for i, own in enumerate(names))
            problem = f"there is no adapter {name}; " if name else ""
            return f"{problem}answering with {self.voice.name}; choose one of: {listed}"
        return f"answering with {self.voice.name}"


def _chat(args: argparse.Namespace) -> int:
    config = config_for(args)
    from mlx_segtrain import hub
    from mlx_segtrain.adapters import read_adapter
    from mlx_segtrain.commands.terminal import waiting
    from mlx_segtrain.models import chain_of, load_base

    with waiting() as show:
        paths = [hub.adapter(path, show) for path in args.adapters]
        model, _, tokenizer = load_base(hub.model(config.model_dir, show))
    chain = chain_of(model)
    voices = [Voice(BASE, None, prompting_for(None, args, config))]
    for name, path in zip(_names(paths), paths, strict=True):
        voices.append(Voice(name, read_adapter(path, chain), prompting_for(path, args, config)))
    chat = Chat(model, tokenizer, voices, args)
    if args.system is not None and chat.voice.prompting.is_raw(tokenizer):
        chat.voice.prompting.ids(tokenizer, "", args.system)  # raises InputError
    if not args.quiet:
        print(
            f"{hub.title(config.model_dir)}, answering with {chat.voice.name}; /help lists commands"
        )
    return converse(chat)


def _names(paths: list[Path]) -> list[str]:
    """Returns the last part of each path, or the full paths if the last parts are not unique."""
    ends = [path.name or str(path) for path in paths]
    return ends if len({*ends, BASE}) == len(ends) + 1 else [os.fspath(path) for path in paths]


def converse(chat: Chat) -> int:
    """Handles messages and commands until the input ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)

    def say(text: str) -> None:
        print(text, end="", flush=True)

    while True:
        try:
            line = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            say("\n" if terminal else "")
            return 0
        if line == "/retry":
            last = [i for i, turn in enumerate(chat.turns) if turn["role"] == "user"][-1:]
            if not last:
                say("there is no message to answer yet\n")
                continue
            chat.turns = chat.turns[: last[0] + 1]
        elif line.startswith("/"):
            answer = chat.command(line)
            if answer is None:
                return 0
            say(f"{answer}\n")
            continue
        elif line:
            chat.turns.append({"role": "user", "content": line})
        else:
            continue
        try:
            chat.answers(say)
        except InputError as error:  # for example, the template accepts no system message
            say(f"{error}\n")
            chat.turns.pop()
