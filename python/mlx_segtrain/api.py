"""The Python API for training in a script or a notebook. It accepts keyword arguments, rows of
data, and a loaded model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import events, training
from .config import FACETS, TrainConfig, flag, load_config
from .errors import InputError, RunError
from .training.loop import Callback

if TYPE_CHECKING:
    import mlx.nn as nn
    from matplotlib.figure import Figure

    from .rewards import Function
    from .training.judging import Score

#: The default adapter path, as on the command line.
OUTPUT = {"adapter_path": "adapters"}
#: Maps each flag, spelled as a Python name, to the name of its field.
SHORT = {
    own.strip("-").replace("-", "_"): name
    for name, facets in FACETS.items()
    for own in (flag(name), *facets.aliases)
}


@dataclasses.dataclass(frozen=True, repr=False)
class TrainResult(training.TrainResult):
    """The result of a run. Losses are in nats per token, or per pair or row with preference
    methods.

    `config` is the configuration of the run. `model` and `tokenizer` are the objects that were
    passed to the run; if none were passed, they are loaded when they are first used. The adapter is
    attached to the model.
    """

    config: ClassVar[TrainConfig]  # a ClassVar, so that it is not written to JSON

    @cached_property
    def history(self) -> list[events.Event]:
        """The events with the metrics of the run. The `kind` of each event is train, val or
        score."""
        from .training.curves import metrics

        return metrics(self.adapter_path / "metrics.jsonl")

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        from .loading import load

        # Without a step, an adapter in the folder is that of an earlier run.
        return load(self.config.model_dir, self.adapter_path if self.steps else None)

    @property
    def model(self) -> nn.Module:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    def plot(self) -> Figure:
        """Returns a matplotlib figure that plots the training loss and the validation loss against
        the step."""
        from .hub import title
        from .objectives import OBJECTIVES
        from .training.curves import figure_of, points

        name, unit = title(self.config.model_dir), OBJECTIVES[self.config.method].unit
        return figure_of(points(self.history), name, unit)

    @property
    def _facts(self) -> dict[str, str]:
        state = "interrupted" if self.interrupted else "stopped early" if self.stopped_early else ""
        facts = {"steps": f"{self.steps}{state and f' ({state})'}"}
        if self.final_train_loss is not None:
            facts["training loss"] = f"{self.final_train_loss:.4f}"
        if self.final_val_loss is not None:
            facts["validation loss"] = f"{self.first_val_loss:.4f} → {self.final_val_loss:.4f}"
        if self.final_val_accuracy is not None:
            facts["accuracy"] = f"{self.first_val_accuracy:.1%} → {self.final_val_accuracy:.1%}"
        facts["speed"] = events.speed(dataclasses.asdict(self))
        facts["peak memory"] = f"{self.peak_gb:.2f} GB"
        return {**facts, "adapter": str(self.adapter_path)}

    def __repr__(self) -> str:
        return f"TrainResult({', '.join(f'{name}: {x}' for name, x in self._facts.items())})"

    def _repr_html_(self) -> str:
        from html import escape
        from io import StringIO

        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th>"
            f"<td style='text-align:left'>{escape(text)}</td></tr>"
            for name, text in self._facts.items()
        )
        drawn = StringIO()
        if self.history:
            self.plot().savefig(drawn, format="svg", metadata={"Date": None})
        svg = drawn.getvalue()
        return f"<table>{rows}</table>{svg[svg.find('<svg') :] if svg else ''}"


def train(
    config: TrainConfig | None = None,
    on_event: events.OnEvent | None = None,
    *,
    model: Any = None,
    data: Any = None,
    train_data: Any = None,
    valid_data: Any = None,
    score: Score | None = None,
    on_step: Callback | None = None,
    on_eval: Callback | None = None,
    rewards: Sequence[str | Function] | None = None,
    environment: str | Callable[[], Any] | None = None,
    progress: bool | None = None,
    **fields: Any,
) -> TrainResult:
    """Trains an adapter, writes it to `adapter_path`, and returns the result of the run.

        train(model="org/name", data="rows.csv", adapter="out", lr=1e-4, epochs=3)

    Fields of TrainConfig can be passed as keyword arguments, instead of `config` or in addition to
    it. Each keyword is the name of a field (`learning_rate`) or of its command-line flag without
    the dashes (`lr`). `model` is a folder, a name on the hub, or a pair `(model, tokenizer)`, as
    returned by `load` and mlx_lm.load; for a pair, the result contains the same model with the
    adapter attached. `data` (or `train_data`) is a path, a name on the hub, or the rows themselves:
    a list or an iterator of dicts, a `datasets.Dataset` or `DatasetDict`, or an Arrow, pandas or
    polars table. `valid_data` provides the validation rows in any of these forms.

    `on_event` receives the events of the run (mlx_segtrain.events). Without it, terminals and
    notebooks show a progress bar; `progress` turns the bar on or off. `on_step` and `on_eval`
    receive the metrics of every training step and every evaluation, respectively, as a dict; if
    either returns True, the run saves its state and ends. `score(model, tokenizer)` is called at
    every evaluation and must return a number or a dict of numbers. For method grpo, each item of
    `rewards` is either a function that scores completions, or the name of a check as in the field
    `rewards`; `environment` is a class, or a string as in the field `environment` (docs/grpo.md).

    After Ctrl-C, the last finished step is saved, and the result is marked as `interrupted`;
    `resume=True` continues such a run. If an input cannot be used, raises InputError before
    anything is written. If the run cannot continue, raises RunError after the last good step has
    been saved.
    """
    with _python_words():
        loaded = tokenizer = None
        if isinstance(model, tuple):
            loaded, tokenizer, fields = _given(model, config, fields)
        elif model is not None:
            fields["model_dir"] = model
        if isinstance(data, str | Path):
            fields["data_dir"] = data
        elif data is not None:
            if train_data is not None:
                raise InputError("data and train_data are both given: leave one of them out.")
            train_data = data
        functions, fields = _functions(rewards, fields)
        made = environment if callable(environment) else None
        if made is not None:
            name = getattr(made, "__name__", "environment")
            environment = f"{getattr(made, '__module__', 'python')}:{name}"
        if environment is not None:
            fields["environment"] = environment
        config = _config(config, fields)
        with _shown(on_event, on_step, progress) as (tell, step):
            found = training.train(
                config,
                tell,
                train_data=train_data,
                valid_data=valid_data,
                score=score,
                on_step=step,
                on_eval=on_eval,
                model=loaded,
                rewards=functions,
                environment=made,
            )
    own = {x.name: getattr(found, x.name) for x in dataclasses.fields(found)}
    result = TrainResult(**own)
    vars(result)["config"] = config
    if loaded is not None:
        vars(result)["_loaded"] = _with_adapter(loaded, result), tokenizer
    return result


def _functions(
    rewards: Sequence[str | Function] | None, fields: dict[str, Any]
) -> tuple[list[Function], dict[str, Any]]:
    """Separates the functions in `rewards` from the names of checks. Returns the functions, and
    `fields` with the names added as the field `rewards`."""
    if rewards is None:
        return [], fields
    if not isinstance(rewards, list | tuple):  # the configuration will report the error
        return [], {**fields, "rewards": rewards}
    functions = [own for own in rewards if callable(own)]
    checks = [own for own in rewards if not callable(own)]
    return functions, fields if functions and not checks else {**fields, "rewards": checks}


def _config(config: TrainConfig | None, fields: Mapping[str, Any]) -> TrainConfig:
    """Returns the configuration, updated with these fields. Raises InputError in the same cases as
    the command line."""
    if config is not None and not fields:
        return config
    given = {} if config is None else config.model_dump(exclude_unset=True)
    for name, value in fields.items():
        field = SHORT.get(name, name)
        if field != name and field in fields:
            raise InputError(f"{name} and {field} name the same field: set only one of them.")
        given[field] = value
    return load_config(None, given, OUTPUT)


def _given(
    pair: tuple[Any, ...], config: TrainConfig | None, fields: dict[str, Any]
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Returns the model and the tokenizer in `pair`, and `fields` with the model's folder added.
    Detaches the model's adapter, if there is one."""
    import mlx.core as mx
    import mlx.nn as nn

    from .lora import unwrap

    if len(pair) != 2 or not isinstance(pair[0], nn.Module):
        raise InputError(
            "model is not a tuple (model, tokenizer): pass the two values that load returns."
        )
    model, tokenizer = pair
    if "model_dir" not in fields:
        folder = Path(str(getattr(tokenizer, "name_or_path", "")))
        if (folder / "config.json").is_file():
            fields = {**fields, "model_dir": folder}
        elif config is None:
            raise InputError(
                "model_dir is missing: the tokenizer does not say which folder it was loaded from, "
                "so pass model_dir as well."
            )
    unwrap(model)
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)  # `load` does the same
    model.train()
    return model, tokenizer, fields


def _with_adapter(model: nn.Module, result: TrainResult) -> nn.Module:
    from .adapters import WEIGHTS, read_adapter
    from .models import chain_of
    from .models.adapting import attach

    if result.steps and (result.adapter_path / WEIGHTS).exists():
        chain = chain_of(model)
        attach(model, chain, read_adapter(result.adapter_path, chain))
    model.eval()
    return model


@contextmanager
def _shown(
    on_event: events.OnEvent | None, on_step: Callback | None, progress: bool | None
) -> Iterator[tuple[events.OnEvent | None, Callback | None]]:
    """Yields the callbacks for events and for steps. If a progress bar is shown, the callbacks also
    update it."""
    from rich.console import Console

    from .commands.notebook import Notebook, in_notebook
    from .commands.terminal import Terminal
    from .training.ranks import launched

    console = Console(highlight=False)
    # With several ranks, only rank 0 shows the progress.
    seen = (in_notebook() or console.is_terminal) and not launched()
    if progress is False or (progress is None and (on_event is not None or not seen)):
        yield on_event, on_step
        return
    with Notebook() if in_notebook() else Terminal(console) as show:

        def tell(event: events.Event) -> None:
            show(event)
            if on_event is not None:
                on_event(event)

        def step(event: events.Event) -> Any:
            show.step(event)
            return on_step and on_step(event)

        yield tell, step


@contextmanager
def _python_words() -> Iterator[None]:
    """Rewrites errors in this context so that they name keyword arguments instead of flags."""
    try:
        yield
    except (InputError, RunError) as error:
        said = str(error)
        for name, facets in FACETS.items():
            short = next((own for own, field in SHORT.items() if field == name), name)
            said = said.replace(f"set it in the YAML file or with {flag(name)}", f"pass {short}=…")
            for own in (flag(name), *facets.aliases):
                switch = TrainConfig.model_fields[name].default is False
                said = said.replace(f"{own} auto,", f'{name}="auto",')
                word = f"{name}=True" if switch else name
                said = re.sub(rf"(?<!\w){own}(?![\w-])", word, said)
        if said == str(error):
            raise
        error.args = (said,)
        raise
