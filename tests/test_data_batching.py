"""Tests the order and padding of rows, and that no row is lost."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_segtrain.data import Dataset, Row, batches, eval_batches
from mlx_segtrain.errors import InputError
from mlx_segtrain.objectives.sft import Sft

PAD = 99


def dataset(lengths):
    rows = [
        Row(np.full(n, i, np.int32), np.full(n, 0.5, np.float32), f"train.jsonl:{i + 1}")
        for i, n in enumerate(lengths)
    ]
    return Dataset.of(rows, PAD)


def order(data, batch_size, seed, count, start=0):
    return [b.rows.tolist() for b in islice(batches(data, batch_size, seed, start), count)]


def test_one_row_batches_are_shuffled_anew_each_epoch_and_not_padded():
    data = dataset(range(2, 12))
    first, second = order(data, 1, 0, 10), order(data, 1, 0, 20)[10:]
    assert sorted(first) == sorted(second) == [[i] for i in range(10)]
    assert first != second and first != sorted(first)
    assert order(data, 1, 1, 10) != first
    for batch in islice(batches(data, 1, 0), 10):
        assert batch.tokens.shape == batch.weights.shape == (1, batch.rows[0] + 2)


def test_rows_of_similar_length_share_a_batch_padded_to_32():
    data = dataset([40, 3, 33, 5, 32, 64])
    seen = {tuple(sorted(b.rows.tolist())): b for b in islice(batches(data, 2, 0), 3)}
    assert set(seen) == {(1, 3), (2, 4), (0, 5)}
    assert {rows: batch.tokens.shape[1] for rows, batch in seen.items()} == {
        (1, 3): 32,
        (2, 4): 64,
        (0, 5): 64,
    }
    batch = seen[1, 3]
    assert (batch.tokens.dtype, batch.weights.dtype) == (np.int32, np.float32)
    for tokens, weights, i in zip(batch.tokens, batch.weights, batch.rows, strict=True):
        n = len(data.rows[i].ids)
        assert (tokens[:n] == i).all() and (tokens[n:] == PAD).all()
        assert (weights[:n] == 0.5).all() and (weights[n:] == 0).all()


@given(n=st.integers(1, 30), batch_size=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_a_row_sits_out_at_most_one_epoch_in_a_row_and_all_equally_often(n, batch_size, seed):
    data = dataset([5 + i % 7 for i in range(n)])
    if n < batch_size:
        with pytest.raises(InputError, match=f"{n} rows .* batch_size is {batch_size}"):
            batches(data, batch_size, seed)
        return
    per_epoch = n // batch_size
    rows = np.array(order(data, batch_size, seed, n * per_epoch)).reshape(n, -1)
    counts = np.zeros(n, int)
    for epoch, after in zip(rows, [*rows[1:], None], strict=True):
        assert len(set(epoch)) == len(epoch)
        counts[epoch] += 1
        if after is not None:
            assert set(epoch) | set(after) == set(range(n))
    assert (counts == per_epoch * batch_size).all()


@given(st.integers(0, 40), st.integers(1, 4))
def test_the_order_is_a_function_of_the_seed_and_resumes(start, batch_size):
    data = dataset([4, 9, 2, 7, 5, 5, 3])
    whole = order(data, batch_size, 3, 50)
    assert order(data, batch_size, 3, 50 - start, start=start) == whole[start:]


def test_eval_batches_go_through_the_file_once():
    data = dataset([40, 3, 33, 5, 6])
    assert [b.rows.tolist() for b in eval_batches(data, 2)] == [[0, 1], [2, 3], [4]]
    assert [b.tokens.shape for b in eval_batches(data, 2)] == [(2, 64), (2, 64), (1, 32)]
    assert [b.tokens.shape for b in eval_batches(data, 1)] == [(1, n) for n in (40, 3, 33, 5, 6)]


def test_only_the_rows_of_a_batch_are_made():
    """Planning and ordering use the columns of a data set and do not create its rows."""
    data, made = dataset(range(2, 202)), []
    counted = data.map(lambda i, row: made.append(i) or row)
    assert Sft().batch_shapes(counted, 4) == Sft().batch_shapes(data, 4)
    (batch,) = islice(batches(counted, 4, 0, start=30), 1)
    assert made == batch.rows.tolist()
    few = counted.take(np.array([7, 3]))
    assert [len(row) for row in few.rows] == few.columns.run.tolist() == [9, 5]
    assert few.tokens == 14 and len(few) == 2
