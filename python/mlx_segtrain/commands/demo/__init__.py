"""The demo: a small model learns to describe functions of Python's standard library in one line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import mlx_segtrain
from mlx_segtrain import files
from mlx_segtrain.commands.demo.docstrings import write_dataset
from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
from mlx_segtrain.commands.generate import shared
from mlx_segtrain.commands.terminal import Terminal, as_it_is, width_of
from mlx_segtrain.commands.words import command_line, duration
from mlx_segtrain.config import load_config
from mlx_segtrain.errors import InputError
from mlx_segtrain.ops.selfcheck import on_gpu
from mlx_segtrain.training import TrainResult, train
from mlx_segtrain.training.curves import draw

# A step with 4 short rows takes two seconds on 2 cores. After 20 steps, the loss has fallen by a
# quarter.
ITERS = 20
SHOWN = 3  # number of held-out questions that the model answers before and after training
ANSWER_TOKENS = 30  # maximum tokens of an answer; docstrings have 12 on average


def run(out_dir: Path = Path("demo-run"), iters: int = ITERS) -> None:
    """Trains SmolLM2-135M on docstrings, and shows the result. Writes the folders docstrings/ and
    adapter/.

    The model is cached in files.cache_dir(). Raises InputError if out_dir contains files that are
    not from an earlier demo, or if the model cannot be downloaded. After Ctrl-C during training,
    saves the adapter and raises KeyboardInterrupt.
    """
    begin = time.perf_counter()
    console = Console(highlight=False)
    data_dir = out_dir / "docstrings"
    if out_dir.exists() and os.listdir(out_dir) and not data_dir.is_dir():
        raise InputError(
            f"{out_dir} contains files that are not from an earlier demo: choose another directory"
        )
    say = console.print
    say("model: SmolLM2-135M-Instruct, 4 bits (the first run downloads 93 MB)")
    model_dir = smollm2_snapshot(files.cache_dir())
    rows = write_dataset(data_dir)
    say(f"data: {rows['train']:,} docstrings, and {rows['valid']} from held-out modules")

    settings = {
        "model_dir": model_dir,
        "data_dir": data_dir,
        "adapter_path": out_dir / "adapter",
        "rank": 16,
        "scale": 2.0,
        "iters": iters,
        "learning_rate": 5e-4,
        "max_seq_length": 256,
        "batch_size": 4,
        "steps_per_report": 2,
        "steps_per_eval": 20,
        "overwrite": True,  # the directory belongs to the demo, see above
    }
    config = load_config(None, settings)
    held_out = _held_out(data_dir / "valid.jsonl")
    questions = [question for question, _ in held_out]
    say(f"the model answers {SHOWN} held-out questions ...")
    before = _answers(model_dir, None, questions)
    with Terminal() as show:
        trained = train(config, show, on_step=show.step)
    if trained.interrupted:
        raise KeyboardInterrupt
    say(f"the trained model answers the same {SHOWN} questions ...")
    after = _answers(model_dir, config.adapter_path, questions)

    wall_s = time.perf_counter() - begin
    draw(config.adapter_path / "metrics.jsonl", "SmolLM2-135M on docstrings")
    for (question, docstring), then, now in zip(held_out, before, after, strict=True):
        table = Table(title=Text(question.splitlines()[-1]), show_header=False)
        table.add_row("docstring", Text(docstring))
        table.add_row("before", Text(then))
        table.add_row("after", Text(now))
        console.print(table)
    _show_result(trained, wall_s, console)
    own = ["--model", str(model_dir), "--adapter-path", str(config.adapter_path)]
    asked = [*own, "--prompt", questions[0]]
    commands = [["mlx-segtrain", "chat", *own], ["mlx-segtrain", "generate", *asked]]
    if on_gpu():  # on a CPU, stock mlx-lm takes seconds per token
        commands.append(["python", "-m", "mlx_lm", "generate", *asked])
    for command in commands:
        as_it_is(console)("\n" + command_line(command, width_of(console)))


def _held_out(valid: Path) -> list[tuple[str, str]]:
    """Returns the questions and docstrings of the first rows of valid.jsonl."""
    lines = valid.read_text(encoding="utf-8").splitlines()[:SHOWN]
    turns = [json.loads(line)["messages"] for line in lines]
    return [(user["content"], assistant["content"]) for user, assistant in turns]


def _answers(model_dir: Path, adapter_path: Path | None, questions: list[str]) -> list[str]:
    """Answers each question with greedy decoding. Each prompt reuses the cache for the prefix that
    it shares with the previous prompt."""
    from mlx_lm import generate
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    model, tokenizer = mlx_segtrain.load(model_dir, adapter_path)
    cache = make_prompt_cache(model)
    last: list[int] = []
    answers = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        # At least one token must be processed, to compute the logits of the first answer token.
        known = shared(last, ids[:-1])
        trim_prompt_cache(cache, cache[0].offset - known)
        text = generate(model, tokenizer, ids[known:], max_tokens=ANSWER_TOKENS, prompt_cache=cache)
        answers.append(" ".join(text.split()))
        last = ids
    return answers


def _show_result(trained: TrainResult, wall_s: float, console: Console) -> None:
    # The demo always writes valid.jsonl, so there are validation losses.
    assert trained.first_val_loss is not None and trained.final_val_loss is not None
    before, after = trained.first_val_loss, trained.final_val_loss
    table = Table(title="Result", show_header=False)
    table.add_row("validation loss", f"{before:.3f} -> {after:.3f} ({after / before - 1:+.0%})")
    table.add_row("speed", f"{trained.tokens_per_sec:,.0f} tokens/s")
    table.add_row("peak memory", f"{trained.peak_gb:.2f} GB")
    table.add_row("time", duration(wall_s))
    table.add_row("adapter", Text(str(trained.adapter_path)))
    table.add_row("loss curve", Text(str(trained.adapter_path / "loss.png")))
    console.print(table)
