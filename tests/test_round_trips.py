"""Any adapter can be exported to any format and re-imported without changes."""

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_segtrain.adapters import About, read_stored, write_adapter
from mlx_segtrain.adapters.conversion import export, import_
from mlx_segtrain.lora import Adapter

#: The shape of each linear layer [in, out], or of experts [E, in, out], by path.
LINEARS = {
    "model.layers.0.self_attn.q_proj": (6, 8),
    "model.layers.0.self_attn.v_proj": (6, 4),
    "model.layers.1.mlp.down_proj": (9, 6),
    "model.layers.1.mlp.up_proj": (6, 9),
}
EXPERTS = {"model.layers.2.mlp.switch_mlp.up_proj": (3, 6, 5)}


@st.composite
def adapters(draw, experts=False):
    """Draws adapters for some layers with different ranks and multipliers, and sometimes with
    DoRA."""
    shapes = LINEARS | (EXPERTS if experts else {})
    paths = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dora = draw(st.booleans()) and not set(paths) & set(EXPERTS)
    tensors, scales, magnitudes = {}, {}, {}

    def array(*shape):
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    for path in paths:
        *e, n, m = shapes[path]
        r = draw(st.integers(1, 5))
        tensors[path] = (array(*e, r, n), array(*e, m, r)) if e else (array(n, r), array(r, m))
        scales[path] = draw(st.sampled_from([0.5, 1.0, 2.5, 20.0]))
        magnitudes |= {path: mx.abs(array(m)) + 0.1} if dora else {}
    return Adapter(tensors, scales, magnitudes)


def update_of(adapter, path):
    """Returns the transpose of an adapter's update of a weight, in float64."""
    a, b = (np.array(x).astype(np.float64) for x in adapter.tensors[path])
    product = a @ b if a.ndim == 2 else (b @ a).swapaxes(1, 2)
    return adapter.scales[path] * product


def assert_same(adapter, again):
    assert again.tensors.keys() == adapter.tensors.keys()
    assert again.magnitudes.keys() == adapter.magnitudes.keys()
    for path in adapter.tensors:
        update = update_of(adapter, path)
        assert np.allclose(update_of(again, path), update, rtol=0, atol=1e-5 * abs(update).max())
    for path, m in adapter.magnitudes.items():
        assert mx.array_equal(again.magnitudes[path], m)


def assert_round_trip(adapter, to):
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_adapter(place / "own", adapter, About("model"))
        assert_same(adapter, read_stored(place / "own"))
        how = {"names": "text"} if to == "peft" else {}
        export(place / "own", place / "out", to, **how)
        assert_same(adapter, read_stored(place / "out"))
        import_(place / "out", place / "again")
        assert_same(adapter, read_stored(place / "again"))


@pytest.mark.parametrize("experts", [False, True])
def test_mlx_lm_s(experts):
    settings(max_examples=20)(given(adapters(experts))(lambda x: assert_round_trip(x, "mlx-lm")))()


@settings(max_examples=20)
@given(adapters())
def test_peft_s(adapter):
    assert_round_trip(adapter, "peft")
