"""Compares GRPO's losses and gradients with TRL's formulas in float64, and tests weights, packing
and segments."""

import json
import math
import resource
from decimal import Decimal
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pyarrow as pa
import pytest

from lib import chats, tiny_models
from lib.checks import random_adapter
from lib.oracle import assert_close, vjp
from mlx_segtrain import TrainConfig, train, training
from mlx_segtrain.data import Dataset, Options, Row, eval_batches, load_dataset
from mlx_segtrain.data.sources import sources_of
from mlx_segtrain.errors import InputError, NoMemory
from mlx_segtrain.generation.decoding import Telling
from mlx_segtrain.generation.rollouts import seed_of
from mlx_segtrain.models import adapting, chain_of
from mlx_segtrain.objectives import Functions, Grpo, objective_of, value, value_and_grad
from mlx_segtrain.objectives.grpo import NOTHING, advantages, with_log_probs
from mlx_segtrain.objectives.objective import predictions
from mlx_segtrain.planning.run import full_batch
from mlx_segtrain.rewards import Rewards, with_all_columns
from mlx_segtrain.streams import trim_start
from mlx_segtrain.training import cycle, setup
from mlx_segtrain.training.collapse import collapsed
from mlx_segtrain.training.completions import CompletionLog
from mlx_segtrain.training.cycle import Cycle
from mlx_segtrain.training.loop import Run
from mlx_segtrain.training.memory import Memory
from mlx_segtrain.training.record import PARTS, Record, check_same


def config_of(**changes):
    return TrainConfig(model_dir="m", adapter_path="a", method="grpo", **changes)


LOSSES = {
    "grpo": Grpo(beta=0.1, most=12),
    "grpo, no correction": Grpo(cap=0.0),
    "dr_grpo": Grpo(kind="dr_grpo", beta=0.05, most=12),
    "dapo": Grpo(kind="dapo", high=0.28),
    "gspo": Grpo(kind="gspo", low=0.05, high=0.07, beta=0.1),
}
LENGTHS = np.array([5, 9, 3, 7])
TOKENS = int(LENGTHS.sum())
OWNER = np.repeat(np.arange(4), LENGTHS)


def trl(own, log_p, old, rollout, reference, gains):
    """Returns TRL 1.16's loss (a scalar) for masked [B, T] arrays. Log-probabilities may be
    complex."""
    mask = np.arange(LENGTHS.max()) < LENGTHS[:, None]

    def table(x):
        full = np.zeros(mask.shape, x.dtype)
        full[mask] = x
        return full

    log_p, old, rollout, reference = map(table, (log_p, old, rollout, reference))
    ratio = log_p - old
    if own.kind == "gspo":
        ratio = ((ratio * mask).sum(1) / mask.sum(1))[:, None]
    ratio = np.exp(ratio)
    bounded = np.where(ratio.real > 1 + own.high, 1 + own.high, ratio)
    bounded = np.where(ratio.real < 1 - own.low, 1 - own.low, bounded)
    first, second = ratio * gains[:, None], bounded * gains[:, None]
    losses = -np.where(first.real < second.real, first, second)
    if own.cap:
        losses = losses * np.minimum(np.exp(old - rollout), own.cap)
    if own.beta:
        losses = losses + own.beta * (np.exp(reference - log_p) - (reference - log_p) - 1)
    if own.kind == "dapo":
        return (losses * mask).sum() / mask.sum()
    if own.kind == "dr_grpo":
        return (losses * mask).sum() / (len(mask) * own.most)
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_trls(name):
    own, rng = LOSSES[name], np.random.default_rng(3)
    log_p = rng.uniform(-3, -1, TOKENS)
    old, rollout, reference = (log_p + rng.normal(0, s, TOKENS) for s in (0.3, 0.5, 0.4))
    gains = rng.normal(size=4)
    truth = trl(own, log_p, old, rollout, reference, gains)
    (slope,) = vjp(
        lambda x: np.array(trl(own, x, old, rollout, reference, gains)), [log_p], np.ones(())
    )
    weights = own.weights(LENGTHS, np.ones(4, bool))[OWNER]
    members = (np.arange(4)[:, None] == OWNER) / LENGTHS[:, None]
    reads = (weights, members, np.array(1 / TOKENS), gains[OWNER], rollout, old, reference)
    reads = [mx.array(x.astype(np.float32)) for x in reads]

    def loss(x):
        return own._outputs(x, *reads)[0]

    found, gradient = mx.value_and_grad(loss)(mx.array(log_p.astype(np.float32)))
    assert abs(float(found) - truth) < 2e-6 * max(1, abs(truth))
    assert_close("gradient", gradient, slope, 2e-5)
    _, kl, clipped, mismatch = own._outputs(mx.array(log_p.astype(np.float32)), *reads)
    assert abs(float(mismatch) - np.abs(old - rollout).mean()) < 1e-5
    assert 0 < float(clipped) < 1
    if own.beta:
        less = reference - log_p
        assert abs(float(kl) - (np.exp(less) - less - 1).mean()) < 1e-5


def test_truncated_completions_have_no_weight():
    kept = np.array([True, False, True, True])
    assert np.allclose(Grpo(kind="dapo").weights(LENGTHS, kept), kept / 15)
    assert np.allclose(Grpo().weights(LENGTHS, kept), kept / (4 * LENGTHS))
    assert np.allclose(Grpo(kind="dr_grpo", most=12).weights(LENGTHS, kept), kept / 48)


def test_advantages():
    rewards = np.array([[1, 0, 0, 1], [2, 2, 2, 2.0]])
    centred = np.array([[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]])
    assert np.allclose(advantages(rewards, "none"), centred)
    spread = np.std([1, 0, 0, 1], ddof=1)
    assert np.allclose(advantages(rewards, "group"), centred / (spread + 1e-4))
    assert np.allclose(advantages(rewards, "batch"), centred / (np.std(rewards, ddof=1) + 1e-4))
    assert not advantages(np.full((1, 3), 0.1), "none").any(), "equal rewards have advantages"


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_a_token_that_was_certain_counts(kind):
    """The token's log-probability was 0, which must not be treated as missing."""
    own, zero = Grpo(kind=kind, beta=0.1), mx.zeros(1)
    reads = [mx.array(x, mx.float32) for x in ([1], [[1]], 1, [-1])]
    loss, kl, clipped, mismatch = own._outputs(mx.array([-0.7]), *reads, zero, zero, zero)
    # The ratio is below the lower clipping bound, so a token with a negative advantage has no
    # gradient.
    ratio = math.exp(-0.7)
    assert math.isclose(float(loss), 1 - own.low + 0.1 * float(kl), rel_tol=1e-6)
    assert math.isclose(float(kl), 1 / ratio - 0.7 - 1, rel_tol=1e-6) and float(clipped) == 1
    *_, mismatch = own._outputs(mx.array([-0.7]), *reads, zero, zero - 0.5, zero)
    assert float(mismatch) == 0.5


def test_a_token_that_only_marks_its_row_has_no_gradient():
    """Even a tiny gradient would make a sign-based optimizer take a full step."""
    own = Grpo(beta=0.1)
    reads = [mx.array([x], mx.float32) for x in (NOTHING, 1, 1, 2, -1, -1, -1)]
    loss, slope = mx.value_and_grad(lambda x: own._outputs(x, *reads)[0])(mx.array([-0.9]))
    assert float(loss) == 0 and float(slope[0]) == 0


def completions():
    """Returns a data set of four rows with all values that any of the losses reads."""
    rng = np.random.default_rng(5)
    weights = Grpo().weights(LENGTHS, np.ones(4, bool))
    rows = []
    for n, weight in zip(LENGTHS, weights, strict=True):
        prompt = int(rng.integers(3, 12))
        ids = rng.integers(0, 128, prompt + n).astype(np.int32)
        inside = np.arange(prompt + n) >= prompt

        def numbers(values, inside=inside):
            return np.where(inside, values, 0).astype(np.float32)

        drawn = {name: numbers(rng.uniform(-6, -4, len(ids))) for name in ("rollout", "old")}
        drawn |= {"reference": numbers(rng.uniform(-6, -4, len(ids)))}
        own = {"advantage": numbers(rng.normal()), **drawn}
        rows.append(Row(ids, numbers(weight), "made:1", numbers=own))
    return Dataset.of(rows)


@pytest.fixture(scope="module")
def model():
    chain = chain_of(tiny_models.build("llama", num_hidden_layers=3))
    adapter = random_adapter(chain, dict.fromkeys(chain.linears, 4), 1.5, 0.1)
    return chain, adapter, adapting.stage_params(chain, adapter)


def run(model, objective, batches, size):
    """Returns the combined loss, metrics and gradients of all batches."""
    chain, adapter, params = model
    functions, total = Functions(objective, chain, adapter.scales), objective.total(batches)
    sums, grads = np.zeros(4), {}
    for batch in batches:
        outputs, own = value_and_grad(
            functions, params, batch, total, cuts=lambda streams: chain.cuts(size, streams)
        )
        sums += [float(x) for x in outputs]
        for part in own.values():
            for key, grad in part.items():
                grads[key] = grads[key] + grad if key in grads else grad
    return sums, grads


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_segments_and_packing_change_nothing(name, model):
    own, data = LOSSES[name], completions()
    whole = list(eval_batches(data, 4))
    truth, slope = run(model, own, whole, 0)
    assert np.abs(slope["model.layers.1.mlp.up_proj.lora_b"]).max() > 1e-6
    ways = {
        "by layer": (whole, 1),
        "packed": (list(eval_batches(data.in_rows_of(30), 1)), 1),
        "one by one": (list(eval_batches(data, 1)), 2),
    }
    assert len(ways["packed"][0]) > 1
    for way, (batches, size) in ways.items():
        found, grads = run(model, own, batches, size)
        assert_close(f"{way}: loss and metrics", mx.array(found), truth, 1e-5)
        for key, grad in slope.items():
            assert_close(f"{way}: {key}", grads[key], np.array(grad), 1e-4)


def test_without_old_ones_the_ratio_is_one(model):
    """Without old log-probabilities, the gradient is the same as if they were those of the current
    model."""
    chain, adapter, params = model
    own, (batch,) = Grpo(cap=0.0), list(eval_batches(completions(), 4))
    (log_p,) = value(own.old, chain, adapter.scales, params, batch, 1.0)
    known = with_log_probs(batch, "old", np.array(log_p))
    del batch.numbers["old"]
    (loss, *_), grads = run(model, own, [batch], 1)
    (same, *_), others = run(model, own, [known], 1)
    gains = batch.numbers["advantage"]
    assert abs(loss + float((gains * batch.weights).sum())) < 1e-6 and abs(loss - same) < 1e-6
    for key, grad in grads.items():
        assert_close(key, grad, np.array(others[key]), 1e-4)


def test_collapse():
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert collapsed(rising, 4) is None
    fallen = [*rising, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2]
    assert collapsed(fallen, 0) is None
    assert "fell from 0.700 to 0.225" in collapsed(fallen, 4)
    # The last mean retains more than half of the gain over the first mean.
    assert collapsed([*rising, 0.7, 0.6, 0.6, 0.6], 4) is None
    noisy = [x + 0.2 * (-1) ** i for i, x in enumerate(fallen)]
    assert collapsed(noisy, 4) is None  # the drop is within the noise


CURVES = {
    "flat": np.full(100, 0.5),
    "learning": np.linspace(0.1, 0.9, 100),
    "falling": np.repeat([0.2, 0.7, 0.05], [20, 40, 40]),
}


@pytest.mark.parametrize("name", CURVES)
def test_chance_is_no_collapse(name):
    """Simulates runs with prompts of varying difficulty, 4 prompts per step, and 8 completions per
    prompt."""
    rng, stopped = np.random.default_rng(8), 0
    for _ in range(20):
        chances = np.clip(CURVES[name][:, None] + rng.normal(0, 0.3, (100, 4)), 0, 1)
        means = (rng.binomial(8, chances) / 8).mean(1).tolist()
        stopped += any(collapsed(means[:n], 10) for n in range(11, 101))
    assert stopped == (20 if name == "falling" else 0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "stablelm"])
def test_log_probs_at_a_temperature(family):
    """Tests values and gradients of three output heads: one with our ops, one with a softcap, and
    one with mlx-lm's ops."""
    model, rng = tiny_models.build(family), np.random.default_rng(4)
    chain = chain_of(model)
    h = mx.array(rng.normal(size=(5, model.args.hidden_size)).astype(np.float32))
    targets, dlog_p = mx.arange(5) + 2, mx.array(rng.normal(size=5).astype(np.float32))

    def wanted(h):
        z = chain.head.logits(h).astype(mx.float32) / 0.6
        own = mx.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
        return own - mx.logsumexp(z, axis=-1)

    def found(h):
        return chain.head.log_probs({}, h, targets, temperature=0.6)

    for own, true in zip(mx.vjp(found, [h], [dlog_p]), mx.vjp(wanted, [h], [dlog_p]), strict=True):
        assert_close(family, own[0], np.array(true[0]), 1e-4)
    assert np.abs(found(h) - chain.head.log_probs({}, h, targets)).max() > 0.05


def test_what_is_told_of_a_token_that_was_drawn_at_a_temperature():
    z = np.random.default_rng(4).normal(size=(3, 9)).astype(np.float32)
    telling = Telling({0: 0, 2: 0}, 3, {2: 0.5})
    told = telling.read(telling(mx.array(z), mx.array([1, 1, 4], mx.uint32)))
    own = 2 * z[2].astype(np.float64)
    assert math.isclose(told[2][0], own[4] - np.log(np.exp(own).sum()), rel_tol=1e-5)
    own = z[0].astype(np.float64)
    assert math.isclose(told[0][0], own[1] - np.log(np.exp(own).sum()), rel_tol=1e-5)


def test_seeds_differ_by_each_number():
    seeds = {seed_of(*x) for x in np.ndindex(3, 4, 5, 4)}
    assert len(seeds) == 3 * 4 * 5 * 4 and seed_of(1, 23) != seed_of(12, 3)


CHAT = chats.chat("a", "b")


@pytest.mark.parametrize(
    ("row", "how", "says"),
    [
        (
            {"messages": chats.chat("a", "b")},
            {"data_format": "messages"},
            'the row must have the keys "prompt"',
        ),
        ({"prompt": "a"}, {"data_format": "prompt", "method": "sft"}, "use method grpo"),
        ({"prompt": "a"}, {"method": "sft"}, "needs the keys of a supported format"),
        ({"prompt": ""}, {"prompt_format": "raw"}, "jsonl:1: the prompt has no tokens"),
    ],
)
def test_rows_that_are_no_prompts(row, how, says, tmp_path):
    with pytest.raises(InputError, match=says):
        chats.load(tmp_path, chats.byte_level(bos=False), row, **{"method": "grpo", **how})


def test_an_empty_prompt_may_begin_with_a_token(tmp_path):
    how = {"method": "grpo", "data_format": "prompt", "prompt_format": "raw"}
    (row,) = chats.load(tmp_path, chats.byte_level(), {"prompt": ""}, **how).rows
    assert len(row) == 1


def test_rewards_of_python_are_checks_and_functions(monkeypatch):
    class Reached(Exception):
        pass

    def run(config, *_, rewards, **__):
        assert (config.rewards, rewards) == (["length:9"], [len])
        raise Reached

    monkeypatch.setattr(training, "train", run)
    with pytest.raises(Reached):
        train(method="grpo", model="m", adapter="a", progress=False, rewards=["length:9", len])


def test_lines_of_a_step_are_written_all_or_not_at_all(tmp_path):
    """A file-size limit simulates a full disk."""
    said = []
    log = CompletionLog(tmp_path, said.append)
    log.write([{"step": 1, "text": "a"}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
    try:
        log.write([{"step": 2, "text": "b" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write([{"step": 3, "text": "c"}])
    assert len(said) == 1 and "cannot be written" in said[0]
    log.begin(3)
    kept = [json.loads(line)["step"] for line in log.path.read_text().splitlines()]
    assert kept == [1, 3]


def test_files_of_rewards_are_in_the_record(tmp_path):
    """Two folders contain a reward file of the same name. If one of the files changes, a resumed
    run warns and continues."""
    paths = [tmp_path / name / "own.py" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("def f(completions): return [0 for _ in completions]\n")
    functions = [f"{path}:{name}" for path in paths for name in ("f", "g")]
    how = {"model_dir": tmp_path / "m", "adapter_path": tmp_path / "run"}
    config = TrainConfig(method="grpo", reward_functions=[*functions, "json:loads"], **how)
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a"}\n')
    sources = sources_of(data, None)
    before = Record(config, sources, None)
    assert {"rewards/own.py", "rewards 2/own.py"} <= before.inputs.keys()
    paths[1].write_text("def f(completions): return [1 for _ in completions]\n")
    said = []
    assert not check_same(Record(config, sources, None), before.values, said.append)
    (sentence,) = said
    assert sentence.startswith("rewards 2/own.py has changed since")


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("shortest", "longest"), [(1, 60), (3, 4), (40, 90), (70, 110)])
def test_no_pass_is_larger_than_the_plan_s(packs, shortest, longest):
    """Tests prompts and completions of all lengths up to the maximum."""
    config = config_of(packing=packs, max_completion_tokens=80, max_seq_length=200)
    own, rng = objective_of(config), np.random.default_rng(2)

    def row(prompt, made):
        weights = np.repeat(np.float32([0, 1]), [prompt, made])
        return Row(np.zeros(prompt + made, np.int32), weights, "made:1")

    prompts = Dataset.of([row(n, 0) for n in (shortest, longest)])
    (shape,) = own.batch_shapes(prompts, 1)
    (stream,) = shape.streams
    most = []
    for top in (1, 5, 20, 40, 62, 80):
        sizes = [(rng.integers(shortest, longest + 1), rng.integers(1, top + 1)) for _ in range(30)]
        sizes = [(shortest, top)] * 30 + (sizes if top % 20 == 0 else [])
        made = SimpleNamespace(setup=SimpleNamespace(config=config), objective=own)
        for batch in Cycle._batches(made, Dataset.of([row(*size) for size in sizes])):
            tokens, _, t, _ = predictions(batch)
            assert tokens.size <= shape.rows * stream.length and len(t) <= shape.loss
            rows, width = tokens.shape
            run = rows * (width - trim_start(t.min()))
            assert packs or run <= shape.rows * stream.trimmed
            most.append((tokens.size, len(t)))
    assert max(n for n, _ in most) > 0.8 * shape.rows * stream.length
    assert max(n for _, n in most) > 0.7 * shape.loss, "the plan is much too large"


@pytest.mark.parametrize("packing", [True, False])
def test_a_full_pass_is_of_max_seq_length(packing):
    """The size of a full pass is independent of the number of prompts per step."""
    how = {"max_completion_tokens": 80, "max_seq_length": 200, "packing": packing}
    one, many = (full_batch(config_of(batch_size=n, **how)) for n in (1, 9))
    assert one == many and 150 < one.rows * one.streams[0].length < 200


def test_dropout_is_refused():
    with pytest.raises(InputError, match="lora_dropout has no effect with method grpo"):
        config_of(lora_dropout=0.1)


def test_a_run_that_begins_again_keeps_its_rollout_batch(tmp_path, monkeypatch):
    """A run that is killed before its first checkpoint keeps its rollout_batch when it is
    restarted, even if a different amount of memory is free."""
    monkeypatch.setattr(setup, "rollouts_at_once", lambda *_: 5)
    monkeypatch.setattr(setup, "check_rollouts", lambda *_: None)
    how = {"model_dir": "m", "adapter_path": tmp_path, "method": "grpo"}

    def found(**more):
        return setup.with_rollouts(TrainConfig(**how, **more), 9, None).rollout_batch

    assert found(resume="auto") == 5  # no earlier run exists
    record = {"id": "a", **{part: {} for part in PARTS}, "config": {"rollout_batch": 3}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert found(resume="auto") == 3
    assert found() == 5 and found(resume="auto", rollout_batch=7) == 7
    (tmp_path / "run.json").write_text(json.dumps(record | {"config": {"rollout_batch": "auto"}}))
    assert found(resume="auto") == 5


def rolling(monkeypatch, roll_out):
    """Returns a minimal replacement for a Cycle. It generates with `roll_out`."""
    monkeypatch.setattr(cycle, "roll_out", roll_out)
    monkeypatch.setattr(cycle, "with_params", lambda *_: None)
    names = ("model", "tokenizer", "chain", "scales")
    of = dict.fromkeys(names, SimpleNamespace(max_length=None))
    plan, config = SimpleNamespace(planned=None), config_of(rollout_batch=9)
    own = SimpleNamespace(**of, plan=plan, config=config)
    return SimpleNamespace(setup=own, rewards=None, rollout_peak=0)


def test_memory_for_generating_is_not_the_updates(monkeypatch):
    def takes(*_):
        mx.eval(mx.zeros(1 << 20))
        return "found"

    own, size = rolling(monkeypatch, takes), 4 << 20
    before = mx.get_active_memory()
    assert Cycle._roll_out(own, 1, {}, [], []) == "found"
    assert own.rollout_peak >= before + size > mx.get_peak_memory()
    run = SimpleNamespace(step=own, state=SimpleNamespace(memory=Memory()))
    assert Run._measure(run) < before + size <= run.state.memory.peak


def test_no_memory_for_generating(monkeypatch):
    def fails(*_):
        raise MemoryError("[malloc] Unable to allocate 7 bytes.")

    said = "the device has too little memory to generate 9 completions .* a lower rollout_batch"
    with pytest.raises(NoMemory, match=said):
        Cycle._roll_out(rolling(monkeypatch, fails), 3, {}, [], [])


def prompts_of(**columns):
    options = Options(method="grpo", max_completion_tokens=1)
    return load_dataset(pa.table(columns), chats.byte_level(), options)[0]


def test_a_column_that_is_missing_in_a_step_is_none():
    data = prompts_of(prompt=["a", "b"], answer=["1", "2"], hint=[None, "c"])
    (filled,) = with_all_columns(data)
    seen = []

    def hinted(completions, answer, hint):
        seen.append((answer, hint))
        return [0.0]

    for row in filled.rows:
        Rewards.of(config_of(), [hinted])([row.given], ["x"], [1])
    assert seen == [(["1"], [None]), (["2"], ["c"])]


def test_columns_of_values_that_json_lacks(tmp_path):
    """They are an error only if a reward receives them. Decimals can be compared."""
    data = prompts_of(
        prompt=["a", "b"],
        price=pa.array([Decimal("1250.50"), Decimal(3)]),
        image=pa.array([None, b"x"]),
    )
    config = config_of(rewards=["number:price"])
    tokenizer = chats.byte_level()
    rewards = Rewards.of(config, [lambda completions: [0.0], lambda completions, price: [0.0]])
    rewards.check(config, tokenizer, data.rows)
    assert rewards([data.rows[0].given], ["It is 1250.5"], [1]).by_name["number"] == [1]
    says = r'train_data:2: the rewards cannot read the column "image", because its type is binary'
    for own in (lambda completions, image: [0.0], lambda **columns: [0.0]):
        with pytest.raises(InputError, match=says):
            Rewards.of(config, [own]).check(config, tokenizer, data.rows)
    for changes in ({"rewards": ["exact:image"]}, {"reward_command": "true"}):
        config = config_of(**changes)
        with pytest.raises(InputError, match='"image"'):
            Rewards.of(config).check(config, tokenizer, [*data.rows][1:])
