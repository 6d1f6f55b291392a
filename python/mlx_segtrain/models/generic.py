"""The generic path, for mlx-lm models that have a list of layers but belong to no fast family: the
layers are the stages, and LoRA updates are added to their linear layers.

A stage runs the model's own `__call__` up to the stage's layer. The earlier layers are replaced
with stand-ins that return the stage's input. Therefore masks, embeddings and any computation
between two layers come from the model's own code. Before training, the chain is compared with the
model on a few tokens. This comparison shows whether layers share anything except h, such as the
keys of another layer.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .. import lora
from ..errors import InputError, reason
from ..lora import EMBEDDINGS
from ..schedule import Stage
from ..streams import Stream
from .chain import NO_UPDATES, Chain, Head, Updates

#: The number of tokens in the comparison, and the maximum relative errors in float32 and in half
#: precision.
TRIED, FLOAT_BOUND, HALF_BOUND = 12, 1e-3, 5e-2


class _Stop(Exception):
    """Raised to stop a forward pass of the model at a given layer. Its `args` are the positional
    and keyword arguments with which that layer was called."""


class _StandIn:
    """Replaces a layer. It has the same class and attributes, but calls `answer` when it is
    called."""

    def __init__(self, layer: nn.Module, answer: Callable[..., mx.array]):
        self._layer, self._answer = layer, answer

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._answer(*args, **kwargs)

    @property
    def __class__(self) -> Any:
        return type(self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __getitem__(self, name: str) -> Any:
        return self._layer[name]


@dataclass(frozen=True)
class _Body:
    """A model and the list of its layers, whose path in the model is `path`. `kind` is the name of
    the model in messages."""

    kind: str
    model: nn.Module
    path: str
    layers: list[nn.Module]

    def run(self, tokens: mx.array, answers: Mapping[int, Callable[..., mx.array]]) -> mx.array:
        """Runs the model on tokens, with each layer replaced by the function in `answers` for the
        layer's index. A layer without a function in `answers` returns its first argument."""

        def first(*args: Any, **kwargs: Any) -> Any:
            return [*args, *kwargs.values()][0]

        whole = list(self.layers)
        shown: Any = [_StandIn(layer, answers.get(i, first)) for i, layer in enumerate(whole)]
        try:
            self.layers[:] = shown
            return self.model(tokens)
        finally:
            self.layers[:] = whole

    def layer(self, i: int, tokens: mx.array, h: mx.array | None) -> mx.array:
        """Runs layer i on h, the output of the previous layer. For the first layer, h is None."""

        def stop(*args: Any, **kwargs: Any) -> mx.array:
            raise _Stop(args, kwargs)

        answers: dict[int, Any] = {} if h is None else dict.fromkeys(range(i), lambda *_, **__: h)
        answers[i] = stop
        try:
            self.run(tokens, answers)
        except _Stop as call:
            args, kwargs = call.args
            return self.layers[i](*args, **kwargs)
        raise InputError(f"{self.kind} cannot be trained: {self.path}.{i} is never called.")

    def logits(self, tokens: mx.array, h: mx.array) -> mx.array:
        """Returns the model's logits for h [B, T, H], the output of the last layer."""
        return self.run(tokens, dict.fromkeys(range(len(self.layers)), lambda *_, **__: h))


@dataclass(frozen=True)
class _Head(Head):
    """The head of a model. It runs the model's own code from h to the logits."""

    body: _Body
    path: str
    module: lora.LoRALinear | None = None  #: replaces the module at `path`
    updates: Updates = NO_UPDATES

    def adapting(self, updates: Updates) -> "_Head":
        if self.path not in updates.scales:
            return self
        module = lora.wrap(self.body.model, self.path, updates.scales[self.path])
        return replace(self, module=module, updates=updates)

    def logits_of(self, params: Mapping[str, mx.array], h: mx.array, begin: int) -> mx.array:
        flat = h.reshape(1, -1, h.shape[-1])
        modules = {self.path: self.module} if self.module else {}
        updates = replace(self.updates, stream=Stream(f"rows {begin}"))
        with _attached(modules, params, updates):
            z = self.body.logits(mx.zeros(flat.shape[:2], mx.int32), flat)
        return z.reshape(*h.shape[:-1], -1)


@contextmanager
def _attached(
    modules: Mapping[str, lora.LoRALinear],
    params: Mapping[str, mx.array],
    updates: Updates,
) -> Iterator[None]:
    """Assigns the factors in `params` to the modules while the context is active."""
    for path, module in modules.items():
        for tensor in lora.ARRAYS:
            if f"{path}.{tensor}" in params:
                setattr(module, tensor, params[f"{path}.{tensor}"])
        if updates.dropout:
            module.dropout = updates.dropout.rate
            module.key = updates.key(path)
    try:
        yield
    finally:  # the modules outlive this trace and must not keep its arrays
        for module in modules.values():
            module.clear()


def chain_of(model: Any, layers: range | None = None) -> Chain:
    """Returns the chain of a model. Raises InputError if the model cannot be split into layers or
    cannot be differentiated; the message names the layer and the reason.

    If `layers` is given, only these layers are checked, because the weights of the others have not
    been read.
    """
    body = _body(model)
    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    names = [f"{body.path}.{i}" for i in range(len(body.layers))]
    linears, stage_of = {}, {}
    for name, layer in zip(names, body.layers, strict=True):
        own = {f"{name}.{p}": m for p, m in layer.named_modules() if isinstance(m, kinds)}
        linears |= own
        stage_of |= dict.fromkeys(own, name)
    vocabulary = _try(body) if layers is None else _try_part(body, layers)
    # The token embedding and the linear layer of the head, if they are modules.
    outer: dict[str, nn.Module] = {
        path: module
        for path, module in body.model.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear, *EMBEDDINGS))
        and not path.startswith(f"{body.path}.")
        and module.weight.shape[0] == vocabulary
    }
    embeddings = [path for path, module in outer.items() if isinstance(module, EMBEDDINGS)]
    heads = [path for path in outer if path not in embeddings]
    stage_of |= {**dict.fromkeys(embeddings, names[0]), **dict.fromkeys(heads, "head")}

    def stages_of(updates: Updates) -> list[Stage]:
        return [_stage(body, i, updates, embeddings) for i in range(len(names))]

    return Chain(
        start=lambda tokens: {"tokens": tokens},
        stages_of=stages_of,
        head=_Head(body, next(iter([*heads, *embeddings]), "")),
        linears=linears,
        stage_of=stage_of,
        layers=[[name] for name in names],
        max_length=getattr(getattr(model, "args", None), "max_position_embeddings", None),
        outer=outer,
    )


def _body(model: Any) -> _Body:
    name = getattr(model, "model_type", type(model).__module__.rsplit(".", 1)[-1])
    kind = f"Model type '{name}'"
    known = getattr(model, "layers", None)
    if not isinstance(known, list) or not known or not all(isinstance(x, nn.Module) for x in known):
        raise InputError(f"{kind} cannot be trained: it has no list of layers.")
    for path, module in model.named_modules():
        for name, child in module.items():
            if isinstance(child, list) and len(child) == len(known) and child[0] is known[0]:
                return _Body(kind, model, f"{path}.{name}" if path else name, child)
    raise InputError(f"{kind} cannot be trained: its layers are in more than one list.")


def _stage(body: _Body, i: int, updates: Updates, outer: Collection[str]) -> Stage:
    """Returns the stage of layer i. The first stage includes the embeddings, whose paths are in
    `outer`."""
    name = f"{body.path}.{i}"
    adapted = {
        path: lora.wrap(body.model, path, scale)
        for path, scale in updates.scales.items()
        if path.startswith(f"{name}.") or (i == 0 and path in outer)
    }

    def forward(params: Mapping[str, mx.array], tokens: mx.array, *h: mx.array) -> mx.array:
        with _attached(adapted, params, updates):
            return body.layer(i, tokens, *(h or (None,)))

    of = updates.stream.of
    reads = (of("tokens"), of("h")) if i else (of("tokens"),)
    return Stage(of(name), forward, reads, (of("h"),), owner=name)


def _try(body: _Body) -> int:
    """Runs the chain and its backward pass on a few tokens, and returns the size of the vocabulary.

    Raises InputError if that fails.
    """
    refused = f"{body.kind} cannot be trained:"
    tokens = mx.arange(TRIED)[None] + 1
    try:
        body.model.freeze()
        body.model.train()  # in this mode, stateful layers avoid kernels without a gradient
        expected = body.model(tokens).astype(mx.float32)
    except Exception as error:
        raise InputError(
            f"{refused} its forward pass fails with the error {reason(error, 2000)}"
        ) from error
    h = _through(body, range(len(body.layers)), tokens, None, refused)
    _check_close(refused, body.logits(tokens, h), expected, "logits", h.dtype)
    return expected.shape[-1]


def _through(
    body: _Body, layers: range, tokens: mx.array, h: mx.array | None, refused: str
) -> mx.array:
    """Runs these layers in sequence, starting with h, and returns the output of the last layer.

    Raises InputError for a layer that does not return a single array [B, T, H], or that cannot be
    differentiated.
    """
    for i in layers:
        where = f"{refused} {body.path}.{i} ({type(body.layers[i]).__name__})"
        try:
            y = body.layer(i, tokens, h)
            if not isinstance(y, mx.array) or y.ndim != 3 or y.shape[:2] != tokens.shape:
                raise InputError(f"{where} does not return a single array of shape [B, T, H].")
            if h is not None:
                mx.eval(mx.vjp(functools.partial(body.layer, i, tokens), [h], [mx.ones_like(y)]))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{where} cannot be differentiated: {reason(error, 2000)}") from error
        h = y
    assert h is not None
    return h


def _check_close(
    refused: str, got: mx.array, expected: mx.array, what: str, dtype: mx.Dtype | None = None
) -> None:
    """Raises InputError if running a model layer by layer in this dtype gives different results
    than running it as a whole."""
    bound = FLOAT_BOUND if (dtype or got.dtype) == mx.float32 else HALF_BOUND
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    far = float(mx.linalg.norm(got - expected) / mx.linalg.norm(expected))
    if not far < bound:
        raise InputError(
            f"{refused} when run layer by layer, it returns different {what} (relative L2 error "
            f"{far:.1g}), so its layers appear to share more than the hidden state."
        )


def _try_part(body: _Body, layers: range) -> int:
    """Performs the checks of `_try` on a model in which only these layers are loaded. Compares the
    output of these layers with their output when the whole model runs and the earlier layers return
    random values. The output must not depend on the random values except through h."""
    refused = f"{body.kind} cannot be trained:"
    tokens = mx.arange(TRIED)[None] + 1
    body.model.freeze()
    body.model.train()
    try:  # these graphs are not evaluated
        vocabulary = body.model(tokens).shape[-1]
        like = body.layer(0, tokens, None)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{refused} its forward pass fails with the error {reason(error, 2000)}"
        ) from error

    def given(seed: int) -> mx.array:
        return mx.random.normal(like.shape, key=mx.random.key(seed)).astype(like.dtype)

    def together(seed: int) -> mx.array:
        """Runs the whole model, with random values as the outputs of the earlier layers, and
        returns the output of these layers. The random values depend on the seed, except for the
        output of the last earlier layer, which is the same for every seed."""
        answers: dict[int, Callable[..., mx.array]] = {}
        for i in range(layers.start):
            own = given(0 if i == layers.start - 1 else seed + i)
            answers[i] = lambda *_, own=own, **__: own
        real: dict[int, Any] = {i: body.layers[i] for i in layers}
        seen: list[mx.array] = []

        def last(*args: Any, **kwargs: Any) -> mx.array:
            seen.append(real[layers.stop - 1](*args, **kwargs))
            raise _Stop

        with suppress(_Stop):
            body.run(tokens, {**answers, **real, layers.stop - 1: last})
        return seen[0]

    h = _through(body, layers, tokens, given(0) if layers.start else None, refused)
    for seed in (1, 1001):
        _check_close(refused, h, together(seed), "hidden states")
    return vocabulary
