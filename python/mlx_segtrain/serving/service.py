"""Implements the API: checks paths and configurations, then runs jobs and makes plans."""

import asyncio
import json
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from pydantic import TypeAdapter

from .. import hub
from ..adapters.discovery import Found
from ..config import PATHS, REFUSED, TrainConfig, load_config
from ..data import Report, repository
from ..data.sources import format_of, sources_of
from ..errors import InputError, NoRoom, RunError, shown
from ..hub_search import Hit
from ..models.snapshot import Snapshot
from ..planning.budget import budget_bytes
from ..planning.report import planned_report
from ..planning.run import full_batch
from ..training.ranks import Ranks, check_ranks
from ..training.record import machine
from ..training.setup import accumulating
from . import catalog
from .confined.parent import INSPECTING, INSPECTIONS, Confined
from .generation.engine import Engine
from .generation.mounting import Base, id_of
from .hosts import share_memory
from .jobs.kinds import KINDS
from .jobs.outputs import Outputs
from .jobs.queue import Jobs
from .jobs.row import Row
from .pools import Pool, Transfers
from .roots import Roots
from .searching import Searches
from .sessions import Sessions
from .settings import Settings

logger = logging.getLogger("mlx_segtrain.serving")

#: The fields that contain paths, for all kinds of jobs.
JOB_PATHS = tuple(
    dict.fromkeys([*PATHS, "output_dir", *(x for kind in KINDS.values() for x in kind.folders)])
)
#: Maximum number of tokenizers that stay loaded for inspections, not counting the served model's.
MOST_CONFINED = 2
#: Seconds between memory checks, and the growth in bytes above which freed memory is returned to
#: the system.
TIDY_S, TIDY_BYTES = 20.0, 64 << 20
#: Maximum size of a job's configuration as JSON, in bytes.
MOST_CONFIG = 1 << 16
#: Advice that tells the operator how to make a model available.
WAY = "start the server with --allow-downloads, or run `hf download NAME` on its machine"
#: The number of jobs that clients may submit in a burst, and the number per minute after a burst.
BURST, PER_MINUTE = 60, 60


@dataclass(frozen=True)
class Plan:
    """Whether a run fits into memory, a message that says why or why not, and the plan if the run
    fits."""

    fits: bool
    message: str
    plan: dict[str, Any] | None


@dataclass(frozen=True)
class Device:
    """The device on which jobs run. `memory_bytes` is its total memory."""

    name: str
    type: str
    memory_bytes: int

    @classmethod
    def here(cls) -> "Device":
        found, info = machine()["device"], dict(mx.device_info())
        memory = info.get("memory_size") or info.get("total_memory")
        name = found["name"]
        if name == "CPU":  # on Linux, `platform` does not know the processor's name
            with suppress(OSError, StopIteration):
                lines = Path("/proc/cpuinfo").read_text().splitlines()
                model = next(line for line in lines if line.startswith("model name"))
                name = model.partition(":")[2].strip()
        ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(name, found["type"], int(memory or ram))

    @property
    def free_bytes(self) -> int:
        """The memory, in bytes, that a run could allocate now."""
        return budget_bytes()


class Service:
    """A server's folders, jobs and model."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.roots = Roots(settings.folders, settings.store)
        if settings.downloads and not self.roots.allows(hub.cache()):
            raise InputError(
                f"--allow-downloads needs the Hugging Face cache {hub.cache()}, which is not below "
                f"a --root: add --root {hub.cache()}."
            )
        self.hosts = settings.hosts()
        self.jobs = Jobs(settings.store, self._check_paths, self.roots.folders, self.hosts)
        self.outputs = Outputs(settings.store, self.roots, self.jobs)
        self.engine = Engine(cache_bytes=int(settings.prompt_cache_gb * 1e9))
        self.tidying: asyncio.Task[None] | None = None
        self.confined: OrderedDict[Path | None, Confined] = OrderedDict()
        self.looks, self.plans = Pool("folder listings", 2, 32), Pool("plans", 2, 32)
        self.sessions = Sessions()  #: browser sessions
        self.searches = Searches()
        self.uploads, self.transfers = settings.store.resolve() / "uploads", Transfers()
        self.tokens, self.refilled = float(BURST), time.monotonic()

    async def start(self) -> None:
        await self.jobs.start()
        self.tidying = asyncio.create_task(self._tidy())
        if self.settings.model_dir is not None:
            base = await self.engine.load(self.settings.model_dir)
            if self.settings.adapter is not None:
                path = self.settings.adapter.resolve()
                self.engine.default = (await self.engine.mount(id_of(path, base), path)).id

    async def close(self) -> None:
        if self.tidying is not None:
            self.tidying.cancel()
        await self.jobs.close()
        for confined in self.confined.values():
            confined.close()
        await asyncio.to_thread(self.engine.close)

    async def _tidy(self) -> None:
        """Periodically returns freed memory to the system, and frees cached prompts while a job is
        using the accelerator."""
        least = resident()
        while True:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.jobs.changed.wait(), TIDY_S)
            self.jobs.changed.clear()
            try:
                await self.engine.spare(self.jobs.training)
                if least is not None:
                    now = resident() or least
                    least = min(least, now)
                    if now > least + TIDY_BYTES:
                        await self.engine.tidy()
            except RunError:  # the engine is busy, or has ended and logged the reason
                continue
            except Exception:
                logger.exception("memory could not be freed")

    @property
    def waits(self) -> bool:
        """Whether requests for completions are refused until the current job ends."""
        return self.settings.while_training == "refuse" and self.jobs.training

    # Models, data and adapters on disk

    async def models(self, faults: list[catalog.Unreadable] | None = None) -> list[catalog.Model]:
        """Returns the models that can be read. Unreadable ones are added to `faults`."""
        return await self.looks.run(catalog.models, self.roots.folders, faults)

    async def datasets(self) -> list[catalog.DataFolder]:
        return await self.looks.run(catalog.datasets, self.roots.folders)

    async def adapters(self, base: Path | None) -> list[Found]:
        """Returns the adapters that fit `base`. If `base` is None, returns all adapters that can be
        read."""
        return await self.looks.run(catalog.adapters, self.roots.folders, base)

    async def available(self) -> list[dict[str, Any]]:
        """Returns the adapters that the served model can use, for GET /v1/adapters/available."""
        base = self.engine.base
        if base is None:
            return []
        mounted = {own.path for own in self.engine.adapters.values()}
        return [
            {
                "id": id_of(own.path, base),
                "path": str(own.path),
                "rank": max(own.ranks, default=0),
                "scale": own.scale,
                "base_model": own.base or None,
                "mounted": own.path in mounted,
            }
            for own in await self.adapters(base.path)
            if catalog.is_of(own, base.path)
        ]

    async def serve(self, model_dir: str | Path) -> Base:
        """Loads a model, which replaces the served one."""
        return await self.engine.load(self.place(model_dir))

    def place(self, text: str | Path) -> Path:
        """Returns the folder for a path below the roots, or for the name of a model in the hub's
        cache. Raises InputError or Outside."""
        if hub.named(text) is None:
            return self.roots.resolve(text)
        found = hub.cached(text)
        if found is None:
            how = "download it first (/api/hub/download)" if self.settings.downloads else WAY
            raise InputError(
                f"{text} is neither a path nor in this machine's Hugging Face cache: {how}."
            )
        return self.roots.resolve(found)

    def data_place(self, text: str | Path) -> Path:
        """Returns the path of data below the roots, or the name and commit of a data set in the
        Hugging Face cache. Raises InputError or Outside.

        The cache may contain private data sets. Therefore only clients that may download can use
        it.
        """
        named = None if format_of(Path(text)) else repository.named(text)
        if named is None:
            return self.roots.resolve(text)
        self._check_downloads()
        train, _ = sources_of(str(text), ask=False)
        own = hub.origin(next(iter(train.files.values())))
        assert own is not None  # these files are in the Hugging Face cache
        self.roots.open(own.folder)
        folder = self.roots.resolve(own.folder / "snapshots" / str(own.revision))
        return Path(repository.pinned(str(text), folder))

    def _place_of(self, name: str) -> Callable[[str | Path], Path]:
        """Returns the function that checks and resolves the values of a path field."""
        named: dict[str, Callable[[str | Path], Path]]
        named = dict.fromkeys(("model_dir", "warm_start", "reward_model"), self.place)
        named["data_dir"] = self.data_place
        return named.get(name, self.roots.resolve)

    def _check_downloads(self) -> None:
        """Raises InputError unless clients may download from the hub."""
        if not self.settings.downloads:
            raise InputError(f"this server does not allow downloads: {WAY}.", status=403)

    def download(self, name: str, kind: hub.Kind) -> Row:
        """Submits a job that downloads a model or a data set. Raises InputError if downloads are
        not allowed."""
        if (hub.named(name) if kind == "model" else repository.named(name)) is None:
            raise InputError(
                f"{shown(name)} is not a valid hub name: use the form org/name.", status=422
            )
        self._check_downloads()
        return self._submit("download", {"name": name, "kind": kind}, None)

    async def search(self, words: str, kind: hub.Kind) -> list[Hit]:
        """Searches the hub. Raises InputError if downloads are not allowed, or if the search
        fails."""
        self._check_downloads()
        return await self.searches.run(words, kind)

    @cached_property
    def device(self) -> Device:
        """Returns the device of this machine."""
        return Device.here()

    # Before a run

    def config(self, values: Mapping[str, Any], **fill: Any) -> TrainConfig:
        """Returns a checked configuration with resolved paths. Raises InputError or Outside."""
        for name, why in REFUSED.items():
            if values.get(name) is not None:
                raise InputError(f"{name} is not allowed here: {why}.", status=422, field=name)
        try:
            config = load_config(None, {**fill, **values})
        except InputError as error:
            raise InputError(str(error), status=422, field=error.field) from None
        paths = {}
        for name in PATHS:
            if values.get(name) is not None:
                with about(name):
                    paths[name] = self._place_of(name)(getattr(config, name))
        return config.model_copy(update=paths)

    async def plan(self, values: Mapping[str, Any], ranks: int = 1) -> Plan:
        """Plans a run with this number of ranks. Raises InputError for an invalid configuration,
        but not for insufficient memory."""
        shared = _stated({**values, "adapter_path": values.get("adapter_path") or None})
        share_memory(shared, max(self.hosts.first(ranks).ranks_here))
        config = self.config(shared, data_dir="unused", adapter_path="unused")
        return await self.plans.run(_plan, _of_rank(config, ranks), ranks)

    async def inspect(
        self, path: str, model_dir: str | None = None, n_preview: int = 3, **how: Any
    ) -> Report:
        """Returns a report on a data set, including the problems in it."""
        place = self.data_place(path)
        base = None if model_dir is None else self.place(model_dir)
        confined = self._confined(base)
        confined.users += 1
        try:
            return await INSPECTIONS.run(_inspect, confined, place, n_preview, how, self.roots)
        finally:
            confined.users -= 1

    def _confined(self, model: Path | None) -> Confined:
        """Returns the processes for a model's tokenizer. If too many models have processes, ends
        those of the least recently used models."""
        served = self.engine.base
        if served is not None and served.path == model:
            return served.confined
        if model not in self.confined:
            self.confined[model] = Confined(model)
        self.confined.move_to_end(model)
        idle = [key for key, own in self.confined.items() if not own.users and key != model]
        for key in idle[: max(0, len(self.confined) - MOST_CONFINED)]:
            # Closing waits for processes that are still loading, so it runs in a thread.
            threading.Thread(target=self.confined.pop(key).close, daemon=True).start()
        return self.confined[model]

    # Jobs

    def submit(self, values: Mapping[str, Any], ranks: int = 1) -> Row:
        """Submits a training run with this number of ranks."""
        self.hosts.first(ranks)
        fill = {} if values.get("adapter_path") else {"adapter_path": self.outputs.new("adapter")}
        config, stated = self._checked({**values, **fill}, "train")
        self.outputs.check_run(config)
        if ranks > 1:
            stated["ranks"] = ranks
            _of_rank(config, ranks)
        return self._submit("finetune", stated, config.adapter_path)

    def enqueue(self, kind: str, **values: Any) -> Row:
        """Submits a job of the given kind, after the checks that the kind declares (kinds.py)."""
        own, out = KINDS[kind], None
        if own.makes is not None:
            out = self.outputs.given(values.pop("output_dir", None), own.makes)
        for name in own.folders:
            given = values[name]
            if given is not None:
                several = isinstance(given, list)
                values[name] = [*map(self._path, given)] if several else self._path(given)
        own.check(values)
        return self._submit(kind, {**values, "output_dir": str(out)} if out else values, out)

    def evaluate(
        self, values: Mapping[str, Any], split: str = "valid", with_base: bool = False
    ) -> Row:
        """Submits an evaluation of a model, with an adapter if one is given. If `with_base` is set,
        the job evaluates the model both with and without the adapter."""
        _, stated = self._checked(values, split, adapter_path="unused")
        if with_base and "adapter_path" not in stated:
            raise InputError(
                "with_base compares an adapter with its base model: add adapter_path.",
                status=422,
                field="with_base",
            )
        return self._submit("evaluate", {**stated, "split": split, "with_base": with_base}, None)

    def _checked(
        self, values: Mapping[str, Any], split: str, **fill: Any
    ) -> tuple[TrainConfig, dict[str, Any]]:
        """Returns the configuration of a job, and the part of it that the client set. Raises
        InputError."""
        given = _stated(values)
        config = self.config(given, **fill)
        with about("model_dir"):
            Snapshot(config.model_dir).file("config.json", "configuration")
        with about("data_dir"):
            _, valid = sources_of(config.data_dir, ask=False)
        if split == "valid" and valid is None and not config.val_split:
            raise InputError(
                f"data_dir {config.data_dir} has no validation rows: add a validation file, or set "
                "val_split.",
                field="data_dir",
            )
        return config, config.model_dump(mode="json", include=set(given))

    def resume(self, id: str) -> Row:
        """Requeues a job. Raises InputError if the job does not exist."""
        self.jobs.get(id)
        self._take_token()
        return self.jobs.resume(id)

    @property
    def has_hf_token(self) -> bool:
        from huggingface_hub import get_token

        return "HF_TOKEN" in self.jobs.environment or get_token() is not None

    def _submit(self, kind: str, values: dict[str, Any], output: Path | None) -> Row:
        if len(json.dumps(values)) > MOST_CONFIG:
            raise InputError(
                f"the configuration is larger than {MOST_CONFIG} bytes: shorten it.", status=422
            )
        self._take_token()
        return self.jobs.submit(kind, values, output)

    def _take_token(self) -> None:
        now = time.monotonic()
        self.tokens = min(BURST, self.tokens + (now - self.refilled) * PER_MINUTE / 60)
        self.refilled = now
        if self.tokens < 1:
            raise InputError(
                f"the limit of {PER_MINUTE} jobs per minute has been reached: try again later.",
                status=429,
            )
        self.tokens -= 1

    def _check_paths(self, values: Mapping[str, Any]) -> None:
        """Checks the paths of a job before it starts, because the roots may have changed since it
        was queued."""
        for name in JOB_PATHS:
            given = values.get(name)
            for path in given if isinstance(given, list) else [given]:
                if path is not None:
                    self._place_of(name)(path)

    def _path(self, text: str) -> str:
        path = self.place(text)
        if not path.is_dir():
            raise InputError(f"{text} is not a folder: specify an existing folder.")
        return str(path)


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that are not null, because null means that a field is omitted."""
    return {key: value for key, value in values.items() if value is not None}


@contextmanager
def about(field: str) -> Iterator[None]:
    """Sets the field of any InputError that is raised in the context and has no field."""
    try:
        yield
    except InputError as error:
        error.field = error.field or field
        raise


def resident() -> int | None:
    """Returns the resident memory of this process in bytes, or None if it is not known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return None
    return pages * resource.getpagesize()


def _of_rank(config: TrainConfig, ranks: int) -> TrainConfig:
    """Returns the configuration with which each of these ranks trains. Raises InputError if this
    number of ranks cannot train with the configuration."""
    group = Ranks(size=ranks, pipeline=ranks > 1 and config.parallel == "pipeline")
    try:
        check_ranks(config, group)
        return accumulating(config, group, None, lambda event: None)
    except InputError as error:
        raise InputError(str(error), status=422, field=error.field) from None


def _plan(config: TrainConfig, ranks: int) -> Plan:
    try:
        found, _ = planned_report(config, full_batch(config), ranks)
    except NoRoom as error:
        return Plan(False, str(error), None)
    if not found.predicted:
        return Plan(True, found.plan, asdict(found))
    peak, budget = found.peak / 1e9, found.budget / 1e9
    each = " per process" if ranks > 1 else ""
    text = f"fits: {peak:.1f} of {budget:.1f} GB{each}, longest {found.longest:,} tokens"
    return Plan(True, text, asdict(found))


def _inspect(
    confined: Confined, path: Path, n_preview: int, how: dict[str, Any], roots: Roots
) -> Report:
    what = f"the inspection of {path}"
    values = {"path": str(path), "n_preview": n_preview, "how": how}
    values["roots"] = [str(folder) for folder in roots.folders]
    try:
        found = confined.ask("inspect", INSPECTING, what, **values)
    except InputError as error:
        return Report(ok=False, error=str(error))
    return TypeAdapter(Report).validate_python(found)
