"""A base model, mounted adapters, and the updates in the base's linear layers.

Functions that create arrays must be called on the engine's thread.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ... import lora
from ...adapters import prompting_of, read_adapter
from ...adapters.merging import merged
from ...adapters.reading import stored_bytes
from ...adapters.writing import common_scale
from ...data import Prompting
from ...errors import InputError
from ...hub import title
from ...lora.folder import CONFIG, PEFT_WEIGHTS, UNPADDED, WEIGHTS, open_folder
from ...models import Chain, chain_of, load_base
from ...models.tables import tables_of
from ..confined.parent import Confined, Limits
from .grammars import Grammars

#: Maximum number of tokens in a prompt if the model's context length is not known.
MOST_TOKENS = 1 << 20
#: Maximum size, in bytes, of the cached sums of adapters. The most recent sum is cached even if
#: it is larger.
MOST_SUM_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded model. `created` is a time in seconds since 1970. `max_length` is the context
    length in tokens, or None if it is not known."""

    id: str
    path: Path
    created: int
    tokenizer: Any
    max_length: int | None
    vocabulary: int  #: number of rows of the token embedding
    logits: int  #: number of rows of the head
    model: Any
    chain: Chain
    #: The layers that can have updates, by path. The embedding and the head are added when needed.
    modules: dict[str, lora.LoRALinear]
    confined: Confined  #: the processes that run the model's tokenizer and chat template
    grammars: Grammars  #: compiles grammars for the model's tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text that is not a chat, including the tokenizer's special
        tokens."""
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise InputError(
                "the prompt contains a lone surrogate (half of a character): send valid text."
            )
        what = f"prompt: the tokenizer of {self.id}"
        return self.tokens("encode", what, len(text), text=text)

    def tokens(self, op: str, what: str, size: int, **values: Any) -> list[int]:
        """Returns the tokens of a text of `size` characters, computed by a tokenizer process.
        Raises InputError if tokenization fails, or if the tokens exceed the model's context
        length."""
        most = MOST_TOKENS if self.max_length is None else self.max_length
        found = self.confined.ask(op, Limits.of_prompt(size), what, most=most, **values)
        if isinstance(found, int):
            raise _too_long(found, most, self.id)
        return found

    def check(self, prompt: Sequence[int], logit_bias: Mapping[int, float]) -> None:
        """Raises InputError if the prompt is empty or too long, or if the prompt or the biases
        contain unknown tokens."""
        if not prompt:
            raise InputError("the prompt has no tokens: add some text.")
        if self.max_length is not None and len(prompt) > self.max_length:
            raise _too_long(len(prompt), self.max_length, self.id)
        known = (("prompt", prompt, self.vocabulary), ("logit_bias", logit_bias, self.logits))
        for name, tokens, n in known:
            if tokens and (min(tokens) < 0 or max(tokens) >= n):
                wrong, last = next(x for x in tokens if not 0 <= x < n), n - 1
                raise InputError(
                    f"{name}: {wrong} is not a token id of {self.id}: use 0 to {last}."
                )


@dataclass(frozen=True, eq=False)
class Mounted:
    """An adapter in memory. `rank` is its largest rank, and `scale` is the multiplier of most of
    its layers."""

    id: str
    path: Path
    rank: int
    scale: float
    size_bytes: int
    mounted_layers: int
    adapter: lora.Adapter
    prompting: Prompting  #: how prompts were rendered in training
    state: tuple[Any, ...]  #: the state of its files when they were read (state_of)
    #: A number that is never used for another adapter.
    serial: int = field(default_factory=count().__next__, init=False)


@dataclass(frozen=True, eq=False)
class Selected:
    """The base model and the adapters of a request. Unmounting an adapter does not affect the
    request."""

    base: Base
    adapters: tuple[Mounted, ...] = ()

    @property
    def id(self) -> str | None:
        return "+".join(mounted.id for mounted in self.adapters) or None

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
    ) -> list[int]:
        """Returns the tokens of a chat, including the generation prompt. The template's `variables`
        replace the values with which the adapters were trained.

        Raises InputError if there is no template, if the template fails or does not support tools,
        or if several adapters were trained with different variables.
        """
        base, given = self.base, dict(variables or {})
        found: dict[str, Any] = {}
        for mounted in self.adapters:
            for name, value in mounted.prompting.variables.items():
                if name not in given and found.setdefault(name, value) != value:
                    raise InputError(
                        f"chat_template_kwargs: the adapters {self.id} were trained with different "
                        f"values of {name}: set a value in the request."
                    )
        if not base.tokenizer.has_chat_template:
            raise InputError(
                f"messages: {base.id} has no chat template: use /v1/completions with a prompt."
            )
        if tools and "tools" not in str(base.tokenizer.chat_template):
            raise InputError(
                f"tools: the chat template of {base.id} does not support tools: leave them out."
            )
        own = {"tools": list(tools)} if tools else {}
        how = {"messages": list(messages), "variables": {**found, **given, **own}}
        size = sum(len(message["content"]) for message in messages)
        size += len(json.dumps(how["variables"]))
        size += sum(len(json.dumps(x["tool_calls"])) for x in messages if "tool_calls" in x)
        return base.tokens("chat", f"messages: the chat template of {base.id}", size, **how)

    @property
    def key(self) -> tuple[int, ...]:
        return tuple(mounted.serial for mounted in self.adapters)


#: Labels in /metrics for requests without an adapter, with several adapters, and with an adapter
#: that has been unmounted.
RESERVED = NONE, STACK, GONE = "none", "stack", "unmounted"


#: Maximum length of an adapter's id, in characters.
LONGEST_ID = 200


def names_base(base: Base, model: str | None) -> bool:
    """Returns whether a request's `model` names the base model."""
    if model is None or model == str(base.path):
        return True
    return model.lower() in (base.id.lower(), base.id.rsplit("/", 1)[-1].lower(), "default")


def check_id(id: str, base: Base | None) -> None:
    """Raises InputError if `id` cannot be the id of an adapter of this base model."""
    if not id.strip(".") or id != id.strip() or id.lower() in RESERVED:
        raise InputError(f"id: {id!r} is not a valid adapter id: choose another id.")
    if not all(map(_fits_id, id)) or len(id) > LONGEST_ID:
        raise InputError(
            f"id: {id[:LONGEST_ID]!r} is not a valid adapter id: leave out '+', ',', '/' and "
            f"control characters, and use at most {LONGEST_ID} characters."
        )
    if base is not None and names_base(base, id):
        raise InputError(f"id: {id!r} is a name of the base model: choose another id.")


def id_of(path: Path, base: Base, taken: Container[str] = ()) -> str:
    """Returns a valid id for an adapter that is not in `taken`. The id is the name of the adapter's
    folder if possible."""
    chars = (char if _fits_id(char) else "-" for char in path.name)
    name = "".join(chars)[: LONGEST_ID - 20].strip()
    while not name.strip(".") or name.lower() in RESERVED or names_base(base, name):
        name = f"adapter-{name}"
    ids = (name if n == 1 else f"{name}-{n}" for n in count(1))
    return next(id for id in ids if id not in taken and not names_base(base, id))


def _fits_id(char: str) -> bool:
    return char.isprintable() and char not in "+,/"


def _too_long(n: int, most: int, id: str) -> InputError:
    return InputError(
        f"the prompt has {n} tokens, but the context length of {id} is {most}: shorten the prompt."
    )


def read_base(path: Path, confined: Confined) -> Base:
    """Loads a model whose tokenizer `confined` has already loaded. Raises InputError if the model
    cannot be loaded."""
    model, _, tokenizer = load_base(path)
    tables = tables_of(model)
    if tables.logits > tables.tokens:  # a sampled token could not be embedded
        raise InputError(
            f"the output head of {path} has {tables.logits} rows, but the embedding has "
            f"{tables.tokens}: the weights are inconsistent."
        )
    chain = chain_of(model)
    # On a CPU, the embedding and the head are always wrapped, because our op computes the head
    # several times faster than MLX's op (bench/LOG.md, 2026-12-01).
    always = chain.linears if lora.few(1) else chain.adaptable
    modules = {name: lora.wrap(model, name, 1.0) for name in always}
    model.eval()
    lengths = [n for n in (chain.max_length, tables.positions) if n is not None]
    return Base(
        id=title(path),
        path=path,
        created=int(time.time()),
        tokenizer=tokenizer,
        max_length=min(lengths, default=None),
        vocabulary=tables.tokens,
        logits=tables.logits,
        model=model,
        chain=chain,
        modules=modules,
        confined=confined,
        grammars=Grammars(tokenizer, tables.logits),
    )


def state_of(path: Path) -> tuple[Any, ...]:
    """Returns values that change if the files of an adapter are written or replaced."""
    found = []
    for name in (WEIGHTS, UNPADDED, PEFT_WEIGHTS, CONFIG):
        with suppress(OSError):
            facts = (path / name).stat()
            found.append((name, facts.st_ino, facts.st_mtime_ns, facts.st_size))
    return tuple(found)


def read_mounted(id: str, path: Path, base: Base, most: int | None = None) -> Mounted:
    """Loads an adapter. Raises InputError if it does not fit the base model, or needs more than
    `most` bytes."""
    state, folder = state_of(path), open_folder(path)  # the state is older than what is read
    needed = stored_bytes(folder)  # from the header, since a sparse file takes less space on disk
    if most is not None and needed > most:
        raise InputError(
            f"{path} needs {needed / 1e9:.1f} GB of memory, but only {most / 1e9:.1f} GB is left "
            "for adapters: unmount some adapters."
        )
    adapter = read_adapter(folder, base.chain)
    arrays = adapter.all_arrays()
    mx.eval(arrays)
    return Mounted(
        id=id,
        path=path,
        rank=max(adapter.ranks.values()),
        scale=common_scale(adapter),
        size_bytes=sum(x.nbytes for x in arrays),
        mounted_layers=len(adapter.tensors),
        adapter=adapter,
        prompting=prompting_of(path),
        state=state,
    )


class Linears:
    """Keeps track of which updates are in the linear layers of a base model."""

    def __init__(self) -> None:
        self.key: tuple[int, ...] | None = None  #: Selected.key of the current updates
        self._touched: set[str] = set()  # paths of linear layers with an update
        self._sums: OrderedDict[tuple[int, ...], lora.Adapter] = OrderedDict()

    def put_in(self, selected: Selected) -> None:
        """Puts a request's updates into the base's linear layers, unless they are already there.
        Computes nothing except the sum of several adapters, which is cached."""
        if selected.key == self.key:
            return
        adapter, base = self.sum_of(selected.adapters), selected.base
        outer = base.chain.outer if lora.few(1) else {}  # on a CPU, they stay wrapped
        self.key = None  # unknown until all layers have their updates
        for path in self._touched - adapter.tensors.keys():
            base.modules[path].take_out()
            if path in outer:
                base.model.update_modules(tree_unflatten([(path, outer[path])]))
        self._touched |= adapter.tensors.keys()
        for path in adapter.tensors:
            module = base.modules.get(path)
            if module is None:
                module = base.modules[path] = lora.wrap(base.model, path, 1.0)
            elif path in outer:
                base.model.update_modules(tree_unflatten([(path, module)]))
            module.put_in(adapter.arrays(path), adapter.scales[path])
        self._touched = set(adapter.tensors)
        self.key = selected.key

    def take_out(self, base: Base, known: Set[str]) -> None:
        """Removes all updates if any layer besides those in `known` has an update."""
        if not self._touched <= known:
            self.put_in(Selected(base))

    def forget(self, mounted: Mounted, base: Base) -> None:
        """Frees the arrays of an unmounted adapter, which would otherwise stay in memory until the
        next request."""
        for key in [key for key in self._sums if mounted.serial in key]:
            del self._sums[key]
        if self.key and mounted.serial in self.key:
            self.put_in(Selected(base))
        for module in base.modules.values():
            module.forget_casts()

    def drop_sums(self) -> None:
        """Frees the cached sums."""
        self._sums.clear()

    def sum_of(self, adapters: tuple[Mounted, ...]) -> lora.Adapter:
        """Returns the sum of the updates of these adapters. If there are several, the sum is
        cached."""
        if len(adapters) < 2:
            return adapters[0].adapter if adapters else lora.Adapter({}, {})
        # Sorted, so that the cached sum is found regardless of the order of the adapters.
        own = sorted(adapters, key=lambda mounted: mounted.id)
        key = tuple(mounted.serial for mounted in own)
        if key not in self._sums:
            total = merged([mounted.adapter for mounted in own], [1.0] * len(own))
            mx.eval(total.tensors)
            self._sums[key] = total
            while len(self._sums) > 1 and sum(map(_bytes, self._sums.values())) > MOST_SUM_BYTES:
                self._sums.popitem(last=False)
        self._sums.move_to_end(key)
        return self._sums[key]


def _bytes(adapter: lora.Adapter) -> int:
    return sum(x.nbytes for x in adapter.all_arrays())
