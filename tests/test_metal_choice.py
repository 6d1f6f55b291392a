"""Tests how the attention implementation on a Mac is chosen from measured times."""

import json

import mlx.core as mx
import pytest

from lib import tiny_models
from lib.chains import headers
from metal_emulator.kernels import launched
from mlx_segtrain import _core
from mlx_segtrain.ops import choice
from mlx_segtrain.ops.choice import Heads, fastest, settle
from mlx_segtrain.planning import run, shape_of

HEADS = Heads(4, 2, 64, mx.bfloat16)
WINDOW = Heads(4, 2, 64, mx.bfloat16, causal=False)
TIMES = {"stock": 3.0, "kernel": 2.0, "blocked": 5.0}


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """Simulates a Mac on which each implementation takes a fixed time. Yields a list of the (heads,
    implementation) pairs that have been timed."""
    timed = []

    def milliseconds(heads, way, until):
        timed.append((heads, way))
        return mac_times[heads].get(way)

    mac_times = {HEADS: dict(TIMES), WINDOW: {"kernel": 7.0, "blocked": 6.0}}
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "milliseconds", milliseconds)
    monkeypatch.setattr(choice, "self_check", dict)
    monkeypatch.setattr(choice.platform, "mac_ver", lambda: ("15.3", (), ""))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1"})
    yield timed
    for dtype in (mx.bfloat16, mx.float16):
        for causal in (False, True):
            _core.prefer_attention(64, dtype, causal, "")


def test_the_fastest_is_taken_from_then_on(mac):
    assert _core.attention_way("metal", 64) == "stock"
    assert settle([HEADS, WINDOW, HEADS], measures=True) == {
        HEADS: TIMES,
        WINDOW: {"kernel": 7, "blocked": 6},
    }
    assert len(mac) == 2 * len(choice.WAYS)
    for dtype in (mx.bfloat16, mx.float16):  # plans treat these two dtypes alike
        assert _core.attention_way("metal", 64, dtype) == "kernel"
    assert _core.attention_way("metal", 64, mx.float32) == "stock"
    assert _core.attention_way("metal", 128) == "stock"
    assert _core.attention_way("cuda", 64) != "kernel"


def test_a_call_takes_what_the_plan_takes(mac):
    x = mx.zeros((1, 4, 300, 64), mx.bfloat16)
    settle([HEADS, WINDOW], measures=True)
    with launched() as launches:
        _core.attention(x, x, x, _core.AttentionOptions(scale=1.0))
        assert [x.name for x in launches] == ["attention"]
        _core.attention(x, x, x, _core.AttentionOptions(scale=1.0, window=9))
        assert launches[-1].name == "softmax_rows"


def test_times_are_taken_once(mac, tmp_path, monkeypatch):
    first = settle([HEADS], measures=True)
    mac.clear()
    assert settle([HEADS], measures=True) == first and mac == []
    (key,) = json.loads((tmp_path / "attention.json").read_text())
    assert key.startswith("Apple M1, mlx ") and key.endswith(", macOS 15.3")
    settle([HEADS, WINDOW], measures=True)
    assert {heads for heads, _ in mac} == {WINDOW}
    mac.clear()
    monkeypatch.setattr(choice.platform, "mac_ver", lambda: ("15.4", (), ""))
    assert settle([HEADS], measures=True) == first and len(mac) == 3
    assert len(json.loads((tmp_path / "attention.json").read_text())) == 2


def test_a_broken_cache_is_no_obstacle(mac, tmp_path):
    (tmp_path / "attention.json").write_text("[")
    assert settle([HEADS], measures=True) == {HEADS: TIMES}


def test_a_plan_takes_no_times(mac):
    """Planning does not time anything, because the server also plans while a run uses the
    device."""
    assert settle([HEADS], measures=False) == {} and mac == []
    first = settle([HEADS], measures=True)
    mac.clear()
    assert settle([HEADS, WINDOW], measures=False) == first and mac == []
    assert _core.attention_way("metal", 64) == "kernel"


def test_a_device_without_memory_is_asked_again(mac, monkeypatch):
    def full(*_):
        raise RuntimeError("[malloc] Unable to allocate 8 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(choice, "milliseconds", full)
        assert settle([HEADS], measures=True) == {}
    assert settle([HEADS], measures=True) == {HEADS: TIMES}


@pytest.mark.parametrize("content", ["null", "[]", '{"x": 1}'])
def test_a_cache_of_another_form_is_no_obstacle(mac, tmp_path, content):
    (tmp_path / "attention.json").write_text(content)
    assert settle([HEADS], measures=True) == {HEADS: TIMES}


def test_what_failed_the_check_is_not_taken(mac, monkeypatch):
    settle([HEADS], measures=True)
    monkeypatch.setattr(choice, "self_check", lambda: {"attention": "wrong"})
    settle([HEADS], measures=True)
    assert _core.attention_way("metal", 64) == "stock"


def test_the_order_that_is_built_in_decides_between_equals():
    assert fastest({"blocked": 1.0, "kernel": 1.0}) == "kernel"
    assert fastest({}) == ""


def test_what_does_not_serve_has_no_time(monkeypatch):
    """Times the attention of a few tokens on the CPU, where MLX's attention is not an option."""
    monkeypatch.setattr(choice, "TOKENS", 40)
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        found = choice.measure(Heads(2, 1, 16, mx.float32), 0.2)
    finally:
        mx.set_default_device(device)
    assert set(found) == {"kernel", "blocked"} and min(found.values()) > 0


def test_two_seconds_are_shared(monkeypatch):
    """An implementation that has used up its share of the time is not called again."""
    now, calls = [0.0], []

    def attention(*args, impl, **options):
        calls.append(impl)
        now[0] += 0.4
        return args[0]

    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(_core, "attention", attention)
    monkeypatch.setattr(choice, "TOKENS", 2)
    found = choice.measure(HEADS, choice.SECONDS)
    assert set(found) == set(choice.WAYS)
    assert now[0] <= choice.SECONDS + 0.4 and set(calls) == set(choice.WAYS)


def test_kinds_of_a_model():
    options = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_models.build("llama", **options)
    shape = shape_of(tiny_models.config("llama", **options), headers(model))
    (kind,) = run.heads_of(shape, packed=False)
    assert (kind.heads, kind.groups, kind.size, kind.causal) == (4, 2, 64, True)
    assert not run.heads_of(shape, packed=True)[0].causal
    gemma = tiny_models.build("gemma3")
    kinds = run.heads_of(shape_of(tiny_models.config("gemma3"), headers(gemma)), packed=False)
    assert {x.causal for x in kinds} == {False, True}


def test_long_rows_have_short_command_buffers(monkeypatch):
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "")  # so that monkeypatch restores it
    monkeypatch.delenv("MLX_MAX_OPS_PER_BUFFER")
    run.short_buffers(run.LONG - 1)
    assert "MLX_MAX_OPS_PER_BUFFER" not in run.os.environ
    run.short_buffers(run.LONG)
    assert run.os.environ["MLX_MAX_OPS_PER_BUFFER"] == run.LAUNCHES
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "1")
    run.short_buffers(run.LONG)
    assert run.os.environ["MLX_MAX_OPS_PER_BUFFER"] == "1"
