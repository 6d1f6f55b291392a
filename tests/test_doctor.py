"""Tests the self-check of the kernels. In some tests, CPU kernels stand in for GPU kernels."""

import json

import mlx.core as mx
import pytest

from mlx_segtrain import _core
from mlx_segtrain.commands import main as cli
from mlx_segtrain.ops import selfcheck as doctor
from mlx_segtrain.ops.cases import attention

pytestmark = pytest.mark.acceptance

CPU_KERNELS = [
    "attention",
    "swiglu",
    "geglu",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rope",
]
MILLISECONDS = doctor.milliseconds
#: The original function of each kernel. Tests replace these functions to break the kernels.
SOUND = {op: getattr(_core, op) for op in [*CPU_KERNELS, "lora_linears"] if op != "lora_linear"}


def function_of(op):
    """Returns the name of the function that a check of `op` calls."""
    if op == "lora_linear":
        return "lora_linears"
    return "attention" if op.startswith("attention") else op


@pytest.fixture(scope="module")
def sound_checks():
    return {}


@pytest.fixture
def off(monkeypatch, tmp_path, sound_checks):
    """Provides an empty cache, and returns the list of ops that the self-check would disable. The
    ops remain enabled in this process.

    Nothing is timed, and intact kernels are checked only once.
    """
    seen, plain = [], doctor.check_call

    def check_call(call):
        name = function_of(call.op)
        if getattr(_core, name) is not SOUND[name]:
            return plain(call)
        key = (call.op, call.case, *call.args[0].shape)
        if key not in sound_checks:
            sound_checks[key] = plain(call)
        return sound_checks[key]

    monkeypatch.setattr(doctor, "check_call", check_call)
    monkeypatch.setattr(doctor, "milliseconds", lambda *_: 1.0)
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    monkeypatch.setattr(_core, "switch_off", lambda *args: seen.append(args))
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "stand-in"})
    yield seen
    mx.set_default_device(device)


def test_implementations_that_agree_stay_on(off, tmp_path):
    assert doctor.self_check.__wrapped__() == {} and off == []
    (key,) = json.loads((tmp_path / "self-check.json").read_text())
    assert key.startswith("stand-in, mlx ")


@pytest.mark.parametrize("fault", ["wrong", "not finite", "does not compile"])
def test_one_that_does_not_agree_is_switched_off_with_a_warning(off, monkeypatch, fault):
    sound = _core.attention

    def broken(q, k, v, options, *, impl):
        if impl == "kernel" and options.segments:
            if fault == "does not compile":
                raise RuntimeError("error: expected a\ndeclaration")
            factor = 1.05 if fault == "wrong" else float("nan")
            return sound(q, k, v, options, impl=impl) * mx.array(factor, q.dtype)
        return sound(q, k, v, options, impl=impl)

    monkeypatch.setattr(_core, "attention", broken)
    says = r"attention kernel is off on this device \(segments, D = 64: "
    with pytest.warns(UserWarning, match=says):
        found = doctor.self_check.__wrapped__()
    assert list(found) == ["attention"]
    assert [args[0] for args in off] == ["attention"]
    # A later process reads the stored result without running a check.
    monkeypatch.setattr(doctor, "check", lambda: pytest.fail("the check ran again"))
    with pytest.warns(UserWarning, match=says):
        assert doctor.self_check.__wrapped__() == found


def test_a_broken_cache_is_no_obstacle(off, tmp_path):
    (tmp_path / "self-check.json").write_text("{")
    assert doctor.self_check.__wrapped__() == {}


# ---- mlx-segtrain doctor


def break_kernel(monkeypatch, op, fault):
    """Makes a kernel's value, or only its gradient, 1 % too large."""
    name = "lora_linears" if op == "lora_linear" else op
    sound = getattr(_core, name)

    def bent(y):
        return y * 1.01 if fault == "value" else y * 1.01 - 0.01 * mx.stop_gradient(y)

    def broken(x, *args, impl="auto", **options):
        y = sound(x, *args, impl=impl, **options)
        if impl != "kernel":
            return y
        return [bent(part) for part in y] if isinstance(y, list) else bent(y)

    monkeypatch.setattr(_core, name, broken)


def test_every_kernel_of_the_cpu_is_checked_and_timed(off, monkeypatch):
    monkeypatch.setattr(doctor, "milliseconds", MILLISECONDS)
    report = doctor.examine()
    assert report.ok and not report.gpu and report.device == "stand-in"
    cases = [f"{case}, D = 64" for case in attention.CASES]
    assert [x.case for x in report.checks if x.op == "attention"] == cases
    assert list(dict.fromkeys(x.op for x in report.checks)) == CPU_KERNELS
    for x in report.checks:
        assert x.reason == "" and 0 < x.error < doctor.FLOAT_BOUND
        assert 0 < x.ms < 1e4 and 0 < x.plain_ms < 1e4


def test_times_are_those_of_the_work():
    """The measured time covers 6·512³ operations, not just the construction of the graph."""
    x = mx.ones((512, 512))
    assert doctor.milliseconds(lambda x: x @ x, [x], x) > 0.1


@pytest.mark.parametrize("fault", ["value", "gradient"])
@pytest.mark.parametrize("op", CPU_KERNELS)
def test_a_kernel_that_is_wrong_is_named(off, monkeypatch, op, fault):
    break_kernel(monkeypatch, op, fault)
    found = doctor.failed(doctor.check())
    assert list(found) == [op] and found[op].endswith("e-02 against the plain code")


def test_on_a_gpu_it_checks_what_runs_there(off, monkeypatch):
    """CPU kernels stand in for the implementations that a Mac uses. Each head size is checked in
    each dtype."""
    sound = _core.attention

    def played(*x, impl, **options):
        return sound(*x, impl="kernel" if impl == "stock" else impl, **options)

    monkeypatch.setattr(_core, "attention", played)
    monkeypatch.setattr(doctor, "on_gpu", lambda: True)
    monkeypatch.setattr(doctor, "CHECKED", 60)  # fewer rows, because bfloat16 is slow on a CPU
    report = doctor.examine()
    assert report.gpu and report.ok
    cases = []
    for dtype in ("bfloat16", "float16", "float32"):
        for d in (64, 128, 256, 512):
            ways = ["attention_rows", *["attention"] * (d < 512)]
            cases += [(op, f"{case}, D = {d}, {dtype}") for op in ways for case in attention.CASES]
            if d < 512 and dtype != "float32":
                cases.append(("attention_stock", f"causal, D = {d}, {dtype}"))
    assert [(x.op, x.case) for x in report.checks] == [
        *cases,
        *((op, dtype) for dtype in ("bfloat16", "float32") for op in ("swiglu", "geglu")),
        *(
            ("rope", f"{dtype}, {pairs}")
            for pairs in ("halves", "neighbours")
            for dtype in ("bfloat16", "float32")
        ),
    ]
    # In bfloat16, the results differ from those of the plain code because of rounding.
    half = [x for x in report.checks if "float32" not in x.case]
    assert all(1e-4 < x.error < doctor.HALF_BOUND for x in half)
    assert all(x.error < doctor.FLOAT_BOUND for x in report.checks if "float32" in x.case)


def test_before_first_use_one_size_of_heads_is_checked(off, monkeypatch):
    monkeypatch.setattr(doctor, "on_gpu", lambda: True)
    monkeypatch.setattr(doctor, "check_call", lambda call: doctor.Check(call.op, call.case))
    cases = {x.case for x in doctor.check() if x.op.startswith("attention")}
    assert cases == {f"{case}, D = 64, bfloat16" for case in attention.CASES}


def test_cuda_checks_its_own_implementations(monkeypatch):
    monkeypatch.setattr(_core, "attention_impls", lambda: ["kernel", "blocked", "hopper", "cudnn"])
    kernels = [("attention_rows", 64), ("attention", 64)]
    kernels += [("attention_hopper", d) for d in (64, 128, 256, 512)]
    cases = [(op, f"{case}, D = {d}") for op, d in kernels for case in attention.CASES]
    assert [(x.op, x.case) for x in attention.checks("cuda", 200)] == [
        *cases,
        ("attention_cudnn", "causal, D = 256"),
        ("attention_cudnn", "segments, D = 256"),
    ]


def test_it_checks_afresh_and_rewrites_what_was_known(off, monkeypatch, tmp_path):
    file = tmp_path / "self-check.json"
    file.write_text(json.dumps({"another": {"attention": "x"}, doctor.device_key(): {"rope": "y"}}))
    assert doctor.examine().ok
    assert json.loads(file.read_text()) == {
        "another": {"attention": "x"},
        doctor.device_key(): {},
    }
    break_kernel(monkeypatch, "rope", "value")
    assert not doctor.examine().ok
    known = json.loads(file.read_text())
    assert list(known[doctor.device_key()]) == ["rope"] and "another" in known


def test_the_command_says_which_kernel_is_wrong(off, monkeypatch, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "stand-in (CPU)" in out and out.endswith("every kernel agrees with the plain code\n")
    # In the table, attention has one row per case, and lora_linear has two rows.
    assert out.count(" ok ") == len(CPU_KERNELS) + len(attention.CASES)
    break_kernel(monkeypatch, "rms_norm", "value")
    assert cli.main(["doctor", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False and result["mlx"] == doctor.MLX_VERSION
    (wrong,) = [x for x in result["checks"] if x["reason"]]
    assert wrong["op"] == "rms_norm" and wrong["ms"] is None
    assert wrong["error"] == pytest.approx(0.01, rel=0.1)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "rms_norm: relative error 1.0e-02 against the plain code" in out and " wrong " in out


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_what_is_not_finite_is_valid_json(off, monkeypatch, capsys, fault):
    sound = _core.rope
    monkeypatch.setattr(_core, "rope", lambda *args, **options: sound(*args, **options) * fault)
    assert cli.main(["doctor", "--json"]) == 1
    out = capsys.readouterr().out
    assert "NaN" not in out and "Infinity" not in out
    assert {x["op"]: x["reason"] for x in json.loads(out)["checks"] if x["reason"]} == {
        "rope": "not finite"
    }
