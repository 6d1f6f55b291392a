"""One base model, its adapters, and the thread that generates completions.

An MLX stream belongs to one thread, so everything that creates arrays runs on the engine's thread.
Each round first processes parts of the waiting prompts, one request at a time, with the request's
adapter in the base model's linear layers. Then it computes one token of every completion, in one
forward pass for all adapters (batching.py). In this pass, the update of each row comes from its
request's adapter. Each request has its own cache, random key and token counts, so its completion
does not depend on other requests, except in the last bits: the order of summation in a matrix
product depends on the number of rows. A request with `deterministic` is decoded alone, so that its
completion is bit-identical each time.
"""

import asyncio
import copy
import ctypes
import gc
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from ... import lora
from ...errors import InputError, RunError, is_out_of_memory, reason
from ...generation.batching import Batch, can_merge
from ...generation.decoding import Options
from ...lora.rows import Rows
from ...training.policy import wire
from ..confined.parent import Confined
from ..pools import Busy, Pool
from .metrics import Metrics
from .mounting import (
    Base,
    Linears,
    Mounted,
    Selected,
    check_id,
    id_of,
    read_base,
    read_mounted,
    state_of,
)
from .pieces import Generation
from .requests import Request

logger = logging.getLogger("mlx_segtrain.serving")

#: Maximum number of running requests, and of waiting requests.
MOST_ACTIVE, MOST_WAITING = 64, 256
#: If other requests are waiting, a request's turn ends after TURN_S seconds. The request then waits
#: and keeps its cache, but at most MOST_PAUSED caches are kept in this way. A request that has not
#: started after LONGEST_WAIT_S seconds is refused.
TURN_S, MOST_PAUSED, LONGEST_WAIT_S = 10.0, 16, 120.0
#: Before a model is loaded, the engine waits up to SWAP_S seconds for completions in progress; no
#: request can start in the meantime. If completions are still in progress after that, loading is
#: refused for SWAP_REST_S seconds.
SWAP_S, SWAP_REST_S = 10.0, 30.0
#: The maximum number of prompt tokens per forward pass (on the CPU and on a GPU), and the minimum
#: while completions are being decoded.
PREFILL, PREFILL_GPU, LEAST_PREFILL = 256, 2048, 32
#: Target time for one part of a prompt, and time limit for all prompts between two decoding steps,
#: in seconds. If no completion is being decoded, the limit is FIRST_PROMPTS_S, so that more
#: completions start together.
PART_S, PROMPTS_S, FIRST_PROMPTS_S = 0.05, 0.1, 0.5
#: While a job is computing, the engine pauses after each round for REST times as long as the round
#: took. If the job made no progress during rounds, its steps would take 1 + 1 / REST = 1.33 times
#: as long. On an H200, the steps actually take 1.01 to 1.12 times as long (bench/LOG.md,
#: 2026-12-01). A pause has a maximum length, so that no completion stalls.
REST, LONGEST_REST_S = 3.0, 0.15
#: Maximum number of mounted adapters, and their maximum total size in bytes.
MOST_MOUNTED, MOST_MOUNTED_BYTES = 256, 8 << 30
#: Maximum number of cached prompts.
MOST_PROMPTS = 32

#: The pool for loading tokenizers. A model's tokenizer is loaded before the model.
_LOADING = Pool("models", 1, 8)

T = TypeVar("T")


class NoMemory(RunError):
    """The device has too little memory for a request. Other requests continue."""

    status, code = 503, "no_memory"


class Ended(RunError):
    """The engine's thread has ended, so the server must be restarted."""

    status, code = 503, "ended"


@dataclass(eq=False)
class _Command:
    run: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    alone: bool = False  #: whether it waits until no completion is being generated
    since: float = field(default_factory=time.monotonic)


class Engine:
    """Generates completions with one base model and its adapters. `cache_bytes` limits the size of
    the cached prompts."""

    def __init__(self, *, cache_bytes: int = 1 << 30):
        self.base: Base | None = None
        # The mapping is replaced and never modified, because other threads read it.
        self.adapters: dict[str, Mounted] = {}
        self.default: str | None = None  #: the adapter for requests that name none
        self._cache_bytes = cache_bytes
        self._job = False  # whether a job is computing, which needs memory and the device
        self._wake = threading.Condition()
        self._commands: deque[_Command] = deque()
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []
        self._next_swap = 0.0
        self._stopped, self._ended = False, threading.Event()
        self.fault: str | None = None  #: the reason why the engine has ended
        self.metrics = Metrics(
            {
                "requests_running": ("Answers in progress.", lambda: len(self._active)),
                "requests_waiting": ("Waiting requests.", lambda: len(self._waiting)),
                "adapters_mounted": ("Adapters in memory.", lambda: len(self.adapters)),
                "prompt_cache_bytes": ("Bytes of cached prompts.", self._kept_bytes),
            },
            lambda: self.adapters,
        )
        # Only the engine's thread uses these:
        self._prompts: Any = None
        self._linears = Linears()
        self._rows: Any = None  # the update of each row of a batch (lora/rows.py)
        self._merges = False  # whether caches of the base model can be merged for a batch
        self._batches: list[Batch[Request]] = []
        self._rate = 0.0  # prompt tokens processed per second
        self._device = mx.default_device()
        self._prefill = PREFILL_GPU if self._device.type == mx.DeviceType.gpu else PREFILL
        threading.Thread(target=self._work, name="mlx-segtrain engine", daemon=True).start()

    # Called from an event loop

    async def load(self, model_dir: Path) -> Base:
        """Replaces the base model once no completion is being generated, and drops adapters and
        cached prompts.

        Raises InputError if the new model cannot be read; in that case, the old model is kept.
        """
        self._check_runs()
        path = Path(model_dir).expanduser().resolve()
        confined = Confined(path)
        try:
            await _LOADING.run(confined.start)
            return await self.call(lambda: self._load(path, confined), alone=True)
        # Closing runs in a thread, because it waits for a tokenizer that is still loading, and
        # would block the event loop.
        except BaseException:
            threading.Thread(target=confined.close, daemon=True).start()
            raise

    async def mount(self, id: str | None, path: Path) -> Mounted:
        """Mounts an adapter. If an adapter is already mounted under this id, returns that adapter,
        after reading it again if it has the same path and its files have changed. If `id` is None,
        an adapter that is mounted keeps its id; otherwise, the folder's name determines the id.

        Raises InputError if the id or the folder cannot be used.
        """
        if id is not None:
            check_id(id, self.base)
        return await self.call(lambda: self._mount(id, Path(path)))

    async def unmount(self, id: str) -> int:
        """Unmounts an adapter, and returns the number of linear layers that it updated. Requests
        that already use the adapter can still finish. If the adapter was the default, the base
        model becomes the default.

        Raises InputError if the adapter is not mounted.
        """
        return await self.call(lambda: self._unmount(id))

    def select(self, adapter: str | None) -> Selected:
        """Returns the adapters that a request names. `adapter` is an id ("a") or a stack of ids
        ("a+b" or "a,b"). Both "none" and "" mean the base model, and None means the default
        adapter.

        Raises InputError for an adapter that is not mounted, or that cannot be stacked.
        """
        if self.base is None:
            raise InputError("no model is loaded: start the server with one.")
        text = ((self.default or "") if adapter is None else adapter).strip()
        if text.lower() in ("", "none"):
            return Selected(self.base)
        mounted = self.adapters
        ids = [part.strip() for part in text.split("+" if "+" in text else ",")]
        for i, id in enumerate(ids):
            if id not in mounted:
                names = ", ".join(mounted) or "none"
                raise InputError(f"adapter {id[:100]!r} is not mounted (mounted: {names}).")
            if id in ids[:i]:
                raise InputError(f"adapter {id!r} is named twice in {text[:200]!r}: name it once.")
            kind = mounted[id].adapter.kind
            if len(ids) > 1 and kind is not lora.LORA:
                raise InputError(
                    f"adapter {id!r} is a {kind.name} adapter, which cannot be stacked."
                )
        return Selected(self.base, tuple(mounted[id] for id in ids))

    def generate(self, prompt: list[int], selected: Selected, options: Options) -> Generation:
        """Returns an iterator over the pieces of a prompt's completion. Must be called in a running
        event loop.

        Raises InputError if the prompt is empty, is too long or has unknown tokens, and Busy if too
        many requests are waiting.
        """
        base = selected.base
        base.check(prompt, options.logit_bias)
        request = Request(prompt, selected, options)
        with self._wake:
            self._drop_closed()
            self._check_runs()
            if base is not self.base or any(command.alone for command in self._commands):
                raise Busy("the model is being replaced: try again in a moment.")
            if len(self._waiting) >= MOST_WAITING:
                raise Busy(f"{MOST_WAITING} requests are already waiting: try again in a moment.")
            self._waiting.append(request)
            self._wake.notify()
        return Generation(request.outbox)

    async def tidy(self) -> None:
        """Returns freed memory to the system, unless a completion is being generated."""
        if not self._active and not self._stopped:
            await self.call(_free)

    async def spare(self, job: bool) -> None:
        """Sets whether a job is computing. While a job is computing, no prompts are cached, and the
        job receives most of the device's time."""
        self._job = job
        if job and self._kept_bytes() and not self._stopped:
            await self.call(lambda: (self._prompts.trim_to(n_sequences=0), _free()))

    def _kept_bytes(self) -> int:
        prompts = self._prompts
        return 0 if prompts is None else prompts.nbytes

    def close(self) -> None:
        """Ends all requests and frees the model. The thread stays alive until the process ends."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._ended.wait()

    async def call(self, run: Callable[[], T], *, alone: bool = False) -> T:
        """Runs a function on the engine's thread, between two rounds. With `alone`, first waits
        until no completion is being generated, and raises Busy if that takes too long."""
        command = _Command(run, alone=alone)
        with self._wake:
            self._check_runs()
            if alone and time.monotonic() < self._next_swap:
                raise Busy("the answers in progress take too long: try again in a minute.")
            self._commands.append(command)
            self._wake.notify()
        return await asyncio.wrap_future(command.future)

    def _check_runs(self) -> None:
        if self.fault is not None:
            raise Ended(self.fault)
        if self._stopped:
            raise Busy("the server is shutting down: try again later.")

    # The methods below run on the engine's thread

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
        # When a thread ends, MLX frees the thread's compiled functions, for which the Python
        # interpreter must still be running. If the process exited at that moment, it would abort
        # (ml-explore/mlx#4110). Therefore the thread does not end before the process.
        threading.Event().wait()

    def _serve(self) -> None:
        from mlx_lm.generate import generation_stream

        mx.set_default_device(self._device)
        wire()  # otherwise the system may page weights out between two tokens
        with mx.stream(generation_stream):
            while not self._stopped:
                try:
                    self._turn()
                except BaseException as error:  # includes panics in Rust; the thread must continue
                    self._start_over(error)
            self._give_up(Busy("the server is shutting down: try again later."))
        mx.clear_streams()

    def _turn(self) -> None:
        self._run_commands()
        self._admit()
        begun = time.monotonic()
        self._round()
        with self._wake:
            if self._job:
                rest = min(REST * (time.monotonic() - begun), LONGEST_REST_S)
                # Commands with `alone` wait for the end of this pause, too.
                self._wake.wait_for(
                    lambda: self._stopped or any(not own.alone for own in self._commands), rest
                )
            self._wake.wait_for(
                lambda: self._stopped or self._commands or self._waiting or self._active
            )

    def _start_over(self, error: BaseException) -> None:
        """Recovers from an error that cannot be attributed to a single request: running requests
        fail, and waiting requests stay in the queue."""
        logger.error(
            "the engine failed and is restarting; all running requests were aborted", exc_info=error
        )
        failure = RunError(f"the engine failed: {_reason(error)}")
        active, self._active, self._batches = self._active, [], []
        for request in active:
            request.cache = request.batch = None
            request.outbox.put(failure)
        with self._wake:
            running = [x for x in self._commands if x.future.running()]
            self._commands = deque(x for x in self._commands if x not in running)
        for command in running:
            command.future.set_exception(failure)
        self._free_spare()
        mx.clear_cache()

    def _free_spare(self) -> None:
        """Frees caches that are only needed for speed."""
        self._linears.drop_sums()
        if self._rows is not None:
            self._rows.forget()
        if self.base is not None:
            for module in self.base.modules.values():
                module.forget_casts()

    def _admit(self) -> None:
        """Starts the requests that have waited longest, and pauses requests whose turn has
        ended."""
        if not self._waiting:  # this is the usual case between two tokens
            return
        now = time.monotonic()
        with self._wake:
            self._drop_closed()
            gone = [x for x in self._waiting if x.outbox.closed]
            late = [x for x in self._waiting if x.cache is None and now - x.since > LONGEST_WAIT_S]
            if gone or late:
                self._waiting = deque(x for x in self._waiting if x not in (*gone, *late))
            paused = sum(x.cache is not None for x in self._waiting)
            long = [x for x in self._active if now - x.since > TURN_S]
            full = len(self._active) - MOST_ACTIVE + len(self._waiting)
            long = long[: max(0, min(full, MOST_PAUSED - paused))]
            self._take_out(long)
            for request in long:
                request.since = now
                self._waiting.append(request)
            while self._waiting and len(self._active) < MOST_ACTIVE:
                self._active.append(self._waiting.popleft())
                self._active[-1].since = now
        self._end(*gone)
        for request in late:
            message = f"the server was busy for {LONGEST_WAIT_S:.0f} s: try again later."
            request.outbox.put(Busy(message))

    def _give_up(self, ended: RunError) -> None:
        """Ends all requests with an error, and frees the model, the adapters and the caches."""
        for request in (*self._active, *self._waiting):
            request.cache = request.batch = None
            request.outbox.put(ended)
        for command in self._commands:
            if command.future.set_running_or_notify_cancel():
                command.future.set_exception(ended)
        if self.base is not None:
            self.base.confined.close()
        self._active, self._batches, self.base, self._prompts = [], [], None, None
        self._waiting.clear()
        self._commands.clear()
        self.adapters = {}
        self._free_spare()
        # Wait for MLX's work in progress: it may free Python functions, which must happen before
        # Python exits.
        mx.synchronize()
        mx.clear_cache()

    def _drop_closed(self) -> None:
        """Drops closed requests that have not started. The engine's thread ends all other closed
        requests."""
        if any(request.outbox.closed for request in self._waiting):
            self._waiting = deque(x for x in self._waiting if x.cache or not x.outbox.closed)

    def _run_commands(self) -> None:
        while self._commands:
            command = self._commands[0]
            result, error = None, None
            if command.alone and (self._active or self._waiting):
                if time.monotonic() - command.since < SWAP_S:
                    return
                self._next_swap = time.monotonic() + SWAP_REST_S
                error = Busy("the answers in progress take too long: try again in a minute.")
                command.future.set_running_or_notify_cancel()
            elif command.future.set_running_or_notify_cancel():
                try:
                    result = command.run()
                except BaseException as raised:
                    error = _no_memory(raised, "this") or raised
                    if not isinstance(error, Exception):  # a panic in a Rust library
                        error = RunError(f"it failed: {_reason(error)}")
            with self._wake:
                self._commands.popleft()  # not earlier, because generate() checks the queue
            if command.future.cancelled():
                continue
            if error is None:
                command.future.set_result(result)
            else:
                command.future.set_exception(error)

    def _round(self) -> None:
        """Processes parts of prompts, and then computes one token of every completion."""
        self._end(*(x for x in self._active if x.outbox.closed))
        self._read_prompts()
        for batch in list(self._batches):
            if self._stopped:
                return
            self._step(batch)

    def _read_prompts(self) -> None:
        """Processes prompts in order of arrival. Requests whose prompts are finished join a
        batch."""
        begun, most = time.monotonic(), PROMPTS_S if self._batches else FIRST_PROMPTS_S
        if self._job:  # a longer round would need a pause above LONGEST_REST_S
            most = LONGEST_REST_S / REST
        ready: list[Request] = []
        for request in sorted((x for x in self._active if not x.batch), key=lambda x: x.number):
            try:
                while not (done := self._read_part(request)):
                    if self._stopped or time.monotonic() - begun > most:
                        break
            except BaseException as error:
                self._fail(request, error)
                continue
            if done:
                ready.append(request)
            if self._stopped or time.monotonic() - begun > most:
                break
        self._join(ready)

    def _read_part(self, request: Request) -> bool:
        """Processes a part of a prompt, and returns whether only the last token is left."""
        cache = self._begin(request) if request.cache is None else request.cache
        last = request.length - 1
        if request.next is not None or request.done >= last:
            return True
        most = self._prefill
        if self._batches and not request.options.deterministic:
            few = int(self._rate * PART_S) // LEAST_PREFILL * LEAST_PREFILL
            most = max(LEAST_PREFILL, min(few, most))
        end = min(last, request.done + most)
        self._linears.put_in(request.selected)
        begun = time.monotonic()
        part = mx.array(request.tokens[request.done : end])[None]
        request.selected.base.model(part, cache=cache)
        mx.eval([layer.state for layer in cache])
        self._rate = (end - request.done) / max(time.monotonic() - begun, 1e-6)
        request.done = end
        if end == last:  # other requests may have the same prompt
            self._keep(request, copy.deepcopy(cache))
        return end == last

    def _join(self, ready: Sequence[Request]) -> None:
        """Adds each request to a batch of completions with similar lengths, or to a new batch."""
        joining: dict[Batch[Request], list[Request]] = {batch: [] for batch in self._batches}
        for request in ready:
            fits = (batch for batch, own in joining.items() if batch.takes(request, own))
            batch = next(fits, None)
            if batch is None:
                batch = Batch[Request](request.selected.base)
                joining[batch] = []
            joining[batch].append(request)
        for batch, own in joining.items():
            if not own:
                continue
            if batch not in self._batches:
                self._batches.append(batch)
            try:
                batch.join(own)
            except BaseException as error:
                self._break_up(batch, error, own)

    def _step(self, batch: Batch[Request]) -> None:
        requests = batch.answers
        try:
            if batch.alone:
                self._linears.put_in(requests[0].selected)
                ended, failed = batch.step()
            else:
                keys = [request.selected.key for request in requests]
                self._linears.take_out(requests[0].selected.base, self._rows.known)
                if not self._rows.holds(keys):
                    self._rows.put_in(keys, self._updates())
                with self._rows.running():
                    ended, failed = batch.step()
        except BaseException as error:
            self._break_up(batch, error)
            return
        for request, error in failed:
            self._fail(request, error)
        self._end(*(x for x in ended if x.batch is batch))

    def _updates(self) -> dict[Any, lora.Adapter]:
        """Returns the updates of all requests in batches, keyed by Selected.key."""
        chosen = {x.selected.key: x.selected for batch in self._batches for x in batch.answers}
        return {key: self._linears.sum_of(x.adapters) for key, x in chosen.items() if key}

    def _break_up(
        self, batch: Batch[Request], error: BaseException, joining: Sequence[Request] = ()
    ) -> None:
        """Handles an error in a batch. Its requests restart with the tokens that they already have.

        If memory was short, the longest request fails. Otherwise any of the requests may have
        caused the error, so each of them continues alone, and only the one that caused it fails
        again.
        """
        self._batches.remove(batch)
        requests = list({id(x): x for x in (*batch.answers, *joining)}.values())
        for request in requests:
            request.start_over()
        lacks = is_out_of_memory(error)
        if lacks or len(requests) == 1:
            self._fail(max(requests, key=lambda request: request.length), error)
        if not lacks:
            for request in requests:
                request.alone = True
        mx.clear_cache()

    def _take_out(self, requests: Sequence[Request], *, keep: bool = True) -> None:
        """Removes requests from their batches. If `keep` is set, the requests keep their caches."""
        for batch in {x.batch: None for x in requests if x.batch is not None}:
            batch.leave([x for x in requests if x.batch is batch], keep=keep)
            if not batch.answers:
                self._batches.remove(batch)
        self._active = [x for x in self._active if x not in requests]

    def _end(self, *requests: Request) -> None:
        """Ends requests. Their caches are kept for later prompts with the same prefix."""
        if not requests:
            return
        self._take_out(requests)
        for request in requests:
            if request.cache is not None:
                self._keep(request, request.cache)
            request.cache = None
            self.metrics.count(request, request.finish or "gone")
        if not self._active:
            mx.clear_cache()

    def _keep(self, request: Request, cache: list[Any]) -> None:
        """Keeps a cache for later prompts with the same prefix. The caches of deterministic
        requests are not kept."""
        if request.done and not request.options.deterministic and not self._job:
            # The adapters' key is passed as the first token. If it were passed as the name of the
            # model, LRUPromptCache would never free it.
            tokens = [request.selected.key, *request.tokens[: request.done]]
            self._prompts.insert_cache("", tokens, cache)

    def _fail(self, request: Request, error: BaseException) -> None:
        """Ends a request that cannot continue."""
        if request not in self._active:
            return
        self._take_out([request], keep=False)
        failure: Exception | None = _no_memory(error, f"a request of {len(request.prompt)} tokens")
        if isinstance(error, InputError):  # the request's grammar raised it
            failure = error
        elif failure is None:
            logger.error("a generation failed", exc_info=error)
            failure = RunError(f"the generation failed: {_reason(error)}")
        else:
            logger.warning("%s", failure)
            self._prompts.trim_to(n_sequences=0)
            self._free_spare()
        request.outbox.put(failure)
        request.cache = None
        self.metrics.count(request, "failed")
        mx.clear_cache()

    def _load(self, path: Path, confined: Confined) -> Base:
        from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

        base = read_base(path, confined)
        rows, merges = Rows(base.modules, base.model), can_merge(make_prompt_cache(base.model))
        prompts = LRUPromptCache(MOST_PROMPTS, self._cache_bytes)
        # Nothing below can fail. If anything above fails, the old model is intact.
        if self.base is not None:
            self.base.confined.close()
        for id in self.adapters:
            self.metrics.forget(id)
        self._rows, self._merges, self._prompts, self._linears = rows, merges, prompts, Linears()
        self.adapters, self.default, self.base = {}, None, base
        gc.collect()  # the old model has reference cycles
        _free()
        return base

    def _mount(self, id: str | None, path: Path) -> Mounted:
        if self.base is None:
            raise InputError("no model is loaded: load one before you mount an adapter.")
        if id is None:
            ids = [own.id for own in self.adapters.values() if own.path == path]
            id = ids[0] if ids else id_of(path, self.base, self.adapters)
        old, others = self.adapters.get(id), {k: x for k, x in self.adapters.items() if k != id}
        if old is not None and (old.path != path or old.state == state_of(path)):
            return old
        if len(others) >= MOST_MOUNTED:
            raise InputError(
                f"{MOST_MOUNTED} adapters are already mounted, which is the limit: unmount some."
            )
        held = sum(own.size_bytes for own in others.values())
        mounted = read_mounted(id, path, self.base, MOST_MOUNTED_BYTES - held)
        self.adapters = {**self.adapters, id: mounted}
        if old is not None:
            self._linears.forget(old, self.base)
            self._rows.forget()
            del old
            _free()
        return mounted

    def _unmount(self, id: str) -> int:
        mounted = self.adapters.get(id)
        if mounted is None:
            raise InputError(f"adapter {id} is not mounted", status=404)
        self.adapters = {key: x for key, x in self.adapters.items() if key != id}
        if self.default is not None and id in self.default.replace("+", ",").split(","):
            self.default = None
        if self.base is not None:
            self._linears.forget(mounted, self.base)
            self._rows.forget()
        self.metrics.forget(id)
        layers = mounted.mounted_layers
        del mounted
        _free()
        return layers

    def _begin(self, request: Request) -> list[Any]:
        """Returns a cache of the longest cached prefix of a prompt, which never includes the
        prompt's last token. For a deterministic request, whose completion must not depend on cached
        prompts, returns an empty cache."""
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        own, base = request.selected, request.selected.base
        request.alone = (
            request.alone
            or request.options.deterministic
            or not self._merges
            or not all(self._rows.can(mounted.adapter) for mounted in own.adapters)
        )
        empty = request.cache = make_prompt_cache(base.model)
        if request.options.deterministic:
            return empty
        begin = [own.key, *request.tokens[:-1]]
        cache, rest = self._prompts.fetch_nearest_cache("", begin)
        known = len(begin) - 1 - len(rest)
        if cache is None or known <= 0:
            return empty
        layers: list[Any] = [x for x in cache if type(x) is KVCache and x.keys is not None]
        for layer in layers:  # otherwise the first write would also copy the rest of a long entry
            layer.keys = layer.keys[..., : layer.offset, :]
            layer.values = layer.values[..., : layer.offset, :]
        request.cache, request.done = cache, known
        request.cached = min(known, len(request.prompt) - 1)
        return cache


def _free() -> None:
    """Returns free memory to the system. Otherwise, MLX and the C library (as configured in
    csrc/core/kernel.cpp) keep it for new arrays."""
    mx.clear_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # the C library has no such function
            ctypes.CDLL(None).malloc_trim(0)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason(error)}"


def _no_memory(error: BaseException, what: str) -> RunError | None:
    """Returns the error to report if memory was short, or None for any other error."""
    if not is_out_of_memory(error):
        return None
    return NoMemory(
        f"the device has too little memory for {what} ({reason(error)}): "
        "shorten it, or try again when fewer requests are running."
    )
