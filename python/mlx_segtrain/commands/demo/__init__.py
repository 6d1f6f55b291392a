"""The demo: a small model learns to say in one line what a function of the library does."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import mlx_segtrain
from mlx_segtrain import files
from mlx_segtrain.commands.demo.docstrings import write_dataset
from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
from mlx_segtrain.commands.terminal import Terminal, duration
from mlx_segtrain.config import TrainConfig, load_config
from mlx_segtrain.errors import InputError
from mlx_segtrain.training.curves import draw

# A step of 4 short rows takes seconds on 2 cores; after 20 the loss has fallen by a quarter.
ITERS = 40
SHOWN = 3  # held-out questions that are answered before and after
ANSWER_TOKENS = 30  # docstrings take 12 on average


@dataclass(frozen=True)
class Answer:
    """A held-out question, its docstring, and the model's greedy answers."""

    question: str
    docstring: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; losses in nats per token."""

    adapter_path: Path
    curve_path: Path
    val_loss_before: float
    val_loss_after: float
    answers: list[Answer]
    tokens_per_sec: float
    peak_gb: float
    wall_s: float


def run(
    out_dir: Path = Path("demo-run"),
    cache_dir: Path | None = None,
    iters: int | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Train SmolLM2-135M on docstrings and show it: out_dir gets docstrings/ and adapter/.

    The model is kept in cache_dir ($MLX_SEGTRAIN_CACHE or ~/.cache/mlx-segtrain). InputError if
    out_dir holds other files, or the model cannot be downloaded;
    KeyboardInterrupt after Ctrl-C during training, with the adapter saved.
    """
    begin = time.perf_counter()
    console = console or Console(highlight=False)
    data_dir = out_dir / "docstrings"
    if out_dir.exists() and os.listdir(out_dir) and not data_dir.is_dir():
        raise InputError(
            f"{out_dir} holds files that are not of an earlier demo: name another directory"
        )
    say = console.print
    say("model: SmolLM2-135M-Instruct, 4 bits (the first time it is downloaded, 93 MB)")
    model_dir = smollm2_snapshot(cache_dir or files.cache_dir())
    rows = write_dataset(data_dir)
    say(f"data: {rows['train']:,} docstrings, and {rows['valid']} of modules held out")

    settings = {
        "model_dir": model_dir,
        "data_dir": data_dir,
        "adapter_path": out_dir / "adapter",
        "rank": 16,
        "scale": 2.0,
        "iters": iters or ITERS,
        "learning_rate": 5e-4,
        "max_seq_length": 256,
        "batch_size": 4,
        "steps_per_report": 5,
        "steps_per_eval": 20,
        "overwrite": True,  # the directory is the demo's own, see above
    }
    config = load_config(None, settings)
    held_out = _held_out(data_dir / "valid.jsonl")
    questions = [question for question, _ in held_out]
    say(f"the model answers {SHOWN} held-out questions ...")
    before = _answers(model_dir, None, questions)
    with Terminal(console) as show:
        trained = mlx_segtrain.train(config, show)
    if trained.interrupted:
        raise KeyboardInterrupt
    # There is a valid.jsonl, so there are validation losses.
    assert trained.first_val_loss is not None and trained.final_val_loss is not None
    say(f"the trained model answers the same {SHOWN} questions ...")
    after = _answers(model_dir, config.adapter_path, questions)

    result = DemoResult(
        adapter_path=config.adapter_path,
        curve_path=config.adapter_path / "loss.png",
        val_loss_before=trained.first_val_loss,
        val_loss_after=trained.final_val_loss,
        answers=[Answer(*row, *pair) for row, *pair in zip(held_out, before, after, strict=True)],
        tokens_per_sec=trained.tokens_per_sec,
        peak_gb=trained.peak_gb,
        wall_s=time.perf_counter() - begin,
    )
    draw(config.adapter_path / "metrics.jsonl", "SmolLM2-135M on docstrings")
    _show(result, config, console)
    return result


def _held_out(valid: Path) -> list[tuple[str, str]]:
    """(question, docstring) of the first rows of valid.jsonl."""
    lines = valid.read_text(encoding="utf-8").splitlines()[:SHOWN]
    turns = [json.loads(line)["messages"] for line in lines]
    return [(user["content"], assistant["content"]) for user, assistant in turns]


def _answers(model_dir: Path, adapter_path: Path | None, questions: list[str]) -> list[str]:
    """Greedy answers; what a prompt shares with the one before it is not computed again."""
    from mlx_lm import generate
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    model, tokenizer = mlx_segtrain.load(model_dir, adapter_path)
    cache = make_prompt_cache(model)
    last: list[int] = []
    answers = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        # At least one token has to be left, whose logits begin the answer.
        pairs = zip(last, ids[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        trim_prompt_cache(cache, cache[0].offset - shared)
        text = generate(
            model, tokenizer, ids[shared:], max_tokens=ANSWER_TOKENS, prompt_cache=cache
        )
        answers.append(" ".join(text.split()))
        last = ids
    return answers


def _show(result: DemoResult, config: TrainConfig, console: Console) -> None:
    for answer in result.answers:
        table = Table(title=Text(answer.question.splitlines()[-1]), show_header=False)
        table.add_row("docstring", Text(answer.docstring))
        table.add_row("before", Text(answer.before))
        table.add_row("after", Text(answer.after))
        console.print(table)
    fall = 1 - result.val_loss_after / result.val_loss_before
    table = Table(title="Result", show_header=False)
    losses = f"{result.val_loss_before:.3f} -> {result.val_loss_after:.3f} ({-fall:+.0%})"
    table.add_row("validation loss", losses)
    table.add_row("speed", f"{result.tokens_per_sec:,.0f} tokens/s")
    table.add_row("peak memory", f"{result.peak_gb:.2f} GB")
    table.add_row("time", duration(result.wall_s))
    table.add_row("adapter", Text(str(result.adapter_path)))
    table.add_row("loss curve", Text(str(result.curve_path)))
    console.print(table)
    prompt = shlex.quote(result.answers[0].question)
    model, adapter = shlex.quote(str(config.model_dir)), shlex.quote(str(config.adapter_path))
    for command in ("mlx-segtrain generate --model-dir", "python -m mlx_lm generate --model"):
        text = f"\n{command} {model} --adapter-path {adapter} --prompt {prompt}"
        console.print(text, markup=False, soft_wrap=True)
