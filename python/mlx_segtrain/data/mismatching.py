"""Combines prompts with responses to other prompts, for KTO's estimate of the KL divergence."""

from dataclasses import replace

import numpy as np

from ..errors import InputError
from .columns import Lazy
from .dataset import Dataset
from .encoding import Pair, Row


def mismatched(data: Dataset, tokens: int) -> Dataset:
    """Returns pairs of at most `tokens` tokens. The first sequence of a pair is a row, and the
    second is the prompt of this row with a response to another prompt. Raises InputError if all
    rows have the same prompt.

    The other response can come from any row of the data set, not only from the same batch, so a
    batch may consist of a single row. Each row is combined with the same response in every epoch,
    so the reference model's outputs are computed only once. The other response has about the same
    length as the row's own response. In `columns`, the second sequence has no tokens in the loss.
    """
    columns, rows = data.columns, data.rows
    first, length, trained, top = (
        getattr(columns, name)[:, 0] for name in ("first", "length", "trained", "top")
    )
    other = _others(data)

    def pair(i: int) -> Pair:
        own, of = rows[i], rows[int(other[i])]
        at, start = int(first[i]), int(first[other[i]])
        ids = np.concatenate([own.ids[:at], of.ids[start:]])[:tokens]
        weights = np.concatenate([np.zeros(at, np.float32), abs(of.weights[start:])])[:tokens]
        wrong = Row(ids, weights, f"{own.source} with a response of {of.source}")
        return Pair.of(own, wrong, own.source)

    lengths = np.minimum(first + (length - first)[other], tokens)
    columns = replace(
        columns,
        length=np.stack([length, lengths], 1),
        first=np.stack([first, first], 1),
        trained=np.stack([trained, np.zeros_like(trained)], 1),
        top=np.stack([top, np.maximum(top, top[other])], 1),
    )
    return replace(data, rows=Lazy(len(rows), pair), columns=columns)


def _others(data: Dataset) -> np.ndarray:
    """Returns, for each row, the index of the row that provides the other response, int64 [n]. This
    is the nearest preceding row with a different prompt in the (cyclic) order of response
    lengths."""
    first = data.columns.first[:, 0]
    prompts = [row.ids[:at].tobytes() for row, at in zip(data.rows, first, strict=True)]
    _, prompt = np.unique(np.array([hash(own) for own in prompts]), return_inverse=True)
    n = len(prompts)
    order = np.argsort(data.columns.length[:, 0] - first, kind="stable")
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    other, left = np.arange(n), np.arange(n)
    for step in range(1, n):
        other[left] = order[(place[left] - step) % n]
        left = left[prompt[other[left]] == prompt[left]]
        if not left.size:
            return other
    raise InputError(
        f"{data.name}: all rows have the same prompt, but method kto compares each row with a "
        "response to another prompt: add rows with other prompts, or use kto_loss "
        "apo_zero_unpaired.",
        field="kto_loss",
    )
