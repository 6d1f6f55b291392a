"""The self-check of GPU kernels, with the CPU's implementations standing in for them."""

import json

import mlx.core as mx
import pytest

from mlx_segtrain import _core, doctor


@pytest.fixture
def off(monkeypatch, tmp_path):
    """What is switched off, without touching this process; the cache is an empty folder."""
    seen = []
    monkeypatch.setattr(_core, "switch_off", lambda *args: seen.append(args))
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "stand-in"})
    return seen


def test_implementations_that_agree_stay_on(off, tmp_path):
    assert doctor.self_check.__wrapped__() == {} and off == []
    (key,) = json.loads((tmp_path / "self-check.json").read_text())
    assert key.startswith("stand-in, mlx ")


@pytest.mark.parametrize("fault", ["wrong", "not finite", "does not compile"])
def test_one_that_does_not_agree_is_switched_off_with_a_warning(off, monkeypatch, fault):
    sound = _core.attention

    def broken(q, k, v, *, impl, **options):
        if impl == "kernel" and options.get("segments"):
            if fault == "does not compile":
                raise RuntimeError("error: expected a\ndeclaration")
            factor = 1.05 if fault == "wrong" else float("nan")
            return sound(q, k, v, impl=impl, **options) * mx.array(factor, q.dtype)
        return sound(q, k, v, impl=impl, **options)

    monkeypatch.setattr(_core, "attention", broken)
    says = r"attention kernel is off on this device \(segments: "
    with pytest.warns(UserWarning, match=says):
        found = doctor.self_check.__wrapped__()
    assert list(found) == ["attention"]
    assert [args[:2] for args in off] == [("attention", "kernel")]
    # The next process reads the result and runs no check.
    monkeypatch.setattr(doctor, "check", lambda: pytest.fail("checked again"))
    with pytest.warns(UserWarning, match=says):
        assert doctor.self_check.__wrapped__() == found


def test_a_broken_cache_is_no_obstacle(off, tmp_path):
    (tmp_path / "self-check.json").write_text("{")
    assert doctor.self_check.__wrapped__() == {}
