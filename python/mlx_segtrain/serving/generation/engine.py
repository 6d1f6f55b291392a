"""One base, its adapters, and the thread on which they generate in turn.

Streams of MLX belong to a thread, so all that makes arrays runs on that one. It goes round the
sequences, one token each, and puts the small arrays of an adapter into the base's linears where the
next sequence wants others; the base stays as it is. A sequence has its own cache, random key and
counts, so that what it gives does not depend on what runs beside it.
"""

import asyncio
import ctypes
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from ... import lora
from ...errors import InputError, RunError, is_out_of_memory
from ...training.policy import wire
from ..confined.parent import Confined
from ..pools import Busy, Pool
from .decoding import CONTEXT, Options, Text, processors, sampler
from .mounting import Base, Linears, Mounted, Selected, check_id, read_base, read_mounted
from .pieces import Generation, Outbox, Piece

logger = logging.getLogger("mlx_segtrain.serving")

#: Sequences that generate at once, and that wait for it.
MOST_ACTIVE, MOST_WAITING = 16, 256
#: Seconds for which a sequence generates while others wait; then it waits, with its cache, of which
#: there are so many more at most. Seconds after which one that has not begun is told to come back.
TURN_S, MOST_PAUSED, LONGEST_WAIT_S = 10.0, 16, 120.0
#: Seconds for which a model that is to be loaded waits for the answers that are being given, and
#: for which the next is refused after one that waited in vain: others are not served meanwhile.
SWAP_S, SWAP_REST_S = 10.0, 30.0
#: Tokens of a prompt between two looks at the other sequences: a fraction of a second's work.
PREFILL, PREFILL_GPU = 256, 2048
#: Adapters that are mounted at once, and the bytes of all of them.
MOST_MOUNTED, MOST_MOUNTED_BYTES = 256, 8 << 30
#: Prompts kept.
MOST_PROMPTS = 32

#: Tokenizers that are tried before their model is loaded.
_LOADING = Pool("models", 1, 8)

T = TypeVar("T")


class NoMemory(RunError):
    """A request that the device's memory did not do for; others go on."""

    status, code = 503, "no_memory"


class Ended(RunError):
    """The engine's thread is no more; the process has to be started anew."""

    status, code = 503, "ended"


@dataclass(eq=False)
class _Sequence:
    """A request on the engine's thread; its cache has `done` tokens of the prompt, then `made`."""

    prompt: list[int]
    selected: Selected
    options: Options
    outbox: Outbox = field(default_factory=Outbox)
    number: int = field(default_factory=count().__next__)
    made: list[int] = field(default_factory=list)
    cached: int = 0
    done: int = 0
    cache: list[Any] | None = None
    steps: Generator[None, None, None] | None = None
    since: float = field(default_factory=time.monotonic)  #: it waits, or generates

    def close(self) -> None:
        """On the engine's thread: a stream's context ends where it began."""
        if self.steps is not None:
            self.steps.close()

    @property
    def most(self) -> int:
        """Tokens that the answer may have, within the positions that the model knows."""
        limit = self.selected.base.max_length
        room = self.options.max_tokens if limit is None else max(1, limit - len(self.prompt))
        return min(self.options.max_tokens, room)


@dataclass(eq=False)
class _Command:
    run: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    alone: bool = False  #: waits until no sequence is left, for a while
    since: float = field(default_factory=time.monotonic)


class Engine:
    """Generates with one base and its adapters; `cache_bytes` bound the prompts that are kept."""

    def __init__(self, *, cache_bytes: int = 1 << 30):
        self.base: Base | None = None
        self.adapters: dict[str, Mounted] = {}  # replaced, never changed: others read it
        self.default: str | None = None  #: what requests get that name no adapter
        self._cache_bytes = cache_bytes
        self._wake = threading.Condition()
        self._commands: deque[_Command] = deque()
        self._waiting: deque[_Sequence] = deque()
        self._active: list[_Sequence] = []
        self._next_swap = 0.0
        self._stopped, self._ended = False, threading.Event()
        self.fault: str | None = None  #: why nothing can be generated any more
        # Of the engine's thread alone:
        self._prompts: Any = None
        self._linears = Linears()
        self._device = mx.default_device()
        self._prefill = PREFILL_GPU if self._device.type == mx.DeviceType.gpu else PREFILL
        threading.Thread(target=self._work, name="mlx-segtrain engine", daemon=True).start()

    # What an event loop calls

    async def load(self, model_dir: Path) -> Base:
        """Replaces the base by another one, once nothing generates.

        Adapters and prompts go with the old one. InputError if the new one cannot be read: the old
        one stays.
        """
        self._check_runs()
        path = Path(model_dir).expanduser().resolve()
        confined = Confined(path)
        try:
            await _LOADING.run(confined.start)
            return await self.call(lambda: self._load(path, confined), alone=True)
        except BaseException:
            confined.close()
            raise

    async def mount(self, id: str, path: Path) -> Mounted:
        """Reads an adapter folder for this base; one that is mounted under this id stays.

        InputError if the id or the folder cannot be used: then nothing has changed.
        """
        check_id(id)
        return await self.call(lambda: self._mount(id, Path(path)))

    async def unmount(self, id: str) -> int:
        """How many linears had an update; InputError if there is no such adapter.

        Requests that run on it end on it. If it was the default, the base is.
        """
        return await self.call(lambda: self._unmount(id))

    def select(self, adapter: str | None) -> Selected:
        """What a request names: "a", a stack "a+b" or "a,b", "none" or "" for the base alone, None
        for the default. InputError if one is not mounted, or cannot be in a stack."""
        if self.base is None:
            raise InputError("no model is loaded: start the server with one.")
        text = ((self.default or "") if adapter is None else adapter).strip()
        if text.lower() in ("", "none"):
            return Selected(self.base)
        mounted = self.adapters
        ids = [part.strip() for part in text.split("+" if "+" in text else ",")]
        for i, id in enumerate(ids):
            if id not in mounted:
                names = ", ".join(mounted) or "none is"
                raise InputError(f"adapter {id[:100]!r} is not mounted (mounted: {names}).")
            if id in ids[:i]:
                raise InputError(f"adapter {id!r} is named twice in {text[:200]!r}: name it once.")
            kind = mounted[id].adapter.kind
            if len(ids) > 1 and kind is not lora.LORA:
                raise InputError(
                    f"adapter {id!r} is a {kind.name} adapter, which goes into no stack."
                )
        return Selected(self.base, tuple(mounted[id] for id in ids))

    def generate(self, prompt: list[int], selected: Selected, options: Options) -> Generation:
        """The answer to a prompt, piece by piece; to be called in a running event loop.

        InputError if the prompt is empty, too long, or of other tokens; Busy if too many wait.
        """
        base = selected.base
        base.check(prompt, options.logit_bias)
        sequence = _Sequence(prompt, selected, options)
        with self._wake:
            self._drop_closed()
            self._check_runs()
            if base is not self.base or any(command.alone for command in self._commands):
                raise Busy("the model is being replaced: try again in a moment.")
            if len(self._waiting) >= MOST_WAITING:
                raise Busy(f"{MOST_WAITING} requests wait already: try again in a moment.")
            self._waiting.append(sequence)
            self._wake.notify()
        return Generation(sequence.outbox)

    async def tidy(self) -> None:
        """Gives memory back to the system that requests have left, unless something generates."""
        if not self._active and not self._stopped:
            await self.call(_free)

    def close(self) -> None:
        """Ends what runs and frees the model; the thread rests until the process ends."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._ended.wait()

    async def call(self, run: Callable[[], T], *, alone: bool = False) -> T:
        """Runs a function on the engine's thread, between two rounds; `alone`: once nothing
        generates, or Busy."""
        command = _Command(run, alone=alone)
        with self._wake:
            self._check_runs()
            if alone and time.monotonic() < self._next_swap:
                raise Busy("the answers that are being given take long: try again in a minute.")
            self._commands.append(command)
            self._wake.notify()
        return await asyncio.wrap_future(command.future)

    def _check_runs(self) -> None:
        if self.fault is not None:
            raise Ended(self.fault)
        if self._stopped:
            raise Busy("the server ends: try again later.")

    # What runs on the engine's thread

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            logger.critical("the engine has ended", exc_info=error)
            self.fault = f"the engine has ended ({_reason(error)}): restart the server."
            self._stopped = True
            with suppress(Exception):
                self._give_up(Ended(self.fault))
        self._ended.set()
        # What MLX compiled for a thread goes with it, and wants Python for that: a process that
        # ends at this moment would be aborted (ml-explore/mlx#4110). So it goes with the process.
        threading.Event().wait()

    def _serve(self) -> None:
        from mlx_lm.generate import generation_stream

        mx.set_default_device(self._device)
        wire()  # else weights may be paged out between two tokens
        # Generators of generate_step enter this stream and leave it, in any order.
        with mx.stream(generation_stream):
            while not self._stopped:
                try:
                    self._turn()
                # A library in Rust that panics raises what is no Exception; no request may end the
                # thread that all the others need.
                except BaseException as error:
                    self._start_over(error)
            self._give_up(Busy("the server ends: try again later."))
        mx.clear_streams()

    def _turn(self) -> None:
        self._run_commands()
        self._admit()
        self._round()
        with self._wake:
            self._wake.wait_for(
                lambda: self._stopped or self._commands or self._waiting or self._active
            )

    def _start_over(self, error: BaseException) -> None:
        """After an error that belongs to no request: what runs ends, what waits is done next."""
        logger.error("the engine failed, and starts over without what ran", exc_info=error)
        told = RunError(f"the engine failed: {_reason(error)}")
        active, self._active = self._active, []
        for sequence in active:
            sequence.cache = None
            sequence.outbox.put(told)
            with suppress(BaseException):
                sequence.close()
        with self._wake:
            running = [x for x in self._commands if x.future.running()]
            self._commands = deque(x for x in self._commands if x not in running)
        for command in running:
            command.future.set_exception(told)
        self._linears.drop_sums()
        mx.clear_cache()

    def _admit(self) -> None:
        """Whose turn it is: who waits longest, of whom a few have begun already."""
        now = time.monotonic()
        with self._wake:
            self._drop_closed()
            gone = [x for x in self._waiting if x.outbox.closed]
            late = [x for x in self._waiting if not x.steps and now - x.since > LONGEST_WAIT_S]
            if gone or late:
                self._waiting = deque(x for x in self._waiting if x not in (*gone, *late))
            paused = sum(x.steps is not None for x in self._waiting)
            long = [x for x in self._active if now - x.since > TURN_S]
            full = len(self._active) - MOST_ACTIVE + len(self._waiting)
            for sequence in long[: max(0, min(full, MOST_PAUSED - paused))]:
                self._active.remove(sequence)
                sequence.since = now
                self._waiting.append(sequence)
            while self._waiting and len(self._active) < MOST_ACTIVE:
                self._active.append(self._waiting.popleft())
                self._active[-1].since = now
        for sequence in gone:
            self._end(sequence)
        for sequence in late:
            told = f"others were answered for {LONGEST_WAIT_S:.0f} s: try again later."
            sequence.outbox.put(Busy(told))

    def _give_up(self, ended: RunError) -> None:
        """Tells all that still want something, and frees what there is."""
        for sequence in (*self._active, *self._waiting):
            sequence.close()
            sequence.outbox.put(ended)
        for command in self._commands:
            if command.future.set_running_or_notify_cancel():
                command.future.set_exception(ended)
        if self.base is not None:
            self.base.confined.close()
        self._active, self.base, self._prompts = [], None, None
        self._waiting.clear()
        self._commands.clear()
        self.adapters = {}
        self._linears.drop_sums()
        # What is still computed may free functions of Python, which must be there for it.
        mx.synchronize()
        mx.clear_cache()

    def _drop_closed(self) -> None:
        """Those that have not begun; the others are ended on the engine's thread."""
        if any(sequence.outbox.closed for sequence in self._waiting):
            self._waiting = deque(x for x in self._waiting if x.steps or not x.outbox.closed)

    def _run_commands(self) -> None:
        while self._commands:
            command = self._commands[0]
            result, error = None, None
            if command.alone and (self._active or self._waiting):
                if time.monotonic() - command.since < SWAP_S:
                    return
                self._next_swap = time.monotonic() + SWAP_REST_S
                error = Busy("the answers that are being given take long: try again in a minute.")
                command.future.set_running_or_notify_cancel()
            elif command.future.set_running_or_notify_cancel():
                try:
                    result = command.run()
                except BaseException as raised:
                    error = _no_memory(raised, "this") or raised
                    if not isinstance(error, Exception):  # a panic of a library in Rust
                        error = RunError(f"it failed: {_reason(error)}")
            with self._wake:
                self._commands.popleft()  # until here generate() sees it
            if command.future.cancelled():
                continue
            if error is None:
                command.future.set_result(result)
            else:
                command.future.set_exception(error)

    def _round(self) -> None:
        """One step of every sequence, those of an adapter together, of the one that is in first."""
        order = sorted(
            self._active,
            key=lambda x: (x.selected.key != self._linears.key, x.selected.key, x.number),
        )
        for sequence in order:
            if self._stopped:
                return
            if sequence.outbox.closed:
                self._end(sequence)
                continue
            try:
                self._linears.put_in(sequence.selected)
                if sequence.steps is None:
                    sequence.steps = self._steps(sequence)
                next(sequence.steps)
            except StopIteration:
                self._end(sequence)
            except BaseException as error:
                self._fail(sequence, error)

    def _end(self, sequence: _Sequence) -> None:
        """Takes a sequence out; what its cache holds is kept for prompts that begin alike."""
        if sequence in self._active:
            self._active.remove(sequence)
        sequence.close()
        tokens = [*sequence.prompt[: sequence.done], *sequence.made]
        if sequence.cache is not None and tokens:
            self._prompts.insert_cache("", [sequence.selected.key, *tokens], sequence.cache)
        if not self._active:
            mx.clear_cache()

    def _fail(self, sequence: _Sequence, error: BaseException) -> None:
        """Takes a sequence out that cannot go on. The others can."""
        self._active.remove(sequence)
        told = _no_memory(error, f"a request of {len(sequence.prompt)} tokens")
        if told is None:
            logger.error("a generation failed", exc_info=error)
            told = RunError(f"the generation failed: {_reason(error)}")
        else:  # what is kept for speed alone goes first
            logger.warning("%s", told)
            self._prompts.trim_to(n_sequences=0)
            self._linears.drop_sums()
        sequence.outbox.put(told)
        sequence.cache = None
        mx.clear_cache()

    def _load(self, path: Path, confined: Confined) -> Base:
        from mlx_lm.models.cache import LRUPromptCache

        base = read_base(path, confined)
        if self.base is not None:
            self.base.confined.close()
        self._prompts = LRUPromptCache(MOST_PROMPTS, self._cache_bytes)
        self._linears = Linears()
        self.adapters, self.default, self.base = {}, None, base
        _free()
        return base

    def _mount(self, id: str, path: Path) -> Mounted:
        if id in self.adapters:
            return self.adapters[id]
        if self.base is None:
            raise InputError("no model is loaded that an adapter could be mounted on.")
        if len(self.adapters) >= MOST_MOUNTED:
            raise InputError(f"{MOST_MOUNTED} adapters are mounted: unmount some.")
        held = sum(own.size_bytes for own in self.adapters.values())
        mounted = read_mounted(id, path, self.base, MOST_MOUNTED_BYTES - held)
        self.adapters = {**self.adapters, id: mounted}
        return mounted

    def _unmount(self, id: str) -> int:
        mounted = self.adapters.get(id)
        if mounted is None:
            raise InputError(f"adapter {id} not mounted", status=404)
        self.adapters = {key: x for key, x in self.adapters.items() if key != id}
        if self.default is not None and id in self.default.replace("+", ",").split(","):
            self.default = None
        if self.base is not None:
            self._linears.forget(mounted, self.base)
        layers = mounted.mounted_layers
        del mounted
        _free()
        return layers

    def _steps(self, sequence: _Sequence) -> Generator[None, None, None]:
        """A part of the prompt a step, then a token; text goes to the outbox."""
        from mlx_lm.generate import generate_step

        base, prompt, options = sequence.selected.base, sequence.prompt, sequence.options
        self._begin(sequence)
        last = len(prompt) - 1  # at least one token has to be left, whose logits begin the answer
        while sequence.done < last:
            end = min(last, sequence.done + self._prefill)
            base.model(mx.array(prompt[sequence.done : end])[None], cache=sequence.cache)
            mx.eval([layer.state for layer in sequence.cache or ()])
            sequence.done = end
            yield
        context = prompt[-CONTEXT:] if options.continues else []
        text = Text(base.tokenizer, context, options.stop)
        tokens: Any = generate_step(
            mx.array(prompt[last:]),
            base.model,
            max_tokens=sequence.most,
            sampler=sampler(options),
            logits_processors=processors(options, prompt),
            prompt_cache=sequence.cache,
        )
        with closing(tokens):
            for token, _ in tokens:
                sequence.done = len(prompt)
                sequence.made.append(token)
                ended = token in base.tokenizer.eos_token_ids
                full = len(sequence.made) == sequence.most
                piece = text.end() if ended else text.add(token)
                if full and not (ended or text.stopped):
                    piece += text.end()
                finish = "stop" if ended or text.stopped else "length" if full else None
                if piece or finish:
                    sequence.outbox.put(Piece(piece, len(sequence.made), sequence.cached, finish))
                if finish:
                    return
                yield

    def _begin(self, sequence: _Sequence) -> None:
        """A cache of the longest known begin of the prompt, without its last token."""
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        # The key stands before the tokens, and not for the model, of which names are never freed.
        begin = [sequence.selected.key, *sequence.prompt[:-1]]
        cache, rest = self._prompts.fetch_nearest_cache("", begin)
        known = len(begin) - 1 - len(rest)
        if cache is None or known <= 0:
            sequence.cache = make_prompt_cache(sequence.selected.base.model)
            return
        cut: list[Any] = [x for x in cache if type(x) is KVCache and x.keys is not None]
        for layer in cut:  # else what was cut off a long entry would be copied at the first write
            layer.keys = layer.keys[..., : layer.offset, :]
            layer.values = layer.values[..., : layer.offset, :]
        sequence.cache, sequence.cached, sequence.done = cache, known, known


def _free() -> None:
    """Gives memory that nothing holds back to the system. MLX keeps it for the next arrays, and so
    does the C library, which this package asks to keep much (csrc/core/kernel.cpp)."""
    mx.clear_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # of a C library that has no such function
            ctypes.CDLL(None).malloc_trim(0)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _no_memory(error: BaseException, what: str) -> RunError | None:
    """A lack of memory as a sentence; None if the error is another."""
    if not is_out_of_memory(error):
        return None
    reason = " ".join(str(error).split())[:200]
    return NoMemory(
        f"the device has too little memory for {what} ({reason or 'no more was given'}): "
        "shorten it, or try again when less runs."
    )
