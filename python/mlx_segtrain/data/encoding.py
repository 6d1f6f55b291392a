"""Converts pieces of text into token ids, with a loss weight for each token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np

from ..config import ROWS, TrainConfig
from ..errors import InputError
from .chat import Conversations, Sample
from .lossless import lossless
from .notes import Notes
from .prompting import Prompting
from .template import Tokenizer, prompt_ids
from .words import Words


@dataclass(frozen=True)
class Options:
    """Options for reading rows: fields of the configuration (docs/configuration.md), and `tools`,
    which are added to every prompt and must have the form that chat templates expect. If `method`
    is None, rows for any method are accepted."""

    max_seq_length: int = 512
    max_completion_tokens: int = 256
    method: str | None = "sft"
    train_on: str = "assistant"
    append_eos: bool = True
    prompt_format: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    data_format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    val_split: float | Literal["auto"] = "auto"
    dedup: bool = False
    seed: int = 0
    tools: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, config: TrainConfig, tools: Sequence[Mapping[str, Any]] = ()) -> "Options":
        names = [own.name for own in fields(cls) if own.name != "tools"]
        return cls(**{name: getattr(config, name) for name in names}, tools=tools)

    @property
    def format(self) -> str:
        """The format of all rows, or auto. Methods that train on prompts read rows as prompts,
        whatever other keys the rows have, unless `data_format` is set."""
        prompts = self.method is not None and ROWS[self.method] == "prompt"
        return "prompt" if prompts and self.data_format == "auto" else self.data_format

    @property
    def labelled(self) -> bool:
        """Whether the method also learns from undesirable responses, whose weights are below 0."""
        return self.method is not None and ROWS[self.method] == "labelled"


@dataclass(frozen=True)
class Row:
    """One tokenized sequence.

    `ids` is int32 [n]. `weights` is float32 [n]: weights[j] is the loss weight of predicting token
    j. The weight is 0 for context and for j = 0, and below 0 in an undesirable response. `source`
    is "file:line", or, for the two sequences of a pair, "file:line chosen" and "file:line
    rejected". `findings` contains keys of notes.FINDINGS, and `turns` counts the turns in the loss.
    `reference` contains the outputs of the model without the adapter, and is None until they are
    computed. If completions are generated for the sequence, `given` is the row in the file, which
    is passed to reward functions. For a completion in the loss, `numbers` maps names to float32 [n]
    arrays that the loss uses in addition to the weights.
    """

    ids: np.ndarray
    weights: np.ndarray
    source: str
    findings: tuple[str, ...] = ()
    reference: tuple[float, ...] | None = None
    turns: int = 1
    given: Mapping[str, Any] | None = None
    numbers: Mapping[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pair:
    """A prompt with two responses, as two whole sequences. The weights are 1 on response tokens.

    The first `shared` tokens are the same in both sequences. The last two tokens of each sequence
    are never shared, so that the model always has tokens of both sequences to process. `source` is
    "file:line". `reference` contains the log-probabilities of the responses (chosen, rejected)
    under the model without the adapter, and is None until they are computed.
    """

    chosen: Row
    rejected: Row
    shared: int
    source: str
    reference: tuple[float, ...] | None = None

    @classmethod
    def of(cls, chosen: Row, rejected: Row, source: str) -> "Pair":
        """Creates a pair from two rows, and computes `shared` from them."""
        n = min(len(chosen), len(rejected))
        differ = np.flatnonzero(chosen.ids[:n] != rejected.ids[:n])
        shared = min(int(differ[0]) if differ.size else n, n - 2)
        return cls(chosen, rejected, max(shared, 0), source)

    def __len__(self) -> int:
        """Returns the number of tokens that the model processes."""
        return len(self.chosen) + len(self.rejected) - self.shared


def sequences(row: Row | Pair) -> tuple[Row, ...]:
    """Returns the token sequences of a row."""
    return (row.chosen, row.rejected) if isinstance(row, Pair) else (row,)


class Encoder:
    """Tokenizes samples.

    `has_template` is whether the tokenizer has a chat template, and `raw` is true if plain prompts
    bypass it. `chats` splits conversations into samples, and `train_on` selects the turns that are
    in the loss. `responses` does the same, but always puts all assistant turns in the loss. `notes`
    counts the rows that were read; `bos` contains the tokens that the tokenizer adds before a text.
    """

    def __init__(self, tokenizer: Tokenizer, options: Options):
        self._wrapper = tokenizer
        self._tokenizer = tokenizer._tokenizer  # the wrapper itself cannot be called on a batch
        self.options = options
        self.has_template = tokenizer.has_chat_template
        self.raw = Prompting(options.prompt_format).is_raw(tokenizer)
        how = (options.chat_template_kwargs, options.append_eos)
        self.chats = Conversations(tokenizer, options.train_on, *how)
        self.responses = Conversations(tokenizer, "assistant", *how)
        self.notes = Notes()
        self._eos: set[int] = set(tokenizer.eos_token_ids)
        self.bos: list[int] = list(tokenizer.encode(""))
        while self.bos and self.bos[-1] in self._eos - {tokenizer.bos_token_id}:
            self.bos.pop()
        self._lossless = lossless(self._tokenizer)
        self._words = Words.of(self._tokenizer) if self._lossless else None
        self._is_blank = cache(lambda token: not self.decode([token]).strip())
        pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(pad_id for pad_id in pad_ids if pad_id is not None)

    def begins(self, ids: np.ndarray) -> bool:
        """Returns whether `ids` starts with the tokens that the tokenizer adds before a text."""
        return ids[: len(self.bos)].tolist() == self.bos

    def rows(self, samples: Sequence[Sample]) -> list[Row]:
        """Returns the token ids and weights of each sample, not truncated. Raises InputError."""
        # A single call tokenizes all pieces, and also the whole text of each sample whose tokens
        # cannot be derived from its pieces.
        texts = [text for sample in samples for text, _ in sample.pieces]
        n, wholes = len(texts), {}
        for i, sample in enumerate(samples):
            if len(sample.pieces) > 1 and not (self._lossless and self._lossless(sample.text)):
                wholes[i] = len(texts)
                texts.append(sample.text)
        encoded = self._encoded(texts)
        parts = iter(encoded[:n])
        return [
            self._row(
                sample,
                encoded[wholes[i]] if i in wholes else None,
                [next(parts) for _ in sample.pieces],
            )
            for i, sample in enumerate(samples)
        ]

    def prompt(self, source: str, given: Mapping[str, Any]) -> Row:
        """Returns the tokens of a prompt, including the generation prompt. None of them is in the
        loss. Raises InputError."""
        tools = given.get("tools") or self.options.tools
        own = {"tools": list(tools)} if tools else {}
        more = given.get("chat_template_kwargs") or {}
        variables = {**self.options.chat_template_kwargs, **more, **own}
        prompt = given["prompt"]
        try:
            if isinstance(prompt, str):
                self.notes.prompt_format = "raw" if self.raw else "chat"
                how = Prompting(self.notes.prompt_format, variables)
                ids = how.ids(self._wrapper, prompt, given.get("system"))
            elif self._wrapper.has_chat_template:
                ids = prompt_ids(self._wrapper, prompt, variables)
            else:
                raise InputError("the tokenizer has no chat template: use a string as the prompt.")
            if not len(ids):  # the first token would have no context
                raise InputError("the prompt has no tokens: add some text.")
        except Exception as error:  # a template may raise any exception
            raise InputError(f"{source}: {str(error) or type(error).__name__}") from error
        kept = {key: x for key, x in given.items() if x is not None}
        return Row(
            np.array(ids, np.int32), np.zeros(len(ids), np.float32), source, turns=0, given=kept
        )

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text, without BOS."""
        words = self._words
        if words is None:
            return self._by_library(texts)
        found = {i: words.ids(text) for i, text in enumerate(texts) if text.isascii()}
        others = [text for i, text in enumerate(texts) if i not in found]
        rest = iter(self._by_library(others) if others else ())
        return [found[i] if i in found else next(rest) for i in range(len(texts))]

    def _by_library(self, texts: list[str]) -> list[list[int]]:
        if self._lossless:
            # Call the Rust tokenizer directly. The call to `encode` in __init__ has already
            # disabled its truncation and padding.
            own = self._tokenizer.backend_tokenizer
            return [one.ids for one in own.encode_batch_fast(texts, add_special_tokens=False)]
        return self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _row(self, sample: Sample, whole: list[int] | None, parts: list[list[int]]) -> Row:
        ids, bounds = self._join(sample, whole, parts)
        weights, findings = np.zeros(len(ids), np.float32), sample.findings
        for (_, weight), (start, end) in zip(sample.pieces, pairwise(bounds), strict=True):
            weights[start:end] = weight
        if not sample.rendered:  # a chat template itself writes BOS and ends turns
            end, stopped = self._end(ids, bounds[-2])
            ids, weights = ids[:end], weights[:end]
            if self.options.append_eos and not stopped:
                eos = self._tokenizer.eos_token_id
                if eos is None:
                    raise InputError(
                        f"{sample.source}: the tokenizer has no end-of-sequence token to append to "
                        "the row; set append_eos to false."
                    )
                ids = [*ids, eos]
                weights = np.append(weights, np.float32(sample.pieces[-1][1]))
            elif not stopped and len(sample.pieces) > 1:  # a text without a prompt has no turns
                findings += ("stop",)
            if ids[: len(self.bos)] != self.bos:
                ids = self.bos + ids
                weights = np.append(np.zeros(len(self.bos), np.float32), weights)
        weights[:1] = 0  # the first token has no context from which to predict it
        return Row(
            np.array(ids, np.int32),
            weights,
            sample.source,
            findings,
            turns=sample.turns,
        )

    def _join(
        self, sample: Sample, whole: list[int] | None, parts: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        """Returns the token ids of a sample, and the indices of the tokens at which its pieces
        start and end. `whole` contains the tokens of the sample's text, or is None if the pieces
        are known to decode to that text."""
        joined = [token for part in parts for token in part]
        # If the pieces have the same tokens as the whole text, the boundaries are exact. If their
        # tokens differ but decode to the same text, a token of the whole text spans the end of a
        # piece. Generation starts from the tokens of the prompt alone, so training uses the tokens
        # of the pieces.
        if whole is None or joined == whole or self.decode(joined) == self.decode(whole):
            return joined, [0, *accumulate(len(part) for part in parts)]
        # Some tokenizers add a space before every text, so the pieces decode to more text than the
        # sample contains. In that case, character offsets are used: a token that contains any
        # character of a piece belongs to that piece.
        if not self._tokenizer.is_fast:
            raise InputError(
                f"{sample.source}: the first token in the loss cannot be located, because this "
                "tokenizer provides no character offsets; use its fast version (tokenizer.json)."
            )
        output = self._tokenizer(
            sample.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = np.array([end for _, end in output["offset_mapping"]])
        cuts = list(accumulate(len(piece) for piece, _ in sample.pieces))
        starts = np.searchsorted(np.maximum.accumulate(ends), [0, *cuts[:-1]], side="right")
        return output["input_ids"], [0, *map(int, starts[1:]), len(ends)]

    def _end(self, ids: list[int], start: int) -> tuple[int, bool]:
        """Returns the end of a completion that starts at `start`, and whether it ends with a token
        that stops generation. Whitespace after such a token is excluded, because it would never be
        generated."""
        last = len(ids)
        while last > start and self._is_blank(ids[last - 1]):
            last -= 1
        if last > start and ids[last - 1] in self._eos:
            return last, True
        return len(ids), False

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
