"""Tests the scores of dense and quantized reward models, and the memory planned for them."""

import json

import mlx.core as mx
import numpy as np
import pytest

from lib.folders import write_llama, write_tokenizer
from lib.runs import config_of
from mlx_segtrain import InputError, TrainConfig, train
from mlx_segtrain.models import load_model, load_tokenizer
from mlx_segtrain.models.headers import read_shape
from mlx_segtrain.planning import rollouts, run
from mlx_segtrain.rewards import Rewards
from mlx_segtrain.rewards import model as judging
from mlx_segtrain.rewards.model import RewardModel

CHATS = ["Yes.", "No, that is wrong, and here is why: it is not so.", "", "ÄÖ<|im_end|>"]


def scorer(path, labels=1, **how):
    """Writes an mlx-lm model with a score head, and returns its folder."""
    write_llama(path, tied=False, **how)
    weights = mx.load(str(path / "model.safetensors"))
    rest = {name: x for name, x in weights.items() if not name.startswith("lm_head")}
    mx.random.seed(7)
    rest["score.weight"] = mx.random.normal((labels, 64))
    mx.save_safetensors(str(path / "model.safetensors"), rest, {"format": "mlx"})
    return path


def judge(folder, raw=False):
    own = RewardModel(folder)
    own.check(folder, raw)
    return own


def texts_of(tokenizer, answers):
    for text in answers:
        turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": text}]
        yield tokenizer.apply_chat_template(turns, tokenize=False)


def test_prompts_and_completions_are_as_many(tmp_path):
    own = judge(scorer(tmp_path / "m"))
    with pytest.raises(ValueError, match="zip"):
        own(["Is it?", "Was it?"], ["yes"])


def test_scores_are_those_of_transformers(hf, tmp_path, monkeypatch):
    """Scores do not depend on the lengths of the texts in a batch, on splitting long texts into
    chunks, or on padding."""
    model = hf.write_scorer(tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    own = judge(tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    answers = [*CHATS, "long " * 60]
    rows = [tokenizer.encode(x, add_special_tokens=False) for x in texts_of(tokenizer, answers)]
    wanted = hf.scores_of(model, rows)
    assert np.ptp(wanted) > 0.1
    found = own(prompts=["Is it?"] * 5, completions=answers)
    assert np.allclose(found, wanted, atol=2e-5)
    monkeypatch.setattr(judging, "PREFILL", 64)
    assert np.allclose(own(prompts=["Is it?"] * 5, completions=answers), wanted, atol=2e-5)
    raw = judge(tmp_path / "m", raw=True)
    # The second text ends with padding tokens.
    texts = ["a b", "a b<|im_end|><|im_end|>"]
    plain = hf.scores_of(model, [tokenizer.encode(x, add_special_tokens=False) for x in texts])
    found = raw(prompts=["a ", "a "], completions=[x[2:] for x in texts])
    assert np.allclose(found, plain, atol=2e-5) and abs(plain[0] - plain[1]) < 1e-6


def test_a_quantized_model_scores_at_the_last_token(tmp_path):
    folder = scorer(tmp_path / "m", bits=4)
    own, tokenizer = judge(folder), load_tokenizer(folder)
    found = own(prompts=["Is it?"] * 4, completions=CHATS)
    with_head = write_llama(tmp_path / "plain", bits=4, tied=False)
    model, weight = load_model(with_head)[0], mx.load(str(folder / "model.safetensors"))
    for score, text in zip(found, texts_of(tokenizer, CHATS), strict=True):
        h = model.model(mx.array([tokenizer.encode(text, add_special_tokens=False)]))
        assert abs(score - float((h[0, -1] @ weight["score.weight"].T)[0])) < 1e-4
    # All turns of a conversation are scored.
    talk = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    talk += [{"role": "assistant", "content": "Yes."}]
    (whole,) = own(prompts=["Is it?"], completions=["Yes."], messages=[talk])
    assert abs(whole - found[0]) > 1e-3


def test_it_scores_completions_and_not_a_column_of_the_data(tmp_path):
    folder = scorer(tmp_path / "m")
    config = TrainConfig(model_dir="m", adapter_path="a", method="grpo", reward_model=folder)
    rows = [{"prompt": "Is it?", "messages": [{"role": "user", "content": "x"}], "talks": 1}] * 4
    found = Rewards.of(config)(rows, CHATS, [1] * 4)
    assert found.total == judge(folder)(prompts=["Is it?"] * 4, completions=CHATS)
    assert len({*found.total}) == 4


def test_its_weights_are_planned(tmp_path, llama4):
    folder = scorer(tmp_path / "m")
    how = {"model_dir": llama4, "adapter_path": "a", "method": "grpo", "max_seq_length": 128}
    how["max_completion_tokens"] = 50
    plain, judged = TrainConfig(**how), TrainConfig(**how, reward_model=folder)
    more = read_shape(folder).weight_bytes(True)
    batch = run.full_batch(plain)
    peaks = [run.plan_run(own, batch).planned.peak for own in (plain, judged)]
    assert peaks[1] - peaks[0] == more > 1e5
    bytes_of = [rollouts.rollout_bytes(own, 300, 4) for own in (plain, judged)]
    assert bytes_of[1] - bytes_of[0] >= more
    budget = {"memory_budget_gb": 1.5 * read_shape(llama4).weight_bytes(True) / 1e9}
    assert read_shape(llama4).weight_bytes(True) < more
    with pytest.raises(InputError, match="the weights of llama4 alone"):
        run.plan_run(judged.model_copy(update=budget), batch)


def test_a_run_is_rewarded_by_it(tmp_path, llama4, cache):
    folder = scorer(tmp_path / "m")
    how = {"method": "grpo", "batch_size": 2, "group_size": 3, "max_completion_tokens": 8}
    own = config_of(llama4, None, tmp_path / "a", iters=1, reward_model=folder, **how)
    rows = [{"prompt": f"Say {i}."} for i in range(4)]
    train(own, train_data=rows)
    lines = [json.loads(x) for x in (tmp_path / "a" / "completions.jsonl").read_text().splitlines()]
    model = judge(folder)
    for line in lines:
        (score,) = model(prompts=[line["prompt"]], completions=[line["text"]])
        assert abs(score - line["rewards"]["reward_model"]) < 1e-5
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert "reward_model/model.safetensors" in record["inputs"]


def test_what_is_no_reward_model(tmp_path, llama4):
    with pytest.raises(InputError, match=r"has no score.weight: use a sequence"):
        judge(llama4)
    with pytest.raises(InputError, match="has 2 labels"):
        judge(scorer(tmp_path / "m", labels=2))
    with pytest.raises(InputError, match="is not a folder"):
        judge(tmp_path / "none")
    named = Rewards.of(
        TrainConfig(model_dir="m", adapter_path="a", method="grpo", reward_model="x")
    )
    assert list(named.rewards) == ["reward_model"]
