"""Packed rows: loss and gradients are those of the rows alone, and no row is split or lost."""

import numpy as np
import pytest

from lib import tiny_models
from lib.chains import FAST, adapter_of
from lib.oracle import assert_close
from mlx_segtrain.data import Batch
from mlx_segtrain.models import adapting, chain_of
from mlx_segtrain.objectives import value_and_grad
from mlx_segtrain.objectives.sft import Sft

#: Tokens of uneven examples: longer than the window of 8 and than a tile, and the least there is.
LENGTHS = (21, 2, 9, 70, 33, 3)
BOUND = 1e-5


def examples(lengths=LENGTHS, prompt=2, seed=0):
    """Rows alone, padded to one batch, and packed."""
    rng = np.random.default_rng(seed)
    count, ends = np.arange(len(lengths)), np.array(lengths)
    weights = rng.uniform(0.5, 1, (len(lengths), max(lengths))).astype(np.float32)
    at = np.arange(max(lengths))
    weights *= (at >= np.minimum(prompt, ends - 1)[:, None]) & (at < ends[:, None])
    tokens = rng.integers(0, 128, weights.shape).astype(np.int32)
    alone = [
        Batch(tokens[i : i + 1, :n], weights[i : i + 1, :n], count[i : i + 1], ends[i : i + 1])
        for i, n in enumerate(lengths)
    ]
    whole = (np.concatenate([getattr(x, name) for x in alone], 1) for name in ("tokens", "weights"))
    packed = Batch(*whole, count, ends, packed=True)
    return alone, Batch(tokens, weights, count, ends), packed


def step(chain, adapter, batch, total, size=1):
    """Loss and gradients by path."""
    params = adapting.stage_params(chain, adapter)
    what = (Sft(), chain, adapter.scales, params, batch, total)
    (loss,), grads = value_and_grad(*what, cuts=lambda streams: chain.cuts(size, streams))
    return loss.item(), {k: g for own in grads.values() for k, g in own.items()}


def assert_same_packed(chain, adapter, lengths=LENGTHS, prompt=2, size=1):
    """As a padded batch, and as the rows alone, of whose gradients the sum is smaller than each."""
    alone, padded, packed = examples(lengths, prompt)
    total = Sft().total(alone)
    assert Sft().total([packed]) == pytest.approx(total)
    steps = [step(chain, adapter, batch, total, size) for batch in alone]
    (same, of_padded), (loss, grads) = (
        step(chain, adapter, batch, total, size) for batch in (padded, packed)
    )
    assert loss == pytest.approx(same, rel=BOUND)
    assert loss == pytest.approx(sum(own for own, _ in steps), rel=BOUND)
    for name, grad in grads.items():
        assert_close(name, grad, of_padded[name], BOUND)
        truth = sum(np.array(own[name], np.float64) for _, own in steps)
        assert_close(name, grad, truth, 2 * BOUND)


@pytest.mark.parametrize("name", FAST)
def test_packed_is_unpacked(name):
    family, more = FAST[name]
    chain = chain_of(tiny_models.build(family, **more))
    assert_same_packed(chain, adapter_of(chain))
