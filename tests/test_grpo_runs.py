"""Tests that complete grpo runs on tiny models learn, resume bit-identically, and preserve their
state."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest

from lib.runs import Crash, assert_twins, checkpoint_of, config_of, existing_bytes
from mlx_segtrain import InputError, RunError, TrainConfig, train
from mlx_segtrain.commands.main import main
from mlx_segtrain.data.sources import sources_of
from mlx_segtrain.generation.decoding import Options
from mlx_segtrain.generation.rollouts import Monologue, Policy, complete
from mlx_segtrain.models import load_model, load_tokenizer
from mlx_segtrain.models.headers import read_shape
from mlx_segtrain.planning.rollouts import SLACK, check_rollouts, rollout_bytes
from mlx_segtrain.training import checkpoint, cycle, evaluate, probe, score, setup
from mlx_segtrain.training.scoring import pass_at

pytestmark = [pytest.mark.acceptance, pytest.mark.usefixtures("cache")]


def vowels(completions, answer):
    """Scores completions by their number of vowels, and checks that every row has an answer."""
    assert all(answer)
    return [sum(char in "aeiou" for char in text) / 8 for text in completions]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    for name, count in (("train", 9), ("valid", 3)):
        rows = [{"prompt": f"{name} {i}" + " x" * i, "answer": str(i)} for i in range(count)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model, prompts, out, **changes):
    base = {"method": "grpo", "iters": 6, "learning_rate": 2e-2, "lr_schedule": "constant"}
    base |= {"batch_size": 3, "group_size": 4, "max_completion_tokens": 8, "steps_per_eval": 3}
    return config_of(model, prompts, out, **{**base, **changes})


def completions_of(run):
    return [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]


def test_a_run_is_rewarded_more_and_more(llama4, prompts, tmp_path):
    seen = []
    how = {"iters": 10, "steps_per_eval": 10, "batch_size": 4, "group_size": 8}
    how["temperature"] = 1.25
    result = train(config(llama4, prompts, tmp_path / "a", **how), seen.append, rewards=[vowels])
    first, last = (event for event in seen if event.get("kind") == "val")
    assert first["reward"] == -first["loss"] and last["reward"] > first["reward"] + 0.3
    assert result.final_val_loss == last["loss"]
    steps = [event for event in seen if event.get("kind") == "train"]
    names = {"reward", "reward_std", "length", "truncated", "kl", "clipped", "mismatch"}
    assert names <= steps[0].keys()
    assert all(step["mismatch"] < 1e-4 for step in steps), (
        "log-probabilities in training differ from those in generation"
    )
    lines = completions_of(tmp_path / "a")
    assert len(lines) == 10 * 4 * 8
    for step in steps:
        own = [line for line in lines if line["step"] == step["step"]]
        assert np.isclose(step["reward"], np.mean([line["reward"] for line in own]))
        for row in {line["row"] for line in own}:
            group = [line for line in own if line["row"] == row]
            assert sorted(line["completion"] for line in group) == list(range(1, 9))
            assert abs(sum(line["advantage"] for line in group)) < 1e-9
    for line in lines:
        assert line["reward"] == vowels([line["text"]], ["."])[0] == line["rewards"]["vowels"]


RUNS = {
    "grpo": {},
    "gspo, KL, two updates": {"grpo_loss": "gspo", "grpo_beta": 0.1, "updates_per_step": 2},
    "dapo, few at once": {"grpo_loss": "dapo", "rollout_batch": 5, "packing": False},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_to_the_bytes_of_its_twin(name, llama4, prompts, tmp_path):
    """The run is killed three times: during scoring, during generation, and during training. Each
    time, it resumes from the checkpoint of step 2. It ends with step 4."""
    how = {"iters": 4, "steps_per_save": 2, "max_completion_tokens": 4, **RUNS[name]}

    def made(out, **more):
        return config(llama4, prompts, tmp_path / out, **how, **more)

    plain = train(made("plain"), rewards=[vowels])
    original = cycle.complete
    calls = 0

    def dies_at(last):
        def reward(completions, answer):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Crash
            return vowels(completions, answer)

        reward.__name__ = "vowels"
        return reward

    def crash(*_):
        raise Crash

    with pytest.raises(Crash):
        train(made("a"), rewards=[dies_at(5)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cycle, "complete", crash)
        with pytest.raises(Crash):
            train(made("a", resume=True), rewards=[vowels])
        assert cycle.complete is not original
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cycle.Cycle, "_with_references", crash)
        with pytest.raises(Crash):
            train(made("a", resume=True), rewards=[vowels])
    result = train(made("a", resume="auto"), rewards=[vowels])
    assert result.resumed_from == 2
    assert_twins(made("a"), (tmp_path / "a", result), (tmp_path / "plain", plain))
    both = (tmp_path / out / "completions.jsonl" for out in ("a", "plain"))
    assert len({path.read_bytes() for path in both}) == 1


def test_a_reward_that_fails_leaves_the_state(llama4, prompts, tmp_path):
    """The error is one sentence. After the reward is fixed, the run can be resumed."""
    calls = 0

    def reward(completions):
        nonlocal calls
        calls += 1
        return [float("nan") if calls == 4 else len(text) for text in completions]

    out, how = tmp_path / "a", {"max_completion_tokens": 3}
    with pytest.raises(
        RunError, match=r"reward reward returned nan for the completion .* and resume"
    ):
        # The first call is made by an evaluation.
        train(config(llama4, prompts, out, **how), rewards=[reward])
    assert checkpoint._read(checkpoint_of(out)).step == 2
    assert {line["step"] for line in completions_of(out)} == {1, 2}
    assert train(config(llama4, prompts, out, resume=True, **how), rewards=[reward]).steps == 6
    assert {line["step"] for line in completions_of(out)} == set(range(1, 7))


def test_completions_that_teach_nothing_are_left_out_of_the_passes(
    llama4, prompts, tmp_path, monkeypatch
):
    """If all rewards are equal, the adapter learns nothing, and each step trains on only one
    completion."""
    counts = []
    original = cycle.Cycle._batches

    def batches(self, data):
        counts.append(len(data))
        return original(self, data)

    monkeypatch.setattr(cycle.Cycle, "_batches", batches)

    def same(completions):
        return [1.0] * len(completions)

    how = {"iters": 2, "optimizer": "sgd", "weight_decay": 0}
    train(config(llama4, prompts, tmp_path / "a", **how), rewards=[same])
    found = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert counts == [1, 1]
    assert all(mx.abs(x).max() < 1e-20 for name, x in found.items() if name.endswith("lora_b"))


def test_a_run_whose_rewards_collapse_ends(llama4, prompts, tmp_path):
    calls = 0

    def reward(completions):
        nonlocal calls
        calls += 1
        level = (0, 1, 2, 3, 4, 5, 5, 5, 4, 3, 2, 1, 0)[min(calls, 12)]
        return [level + 0.01 * (i % 2) for i in range(len(completions))]

    told = []
    how = {"iters": 12, "steps_per_eval": 100, "collapse_patience": 3, "val_split": 0}
    how["max_completion_tokens"] = 2
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes((prompts / "train.jsonl").read_bytes())
    result = train(
        config(llama4, tmp_path / "data", tmp_path / "a", **how), told.append, rewards=[reward]
    )
    assert result.stopped_early and result.steps == 11
    assert any("fell from 5.005 to 2.005" in event.get("message", "") for event in told)


def test_prompts_that_are_too_long_are_left_out(llama4, prompts, tmp_path):
    told = []
    how = {"max_seq_length": 38, "batch_size": 1, "iters": 1}
    train(config(llama4, prompts, tmp_path / "a", **how), told.append, rewards=[vowels])
    said = [event["message"] for event in told if event["type"] == "warning"]
    assert any("prompts of more than max_seq_length - max_completion_tokens" in x for x in said)
    with pytest.raises(InputError, match=r"all prompts of train.jsonl are longer than"):
        how["max_seq_length"] = 12
        train(config(llama4, prompts, tmp_path / "b", **how), rewards=[vowels])


def test_rewards_are_measured_on_held_out_rows(llama4, prompts, tmp_path, capsys):
    """The Python API and the command line return the same scores, and pass@1 equals the reward."""
    own = tmp_path / "own.py"
    own.write_text("def odd(completions): return [ord(x[:1] or 'a') % 2 for x in completions]\n")
    how = {"reward_functions": [f"{own}:odd"], "group_size": 4}
    train(config(llama4, prompts, tmp_path / "a", iters=2, **how))
    made = config(llama4, prompts, tmp_path / "unused", **how)
    found = score(made, tmp_path / "a")
    assert (found.rows, found.completions) == (3, 4) and list(found.pass_at) == [1, 2, 4]
    assert math.isclose(found.pass_at[1], found.reward) and found.rewards == {"odd": found.reward}
    assert found == score(made, tmp_path / "a"), "the second score differs from the first"
    argv = ["eval", "--model", str(llama4), "--data", str(prompts), "--adapter-path"]
    argv += [str(tmp_path / "a"), "--reward-functions", f"{own}:odd", "--group-size", "4"]
    argv += ["--max-completion-tokens", "8", "--max-seq-length", "100", "--json"]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reward"] == found.reward and said["pass_at"]["4"] == found.pass_at[4]
    with pytest.raises(InputError, match="call score"):
        evaluate(made)
    assert 0 < found.reward < 1, "a reward of 0 or 1 makes the comparison meaningless"


def test_a_column_may_be_missing_in_rows(llama4, tmp_path):
    """Rewards receive the column in every step, evaluation and score."""
    rows = [{"prompt": f"a{i}", **({"hint": "b"} if i == 3 else {})} for i in range(4)]
    for name, own in (("train", rows), ("valid", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))

    def hinted(completions, hint):
        assert set(hint) <= {None, "b"}
        return [0.0] * len(completions)

    made = config(llama4, tmp_path, tmp_path / "a", batch_size=1, iters=3, steps_per_eval=3)
    train(made, rewards=[hinted])
    assert score(made, split="train", rewards=[hinted]).rows == 4


def test_pass_at():
    assert pass_at(1, 4, [1, 3]) == 0.5
    assert pass_at(4, 4, [0, 1]) == 0.5
    assert math.isclose(pass_at(2, 4, [1]), 0.5)


def test_a_file_of_others_is_left_alone(llama4, prompts, tmp_path):
    file = tmp_path / "a" / "completions.jsonl"
    file.parent.mkdir()
    file.write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match=r"completions.jsonl was not written by a run"):
        train(config(llama4, prompts, tmp_path / "a", iters=1), rewards=[vowels])
    assert file.read_text() == '{"mine": 1}\n'


def test_what_is_wrong_is_said_before_the_model_loads(llama4, prompts, tmp_path):
    with pytest.raises(InputError, match="method grpo needs a reward"):
        train(config(llama4, prompts, tmp_path / "a"))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r'train.jsonl:1: the row needs the keys "prompt"'):
        train(config(llama4, tmp_path, tmp_path / "a"), rewards=[vowels])
    with pytest.raises(InputError, match=r'train.jsonl:1: the row has no column "sum"'):
        train(config(llama4, prompts, tmp_path / "a", rewards=["number:sum"]))
    with pytest.raises(InputError, match=r"needs .* more than the budget"):
        train(config(llama4, prompts, tmp_path / "a", memory_budget_gb=1e-4), rewards=[vowels])


@pytest.mark.parametrize("prompt, most", [(30, 40), (5000, 8)])
def test_generating_takes_no_more_memory_than_planned(prompt, most, llama4, prompts, tmp_path):
    """Tests one case in which the completions use most of the memory, and one in which the prompts
    do."""
    made = config(llama4, prompts, tmp_path / "a", max_completion_tokens=most, max_seq_length=6000)
    model, tokenizer = load_model(llama4)[0], load_tokenizer(llama4)
    how = [Options(max_tokens=most, temperature=1.0, seed=i, logprobs=0) for i in range(12)]
    before = existing_bytes() - read_shape(llama4).weight_bytes(True)
    mx.clear_cache()
    mx.reset_peak_memory()
    complete(Policy(model, tokenizer, None), [[Monologue([1] * prompt)] * 12], [how], 12)
    peak = mx.get_peak_memory() - before
    planned = rollout_bytes(made, prompt + most, 12)
    assert peak <= planned < 2 * peak + SLACK
    tight = made.model_copy(update={"memory_budget_gb": planned / 1e9, "rollout_batch": 12})
    check_rollouts(tight, prompt + most)
    with pytest.raises(InputError, match="rollout_batch is 13, but only 12 completions of"):
        check_rollouts(tight.model_copy(update={"rollout_batch": 13}), prompt + most)


def test_the_longest_prompt_may_be_one_of_validation(llama4, prompts, tmp_path):
    (tmp_path / "train.jsonl").write_bytes((prompts / "train.jsonl").read_bytes())
    (tmp_path / "valid.jsonl").write_text(json.dumps({"prompt": "x" * 80}) + "\n")
    made = config(llama4, tmp_path, tmp_path / "a", max_seq_length=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "rollouts_at_once", lambda config, tokens, every: tokens)
        inputs = setup.read_inputs(made, sources_of(tmp_path, None), lambda event: None)
    longest = inputs.valid.columns.length.max()
    assert inputs.config.rollout_batch == longest + 8 > inputs.train.columns.length.max() + 8


def test_a_probe_generates_and_trains(llama4, prompts, tmp_path):
    found = probe(config(llama4, prompts, tmp_path / "out", rewards=["regex:[aeiou]"]))
    assert found.finite and found.tokens > 0 and not (tmp_path / "out").exists()


def test_plan_says_what_generating_takes(llama4, capsys):
    argv = ["plan", "--model", str(llama4), "--method", "grpo", "--max-seq-length", "100"]
    assert main([*argv, "--max-completion-tokens", "40", "--rollout-batch", "6"]) == 0
    how = {"model_dir": llama4, "adapter_path": "a", "max_completion_tokens": 40}
    wanted = rollout_bytes(TrainConfig(**how, method="grpo"), 100, 6)
    line = f"rollouts {wanted / 1e9:.2f} GB, 6 completions at once"
    assert line in " ".join(capsys.readouterr().out.split())
    argv += ["--max-completion-tokens", "40", "--batch-size", "2", "--ranks", "3"]
    assert main(argv) == 2
    assert "batch_size = 2, but there are 3 ranks" in capsys.readouterr().err
