"""Text pieces to token ids, with the loss weight of every token."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_segtrain.data.chat import Conversations, Pieces, Sample
from mlx_segtrain.data.jsonl import FORMATS, Record
from mlx_segtrain.data.notes import Notes
from mlx_segtrain.data.prompting import Prompting
from mlx_segtrain.errors import InputError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_segtrain.config import TrainConfig


@dataclass(frozen=True)
class Options:
    """How rows are read: the fields of a configuration that decide it (docs/configuration.md).

    Without a method, rows of any.
    """

    max_seq_length: int = 512
    method: str | None = "sft"
    train_on: str = "assistant"
    append_eos: bool = True
    prompt_format: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    @classmethod
    def of(cls, config: "TrainConfig") -> "Options":
        return cls(**{own.name: getattr(config, own.name) for own in fields(cls)})


@dataclass(frozen=True)
class Row:
    """One tokenized sequence.

    `ids` is int32 [n]; `weights` float32 [n], where weights[j] is the loss weight of predicting
    token j (0 = context, and always 0 for j = 0); `source` is "file:line", of a pair's sequences
    "file:line chosen" and "file:line rejected"; `findings` are keys of notes.FINDINGS. `reference`
    is what the model gives for it without an adapter, once that is known.
    """

    ids: np.ndarray
    weights: np.ndarray
    source: str
    findings: tuple[str, ...] = ()
    reference: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pair:
    """A prompt with two responses, as two whole sequences; weights are 1 on response tokens.

    `shared` tokens at the beginning are the same, of each at most all but the last two: what
    follows has a row to run. `source` is "file:line". `reference` are the responses'
    log-probabilities (chosen, rejected) under the model without an adapter, once they are known.
    """

    chosen: Row
    rejected: Row
    shared: int
    source: str
    reference: tuple[float, ...] | None = None

    @classmethod
    def of(cls, chosen: Row, rejected: Row, source: str) -> "Pair":
        """With `shared` as it follows from the two."""
        n = min(len(chosen), len(rejected))
        differ = np.flatnonzero(chosen.ids[:n] != rejected.ids[:n])
        shared = min(int(differ[0]) if differ.size else n, n - 2)
        return cls(chosen, rejected, max(shared, 0), source)

    def __len__(self) -> int:
        """Tokens that are run."""
        return len(self.chosen) + len(self.rejected) - self.shared


class Encoder:
    """Tokenizes records; what it needs to know of the tokenizer is asked once.

    `notes` counts what was read.
    """

    def __init__(self, tokenizer: "TokenizerWrapper", options: Options):
        self._tokenizer = tokenizer._tokenizer  # the wrapper itself cannot be called on a batch
        self._append_eos = options.append_eos
        self._raw = Prompting(options.prompt_format).is_raw(tokenizer)
        how = (options.chat_template_kwargs, options.append_eos)
        self._chats = Conversations(tokenizer, options.train_on, *how)
        self._responses = Conversations(tokenizer, "assistant", *how)  # whose turns all count
        self.notes = Notes()
        self._eos: set[int] = set(tokenizer.eos_token_ids)
        # What the tokenizer puts before a text: BOS, for those that have one.
        self.bos: list[int] = list(tokenizer.encode(""))
        while self.bos and self.bos[-1] in self._eos - {tokenizer.bos_token_id}:
            self.bos.pop()
        self._blank: dict[tuple[int, ...], bool] = {}
        pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(pad_id for pad_id in pad_ids if pad_id is not None)

    def begins(self, ids: np.ndarray) -> bool:
        """Whether ids start with what the tokenizer puts before a text."""
        return ids[: len(self.bos)].tolist() == self.bos

    def encode(self, records: list[Record]) -> list[Row] | list[Pair]:
        """Token ids and weights of `records`, not truncated; raises InputError."""
        if FORMATS[records[0].format].rows == "pair":
            return self._pairs(records)
        return self._encode(self._read(records))

    def _pairs(self, records: list[Record]) -> list[Pair]:
        branches = [_branch(record, key) for record in records for key in ("chosen", "rejected")]
        rows = self._encode(self._read(branches))
        for row, after in pairwise(rows):
            if row.source == after.source:
                raise InputError(
                    f"{row.source}: the chat template renders a turn of the response differently "
                    "once others follow; give a response of one assistant message."
                )
        self.notes.rows += len(records) - len(branches)
        for record in records:
            self.notes.ignored.update(record.ignored)
            self.notes.repeated += record.repeated
        pairs = zip(records, rows[::2], rows[1::2], strict=True)
        return [Pair.of(chosen, rejected, record.source) for record, chosen, rejected in pairs]

    def _read(self, records: list[Record]) -> list[tuple[Record, Sample]]:
        """The samples of each record."""
        found = []
        for record in records:
            self.notes.rows += 1
            self.notes.ignored.update(record.ignored)
            for sample in self._samples(record):
                if sample.turns:
                    self.notes.add(record.source, sample.turns, sample.findings)
                found.append((record, sample))
        return found

    def _samples(self, record: Record) -> list[Sample]:
        row = record.row
        if record.format == "messages":
            return self._chats.samples(record)
        if record.format == "text":
            return [Sample([(row["text"], 1.0)])]
        # A prompt, to be completed: messages already, or text.
        if isinstance(row["prompt"], str):
            self.notes.prompt_format = "raw" if self._raw else "chat"
            if self._raw:
                if row.get("system"):
                    self.notes.ignored["system"] += 1
                return [Sample([(row["prompt"], 0.0), (row["completion"], 1.0)])]
        return self._responses.samples(_as_messages(record))

    def _encode(self, samples: list[tuple[Record, Sample]]) -> list[Row]:
        # One call for all of them: the whole texts, then the pieces one by one.
        texts = ["".join(text for text, _ in sample.pieces) for _, sample in samples]
        parts = [text for _, sample in samples for text, _ in sample.pieces]
        encoded = iter(self._ids(texts + parts))
        wholes = [next(encoded) for _ in samples]
        return [
            self._row(record, sample, text, whole, [next(encoded) for _ in sample.pieces])
            for (record, sample), text, whole in zip(samples, texts, wholes, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _row(
        self, record: Record, sample: Sample, text: str, whole: list[int], parts: list[list[int]]
    ) -> Row:
        pieces = sample.pieces
        ids, bounds = self._join(record, pieces, text, whole, parts)
        weights = np.zeros(len(ids), np.float32)
        for (_, weight), (start, end) in zip(pieces, pairwise(bounds), strict=True):
            weights[start:end] = weight
        if not sample.rendered:  # a chat template writes BOS itself, and its turns are ended
            end, stopped = self._end(ids, bounds[-2])
            ids, weights = ids[:end], weights[:end]
            if self._append_eos and not stopped:
                ids = [*ids, self._eos_id(record)]
                weights = np.append(weights, np.float32(1))
            if ids[: len(self.bos)] != self.bos:
                ids = self.bos + ids
                weights = np.append(np.zeros(len(self.bos), np.float32), weights)
        weights[:1] = 0  # nothing comes before the first token to predict it from
        return Row(np.array(ids, np.int32), weights, record.source, sample.findings)

    def _eos_id(self, record: Record) -> int:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise InputError(
                f"{record.source}: the tokenizer has no end-of-sequence token to append to the "
                "row; set append_eos to false."
            )
        return eos

    def _join(
        self, record: Record, pieces: Pieces, text: str, whole: list[int], parts: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the token index at which each of its pieces starts and ends."""
        joined = [token for part in parts for token in part]
        # When the pieces give the tokens of the whole, their ends are exact. When they give other
        # tokens for the same text, one token lies across a cut; generation starts from the prompt's
        # own tokens, so the pieces' tokens are the ones to train.
        if joined == whole or self._decode(joined) == self._decode(whole):
            return joined, [0, *accumulate(len(part) for part in parts)]
        # Some tokenizers put a space before every text, so that pieces have more text than the
        # whole. Offsets tell then: a token with any character of a piece belongs to that piece.
        if not self._tokenizer.is_fast:
            raise InputError(
                f"{record.source}: where the trained text starts cannot be told, since this "
                "tokenizer gives no character offsets; use its fast version (tokenizer.json)."
            )
        output = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = np.array([end for _, end in output["offset_mapping"]])
        cuts = list(accumulate(len(piece) for piece, _ in pieces))
        starts = np.searchsorted(np.maximum.accumulate(ends), [0, *cuts[:-1]], side="right")
        return output["input_ids"], [0, *map(int, starts[1:]), len(ends)]

    def _end(self, ids: list[int], start: int) -> tuple[int, bool]:
        """Where a completion from `start` on ends, and whether by a token that stops generation.

        Blanks after such a token would never be generated.
        """
        last = len(ids)
        while last > start and self._is_blank(ids[last - 1 : last]):
            last -= 1
        if last > start and ids[last - 1] in self._eos:
            return last, True
        return len(ids), False

    def _is_blank(self, ids: list[int]) -> bool:
        key = tuple(ids)
        if key not in self._blank:
            self._blank[key] = not self._decode(ids).strip()
        return self._blank[key]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _branch(record: Record, key: str) -> Record:
    """One sequence of a pair as a record whose response is trained."""
    row = {**record.row, "completion": record.row[key]}
    return replace(record, source=f"{record.source} {key}", format="prompt-completion", row=row)


def _as_messages(record: Record) -> Record:
    """A prompt with its completion as a conversation whose last messages are trained."""
    row = record.row
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        prompt = [*system, {"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    prompt = [{**message, "train": False} for message in prompt]
    return replace(record, format="messages", row={**row, "messages": [*prompt, *completion]})
