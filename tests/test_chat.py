"""Tests the command `chat`: conversations in the terminal with the base model and with adapters."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import mlx_lm
import pytest

from lib.folders import write_rows
from lib.runs import config_of
from mlx_segtrain import load
from mlx_segtrain.commands import chat as chats
from mlx_segtrain.commands import generate
from mlx_segtrain.commands import main as cli
from mlx_segtrain.data import Prompting
from mlx_segtrain.generation.decoding import Options
from mlx_segtrain.generation.rollouts import Monologue, Policy, complete
from mlx_segtrain.models import load_base
from mlx_segtrain.training import train

TOKENS = 8
#: The values of the sampling options of `chat` if no flags are given.
NOTHING = {f"draw_{name}": None for name in generate.DRAWING}


@pytest.fixture(scope="module")
def adapters(llama4, tmp_path_factory):
    """Returns two adapters whose responses differ."""
    root = tmp_path_factory.mktemp("adapters")
    data = write_rows(root / "data")
    for name, seed in (("one", 0), ("two", 1)):
        train(config_of(llama4, data, root / name, iters=12, seed=seed, learning_rate=3e-2))
    return [root / "one", root / "two"]


def told(monkeypatch, capsys, model, lines, *argv):
    """Runs `chat` with these input lines and returns the output."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    how = ["--model", str(model), "--max-tokens", str(TOKENS)]
    assert cli.main(["chat", *how, *map(str, argv)]) == 0
    return capsys.readouterr().out


def answer(model_dir, adapter, turns):
    """Returns mlx-lm's response for our model, computed without a cache of earlier turns."""
    model, tokenizer = load(model_dir, adapter)
    prompt = Prompting().chat_ids(tokenizer, turns)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS)


def user(text):
    return {"role": "user", "content": text}


def test_a_conversation_has_what_was_said_before(llama4, adapters, monkeypatch, capsys):
    first, second = "Count to 3.", "And to 5."
    out = told(monkeypatch, capsys, llama4, [first, second], "--adapter", adapters[0])
    one = answer(llama4, adapters[0], [user(first)])
    turns = [user(first), {"role": "assistant", "content": one}, user(second)]
    two = answer(llama4, adapters[0], turns)
    assert out == f"llama4, answering with one; /help lists commands\n{one}\n{two}\n"


def test_adapters_are_switched_and_compared(llama4, adapters, monkeypatch, capsys):
    ask = "Count to 3."
    typed = [ask, "/adapter two", "/retry", "/adapter 0", "/retry", "/adapter one", "/compare"]
    out = told(monkeypatch, capsys, llama4, [*typed, "/retry"], "--adapter", *adapters)
    base, one, two = (answer(llama4, own, [user(ask)]) for own in (None, *adapters))
    assert len({base, one, two}) == 3
    assert out.split("lists commands\n")[1] == (
        f"{one}\nanswering with two\n{two}\nanswering with base\n{base}\nanswering with one\n"
        f"answering with base, one, two\n\n[base] {base}\n\n[one] {one}\n\n[two] {two}\n"
    )


def test_a_system_message_and_a_new_conversation(llama4, adapters, monkeypatch, capsys):
    ask, system = "Count to 3.", {"role": "system", "content": "Be brief."}
    typed = [ask, "/clear", ask, "/system", ask]
    out = told(monkeypatch, capsys, llama4, typed, "--system", "Be brief.")
    brief = answer(llama4, None, [system, user(ask)])
    plain = answer(llama4, None, [user(ask)])
    note = "started a new conversation"
    assert out.split("lists commands\n", 1)[1] == f"{brief}\n{note}\n{brief}\n{note}\n{plain}\n"


def test_a_message_that_the_template_refuses(llama4, monkeypatch, capsys, tmp_path):
    """The chat continues without the message."""
    model = shutil.copytree(llama4, tmp_path / "m")
    template = model / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    typed = ["Count.", "/system be brief", "Count more.", "/system", "Count."]
    plain = told(monkeypatch, capsys, model, ["Count."]).split("lists commands\n", 1)[1]
    said = told(monkeypatch, capsys, model, typed).split("lists commands\n", 1)[1]
    assert "the chat template cannot render these messages (TemplateError: No system).\n" in said
    assert said.startswith(plain) and said.endswith(plain)
    argv = ["generate", "--model", str(model), "--prompt", "a", "--system", "b"]
    assert cli.main(argv) == 2 and "TemplateError: No system" in capsys.readouterr().err


def test_commands_that_cannot_be_obeyed_say_so(llama4, monkeypatch, capsys):
    typed = ["", "/retry", "/compare", "/adapter x", "/foo", "/help", "/exit", "never read"]
    out = told(monkeypatch, capsys, llama4, typed).split("lists commands\n", 1)[1]
    assert out.startswith(
        "there is no message to answer yet\n"
        "there is no adapter to compare with: start chat with --adapter DIR\n"
        "there is no adapter x; answering with base; choose one of: 0 base\n"
        "unknown command /foo: /help lists the commands\n"
        "/adapter NAME "
    )
    assert out.endswith(f"{chats.HELP}\n")


def test_what_is_cached_is_not_computed_again(llama4, adapters, monkeypatch):
    seen = []
    stream = mlx_lm.stream_generate

    def watched(model, tokenizer, prompt, **how):
        seen.append(len(prompt))
        return stream(model, tokenizer, prompt, **how)

    monkeypatch.setattr(sys.modules["mlx_lm.generate"], "stream_generate", watched)
    args = SimpleNamespace(system=None, max_tokens=TOKENS, temp=0.0, **NOTHING)
    model, _, tokenizer = load_base(llama4)
    chat = chats.Chat(model, tokenizer, [chats.Voice("base", None, Prompting())], args)
    for text in ("Count to 3.", "And to 5."):
        chat.turns.append(user(text))
        chat.answers(lambda text: None)
    whole = Prompting().chat_ids(tokenizer, chat.turns[:3])
    assert len(seen) == 2 and seen[1] <= len(whole) - seen[0]


def test_an_answer_that_is_stopped_is_kept(llama4, monkeypatch):
    args = SimpleNamespace(system=None, max_tokens=TOKENS, temp=0.0, **NOTHING)
    model, _, tokenizer = load_base(llama4)
    chat = chats.Chat(model, tokenizer, [chats.Voice("base", None, Prompting())], args)

    def say(text):
        if said:
            said.append(text)
            return
        said.append(text)
        raise KeyboardInterrupt

    said = []
    chat.turns.append(user("Count to 3."))
    chat.answers(say)
    assert chat.turns[-1] == {"role": "assistant", "content": said[0]}
    assert said[1] == " …"
    chat.turns.append(user("On."))
    chat.answers(said.append)
    assert len(chat.turns) == 4 and chat.turns[-1]["content"]


def test_names_are_told_apart(tmp_path):
    same = [tmp_path / "a" / "out", tmp_path / "b" / "out"]
    assert chats._names(same) == [str(path) for path in same]
    assert chats._names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert chats._names([tmp_path / "base"]) == [str(tmp_path / "base")]


def test_an_adapter_of_another_model_is_refused(llama4, adapters, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"rank": 2}))
    assert cli.main(["chat", "--model", str(llama4), "--adapter", str(tmp_path / "a")]) == 2
    assert str(tmp_path / "a") in capsys.readouterr().err


DRAWN = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "seed": 7}
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}


@pytest.mark.parametrize("how", [DRAWN, PENALTIES, DRAWN | PENALTIES])
def test_tokens_are_chosen_as_the_server_chooses_them(llama4, monkeypatch, capsys, how):
    """`chat`, `generate` and HTTP requests have the same sampling options."""
    taken, own = [], generate.stream

    def stream(*args, **more):
        for part in own(*args, **more):
            taken.append(part.token)
            yield part

    monkeypatch.setattr(generate, "stream", stream)
    flags = [x for name, own in how.items() for x in (f"--{name.replace('_', '-')}", str(own))]
    asked = ["--model", str(llama4), "--max-tokens", str(TOKENS), *flags]
    assert cli.main(["generate", *asked, "--prompt", "Count to 3."]) == 0
    said, generated = capsys.readouterr().out, taken[:]
    taken.clear()
    assert told(monkeypatch, capsys, llama4, ["Count to 3."], *flags, "--quiet") == said
    model, tokenizer = load(llama4)
    prompt = Prompting().chat_ids(tokenizer, [user("Count to 3.")])

    def tokens(**how):
        options = Options(max_tokens=TOKENS, logprobs=0, **({"seed": 0} | how))
        policy = Policy(model, tokenizer, None)
        ((found,),) = complete(policy, [[Monologue(prompt)]], [[options]], 1)
        return found.tokens

    assert generated == taken == tokens(**how) != tokens()


def test_what_greedy_decoding_does_not_use_is_refused(capsys):
    for name in ("--top-p", "--top-k", "--min-p", "--seed"):
        assert cli.main(["generate", "--model", "m", "--prompt", "p", name, "1"]) == 2
        assert f"{name} has no effect at temperature 0" in capsys.readouterr().err
    for name, wrong in (("--top-p", "1.1"), ("--min-p", "-1"), ("--repetition-penalty", "0")):
        assert cli.main(["chat", "--model", "m", name, wrong]) == 2
        assert f"argument {name}: expected a number" in capsys.readouterr().err
