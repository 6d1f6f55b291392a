"""Tests grpo conversations with an environment. The tokens that the environment and its tools write
are not in the loss."""

import json

import mlx.core as mx
import numpy as np
import pytest

from lib.runs import config_of
from mlx_segtrain import InputError, RunError, TrainConfig, train
from mlx_segtrain.data import Options, Row, eval_batches
from mlx_segtrain.data.encoding import Encoder
from mlx_segtrain.generation import decoding, rollouts
from mlx_segtrain.generation.rollouts import Policy, complete
from mlx_segtrain.models import chain_of, load_model, load_tokenizer
from mlx_segtrain.models.adapting import init, stage_params
from mlx_segtrain.objectives import Functions, objective_of, value_and_grad
from mlx_segtrain.rewards import Rewards, Scores, check_rows
from mlx_segtrain.rewards.environments import Conversation, Environments
from mlx_segtrain.training import cycle
from mlx_segtrain.training.ranks import LostRank

pytestmark = pytest.mark.usefixtures("cache")

#: A tool template similar to those of Hermes and Qwen, from which mlx-lm infers how to parse calls.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}<tool_call>{{ tool_call.name }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Guess:
    """Rejects the first two guesses by naming the right answer, and ends the conversation after the
    third guess."""

    def reset(self, answer, seed):
        self.answer, self.tries, self.seed = answer, [], seed

    def step(self, text):
        self.tries.append(text)
        return None if len(self.tries) == 3 else f"not {text[:1]}, {self.answer}"

    def get_reward(self):
        return float(len("".join(self.tries)) % 7)


class Shelf:
    """An environment with a tool whose result depends on a column of the data set."""

    def reset(self, **columns):
        self.seen = columns["answer"]
        return " Go."

    def add(self, a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return a + b + self.seen

    def _hidden(self):
        raise AssertionError


def configured(environment="lib:Guess", **changes):
    how = {"method": "grpo", "environment": environment, **changes}
    return TrainConfig(model_dir="m", adapter_path="a", **how)


def conversation(tokenizer, kind, seed=3, **given):
    own = Environments.of(configured(), kind)
    encoder = Encoder(tokenizer, Options(method="grpo", tools=own.tools))
    row = encoder.prompt("made:1", {"prompt": "Begin.", "answer": 5, **given})
    own.check(configured(), tokenizer, [row])
    return Conversation(own, tokenizer, configured(), row, seed)


@pytest.fixture(scope="module")
def tokenizer(llama4):
    return load_tokenizer(llama4)


@pytest.fixture(scope="module")
def with_tools(llama4, tmp_path_factory):
    """Returns a model whose template supports tools."""
    path = tmp_path_factory.mktemp("tools") / "model"
    path.mkdir()
    for file in llama4.iterdir():
        if file.name != "chat_template.jinja":
            (path / file.name).write_bytes(file.read_bytes())
    (path / "chat_template.jinja").write_text(TOOLS)
    return path


def test_a_turn_is_followed_by_what_the_template_writes(tokenizer):
    talk = conversation(tokenizer, Guess)
    whole = tokenizer.decode(talk.prompt)
    assert whole == "<|im_start|>user\nBegin.<|im_end|>\n<|im_start|>assistant\n"
    reply = tokenizer.decode(talk.reply("7"))
    assert reply == "\n<|im_start|>user\nnot 7, 5<|im_end|>\n<|im_start|>assistant\n"
    assert talk.reply("8") is not None and talk.reply("9") is None
    assert [own["role"] for own in talk.messages[talk.begun :]] == ["assistant", "user"] * 2 + [
        "assistant"
    ]
    assert talk.environment.tries == ["7", "8", "9"] and talk.environment.seed == 3


def test_tools_are_called_and_their_faults_are_told(with_tools):
    tokenizer = load_tokenizer(with_tools)
    talk = conversation(tokenizer, Shelf)
    assert '"add"' in tokenizer.decode(talk.prompt) and "_hidden" not in tokenizer.decode(
        talk.prompt
    )
    assert "Begin. Go.<|im_end|>" in tokenizer.decode(talk.prompt)
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    reply = talk.reply(f"Well: <tool_call>{json.dumps(call)}</tool_call>")
    assert tokenizer.decode(reply).startswith("\n<|im_start|>tool\n8<|im_end|>\n")
    bad = [
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "reset", "arguments": {}}</tool_call>',
        "<tool_call>not JSON</tool_call>",
    ]
    talk.reply("".join(bad))
    assert talk.messages[-1]["role"] == "assistant", "no turn follows the results"
    assert talk.reply("Done.") is None
    results = [own["content"] for own in talk.messages if own["role"] == "tool"]
    assert [x[:16] for x in results] == [
        "8",
        "error: TypeError",
        "error: ValueErro",
        "error: ValueErro",
    ]
    assert (talk.calls, talk.failed) == (4, 3)
    assert talk.asked == "Begin. Go." and talk.said == talk.messages[1:]


def test_a_rank_that_is_lost_during_a_call_is_no_result_of_it(with_tools):
    """The signal that a rank was lost can arrive at any time. Here, it arrives during a tool
    call."""

    class Lost(Shelf):
        def add(self, a: int, b: int) -> int:
            """Adds two numbers.

            Args:
                a: The first.
                b: The second.
            """
            raise LostRank("rank 1 has ended")

    talk = conversation(load_tokenizer(with_tools), Lost)
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    with pytest.raises(LostRank):
        talk.reply(f"<tool_call>{json.dumps(call)}</tool_call>")


def test_calls_that_the_template_cannot_write(with_tools):
    """A conversation continues even if the chat template cannot render a tool call's arguments or
    several calls in one turn."""
    tokenizer = load_tokenizer(with_tools)
    strict = TOOLS.replace(
        "{{ tool_call.name }}",
        "{% for k, v in tool_call.function.arguments|items %}{{ k }}{% endfor %}"
        "{% if m.tool_calls|length > 1 %}{{ raise_exception('one call') }}{% endif %}",
    )
    tokenizer._tokenizer.chat_template = strict
    talk = conversation(tokenizer, Shelf)
    for said in ('"text"', "[1]", "null", '{"a": 1, "b": 2}'):
        call = f'<tool_call>{{"name": "add", "arguments": {said}}}</tool_call>'
        for calls in (call, call * 2):
            reply = tokenizer.decode(talk.reply(calls))
            assert reply.startswith("\n<|im_start|>tool\n")
    assert (talk.calls, talk.failed) == (12, 9)


def test_a_prompt_with_a_message_without_content(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "b"},
    ]
    talk = conversation(tokenizer, Guess, prompt=prompt)
    assert talk.reply("7") is not None and talk.asked == prompt


def rolled(model, options, kind=Guess, at_once=4, turns=8, **tokens):
    tokenizer = load_tokenizer(model)
    loaded = load_model(model)[0]
    loaded.eval()
    talks = [[conversation(tokenizer, kind, i) for i in range(6)]]
    how = decoding.Options(temperature=1.0, logprobs=0, **tokens)
    own = [[decoding.Options(**{**vars(how), "seed": i}) for i in range(6)]]
    (made,) = complete(Policy(loaded, tokenizer, None), talks, own, at_once, turns)
    return loaded, talks[0], made


@pytest.fixture
def talkative(monkeypatch):
    """Makes every turn three tokens long."""

    def add(self, token):
        self.count = getattr(self, "count", 0) + 1
        self.stopped = self.count == 3
        return ""

    monkeypatch.setattr(rollouts.Unread, "add", add)


def test_log_probabilities_are_those_after_all_that_was_said(llama4, talkative):
    """The log-probabilities are correct even if a batch contains conversations with turns of
    different lengths."""
    model, talks, made = rolled(llama4, {}, max_tokens=400)
    for talk, own in zip(talks, made, strict=True):
        assert own.turns == 3 and own.finish == "stop" and own.prompt == talk.prompt
        assert talk.said[-1] == {"role": "assistant", "content": own.text}
        assert len(own.tokens) == len(own.drawn) == len(own.log_p) and own.length <= 9
        whole = mx.array([*own.prompt, *own.tokens])[None]
        z = model(whole[:, :-1]).astype(mx.float32)[0, len(own.prompt) - 1 :]
        z = z - mx.logsumexp(z, axis=-1, keepdims=True)
        wanted = np.array(mx.take_along_axis(z, mx.array(own.tokens)[:, None], axis=-1))[:, 0]
        assert np.allclose(own.log_p[own.drawn], wanted[own.drawn], atol=1e-3)
        assert not own.log_p[~own.drawn].any() and (~own.drawn).sum() > 20
    assert len({tuple(own.tokens) for own in made}) == 6, "turns share a seed"


def test_what_ends_a_conversation(llama4, talkative):
    _, talks, made = rolled(llama4, {}, max_tokens=400, turns=2)
    assert {own.finish for own in made} == {"turns"}
    assert [[x["role"] for x in own.said] for own in talks] == [
        ["assistant", "user", "assistant"]
    ] * 6
    _, talks, made = rolled(llama4, {}, max_tokens=2)
    # Conversations that reach the maximum number of tokens are truncated.
    for talk, own in zip(talks, made, strict=True):
        assert talk.said[0] == {"role": "assistant", "content": own.text}
        assert own.finish == "length" and len(talk.said) == own.turns == 1
    _, talks, made = rolled(llama4, {}, max_tokens=20)
    assert [len(own.said) for own in talks] == [1] * 6, (
        "text that was too long must not be in the tokens"
    )
    assert {own.finish for own in made} == {"length"} and max(own.length for own in made) <= 3


def test_tokens_of_the_environment_get_no_gradient(llama4, talkative, monkeypatch):
    """The loss and gradient do not depend on the environment's tokens, and positions that predict
    such tokens are not in the loss."""
    model, _, made = rolled(llama4, {}, max_tokens=400)
    chain = chain_of(model)
    config = configured(grpo_beta=0.0, max_completion_tokens=400, max_seq_length=600)
    found = cycle.Rollouts(
        [Row(np.array(made[0].prompt, np.int32), None, "made:1")], [made], Scores({}, [0.0] * 6), []
    )
    own = object.__new__(cycle.Cycle)
    own.objective = objective_of(config)
    own.setup = type("Setup", (), {"config": config, "train": type("T", (), {"pad_id": 0})})
    data = cycle.Cycle._trained(own, found, found.made, np.arange(6.0)[None] - 2.5)
    rows = data.rows
    for row, one in zip(rows, made, strict=True):
        inside = np.concatenate([np.zeros(len(one.prompt), bool), one.drawn])
        assert np.array_equal(row.weights != 0, inside)
        assert np.isclose(row.weights.sum(), 1 / 6), "the mean is not over sampled tokens"
    (batch,) = eval_batches(data, 6)
    seen = []
    plain = type(own.objective)._outputs

    def outputs(self, log_p, *reads):
        seen.append(log_p.shape[0])
        return plain(self, log_p, *reads)

    monkeypatch.setattr(type(own.objective), "_outputs", outputs)
    adapter = init(chain, dict.fromkeys(chain.linears, 4), 1.0, 0)
    functions = Functions(own.objective, chain, adapter.scales)
    params = stage_params(chain, adapter)
    cuts = {"cuts": lambda streams: chain.cuts(0, streams)}
    (loss, *_), _ = value_and_grad(functions, params, batch, 1.0, **cuts)
    mx.eval(loss)
    assert set(seen) == {sum(one.length for one in made)}


def test_a_run_talks_learns_and_resumes(llama4, tmp_path, talkative):
    """The environment is a Python class. Reward functions receive the environments, and the log
    contains the messages."""
    rows = [{"prompt": f"Guess {i}.", "answer": i} for i in range(4)]

    def run(out, iters, **more):
        how = {"batch_size": 2, "group_size": 3, "max_completion_tokens": 60, "iters": iters}
        how |= {"max_seq_length": 128, "method": "grpo", "max_turns": 2, "steps_per_save": 1}
        own = config_of(llama4, None, tmp_path / out, **{**how, **more}, environment="m:Guess")

        def tried(environments, messages, completions):
            assert [own[-1]["content"] for own in messages] == completions
            for own, talk in zip(environments, messages, strict=True):
                assert own.tries == [x["content"] for x in talk[::2]][: len(own.tries)]
            return [len(own.tries) for own in environments]

        return train(own, train_data=rows, rewards=[tried], environment=Guess)

    run("whole", 2)
    run("parts", 1)
    run("parts", 2, resume=True)
    both = [(tmp_path / x / "completions.jsonl").read_bytes() for x in ("whole", "parts")]
    assert both[0] == both[1]
    lines = [json.loads(line) for line in both[0].splitlines()]
    assert len(lines) == 12 and any(len(line["messages"]) > 2 for line in lines)
    assert all(line["rewards"].keys() == {"tried", "Guess"} for line in lines)
    adapters = [(tmp_path / x / "adapters.safetensors").read_bytes() for x in ("whole", "parts")]
    assert adapters[0] == adapters[1]


class Silent:
    """An environment without `step` and without tools."""

    def reset(self): ...


class Untyped:
    def reset(self): ...
    def tool(self, x): ...


def test_what_is_refused(tokenizer, with_tools):
    for kind, says in (
        (Silent, "neither a step method nor"),
        (Untyped, "tool"),
        (int, "no reset method"),
    ):
        with pytest.raises(InputError, match=f"environment: lib:Guess cannot be used .*{says}"):
            Environments.of(configured(), kind)
    with pytest.raises(InputError, match="mlx-lm cannot read the tool calls"):
        conversation(tokenizer, Shelf)
    with pytest.raises(InputError, match="this run uses the tools of environment"):
        conversation(load_tokenizer(with_tools), Shelf, tools=[{"type": "function"}])
    raw = configured(prompt_format="raw")
    with pytest.raises(InputError, match="requires a chat template"):
        Environments.of(raw, Guess).check(raw, tokenizer, [])
    with pytest.raises(InputError, match="max_turns has no effect without environment"):
        TrainConfig(model_dir="m", adapter_path="a", method="grpo", max_turns=3)
    row = Row(np.zeros(1, np.int32), np.zeros(1, np.float32), "made:1", given={"seed": 1})
    with pytest.raises(InputError, match='the row has a column "seed"'):
        check_rows(configured(), [row])
    assert list(Rewards.of(configured(), [], Guess).rewards) == ["Guess"]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (7, "step returned 7; it must return a string"),
        (RuntimeError("oh"), r"step failed \(RuntimeError: oh\)"),
    ],
)
def test_an_environment_that_fails_ends_the_run(said, says, tokenizer):
    class Wrong(Guess):
        def step(self, text):
            if isinstance(said, Exception):
                raise said
            return said

    talk = conversation(tokenizer, Wrong)
    with pytest.raises(RunError, match=f"environment Guess: {says}"):
        talk.reply("a")
