"""Tests the command line: a flag for every field of the configuration, one-sentence errors, exit
codes, and summaries."""

import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import ANY, Mock, create_autospec

import pytest

from mlx_segtrain import RunError, data, events, training
from mlx_segtrain.commands import main as cli
from mlx_segtrain.config import TrainConfig, flag

REQUIRED = ["--model", "m", "--data", "d", "--adapter-path", "a"]
COMMANDS = [
    *("train", "probe", "verify", "plan", "export", "import", "merge", "adapters", "inspect"),
    *("eval", "generate", "doctor", "bench", "demo"),
]
TRAINED = training.TrainResult(
    adapter_path=Path("a b"),
    steps=20,
    first_val_loss=3.0,
    final_val_loss=2.0,
    best_val_loss=1.5,
    best_step=10,
    first_val_accuracy=0.5,
    final_val_accuracy=0.9,
    final_train_loss=1.25,
    wall_s=61.0,
    tokens_per_sec=12345.6,
    supervised_tokens_per_sec=1234.5,
    peak_gb=3.25,
    planned_gb=3.25,
    process_gb=3.0,
    applied_ranks={},
    interrupted=False,
    stopped_early=False,
)


def replace(monkeypatch: pytest.MonkeyPatch, name: str, result: Any) -> Mock:
    """Replaces a training function with a mock that has the same signature and returns `result`."""
    mock = create_autospec(getattr(training, name), return_value=result)
    monkeypatch.setattr(training, name, mock)
    return mock


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Mock:
    return replace(monkeypatch, "train", TRAINED)


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command with bad input and returns its one-sentence error. Checks that no files are
    written."""
    before = sorted(Path().rglob("*"))
    assert cli.main(argv) == 2
    assert sorted(Path().rglob("*")) == before
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mlx-segtrain: error: ") and err.count("\n") == 1
    return err.removeprefix("mlx-segtrain: error: ").rstrip()


def test_alone_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mlx-segtrain {command}")


def test_help_names_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help-all"])
    out = capsys.readouterr().out
    assert "--rank-scaling {constant,by_bits,by_kl}" in out
    assert "--grad-checkpoint, --no-grad-checkpoint" in out
    assert "Default: 0.0002, or 5e-5 for" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("mlx-segtrain 0.")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, mlx_segtrain.commands.main as c; c.main([]); "
        "sys.exit(', '.join({'mlx.nn', 'mlx_lm', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


GIVEN = ("grad_accumulation_steps", "append_eos", "lora_dropout", "parallel")


def changed(method: str) -> dict[str, Any]:
    """Returns non-default values for all fields that affect this method."""
    common = {
        "model_dir": "m1",
        "data_dir": "d1",
        "adapter_path": "a1",
        "optimizer": "lion",
        "learning_rate": 1e-5,
        "warmup_iters": 2,
        "lora_plus_ratio": 4.0,
        "lora_dropout": 0.1,
        "max_seq_length": 77,
        "batch_size": 3,
        "grad_accumulation_steps": 4,
        "parallel": "pipeline",
        "seed": 11,
        "steps_per_report": 5,
        "steps_per_eval": 6,
        "weight_decay": 0.5,
        "grad_clip_norm": 0.0,
        "activation_offloading": False,
        "segment_size": 2,
        "memory_budget_gb": 20.5,
        "deterministic": False,
        "matmul_precision": "bfloat16",
        "steps_per_save": 3,
        "keep_checkpoints": 4,
        "on_spike": "skip",
        "report_to": ["wandb", "tensorboard"],
        "save_checkpoints": True,
        "early_stopping_patience": 3,
        "keep_best": True,
        "sample_prompts": ["why?", "how?"],
        "sample_tokens": 9,
        "eval_command": "score {adapter}",
        "append_eos": False,
        "prompt_format": "raw",
        "data_format": "alpaca",
        "columns": {"prompt": "query"},
        "chat_template_kwargs": {"enable_thinking": False},
        "val_split": 0.25,
        "dedup": True,
        "strict": True,
        "overwrite": True,
    }
    fresh = {
        **{"rank": 9, "scale": 2.5, "rank_scaling": "constant", "num_layers": 3, "iters": 7},
        **{"target_modules": ["q_proj", "up_proj"], "rs_lora": True, "use_dora": True},
    }
    own = {
        "sft": {**fresh, "lr_schedule": "cosine", "train_on": "last", "packing": "auto"},
        "dpo": {
            **{"warm_start": "w", "epochs": 2.5, "dpo_beta": 0.2, "lr_schedule": "linear"},
            **{"dpo_loss": "robust", "label_smoothing": 0.2, "reference_free": True},
        },
        "orpo": {**fresh, "orpo_lambda": 0.3, "sft_scope": "response", "lr_schedule": "wsd"},
        "kto": {
            **{**fresh, "kto_beta": 0.2, "kto_loss": "apo_zero_unpaired"},
            **{"desirable_weight": 2.0, "undesirable_weight": 0.5, "lr_schedule": "linear"},
        },
        "simpo": {**fresh, "simpo_beta": 1.5, "simpo_gamma": 0.5, "lr_schedule": "linear"},
        "grpo": {
            **{**fresh, "rewards": ["number:answer", "length:9"], "reward_weights": [1.0, 0.5]},
            **{"reward_functions": ["m:f", "a.py:g"], "reward_command": "./score"},
            **{"reward_model": "judge", "environment": "e.py:Game", "max_turns": 3},
            **{"group_size": 5, "max_completion_tokens": 20, "temperature": 0.8},
            **{"grpo_loss": "gspo", "advantage_scaling": "batch", "grpo_beta": 0.04},
            **{"clip_low": 0.1, "clip_high": 0.3, "mask_truncated": True, "updates_per_step": 2},
            **{"importance_cap": 3.0, "rollout_batch": 6, "collapse_patience": 4},
            **{"packing": True, "lr_schedule": "linear"},
        },
    }[method]
    if method == "grpo":  # grpo ignores these fields
        common = {k: x for k, x in common.items() if k not in GIVEN}
    return {**common, **own, **({} if method == "sft" else {"method": method})}


METHODS = get_args(TrainConfig.model_fields["method"].annotation)


def test_every_field_is_tried() -> None:
    tried = {name for method in METHODS for name in changed(method)}
    # grad_checkpoint and resume are not tried, because they cannot be combined with segment_size
    # and overwrite.
    assert tried | {"grad_checkpoint", "resume"} == set(TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("argv", "value"),
    [([], False), (["--resume"], True), (["--resume", "auto"], "auto"), (["--resume=no"], False)],
)
def test_resume_alone_or_with_a_word(argv: list, value: object, monkeypatch: Any) -> None:
    train = Mock(return_value=TRAINED)
    monkeypatch.setattr(training, "train", train)
    paths = ["--model", "m", "--data", "d", "--adapter-path", "a"]
    assert cli.main(["train", *argv, *paths]) == 0
    assert train.call_args[0][0].resume == value


def test_resume_takes_no_other_word(capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--model", "m", "--data", "d", "--adapter-path", "a"]
    assert cli.main(["train", "--resume", "yesterday", *paths]) == 2
    assert "resume must be true, false or auto; got 'yesterday'" in capsys.readouterr().err


def test_a_run_that_cannot_go_on_is_one_sentence(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(training, "train", Mock(side_effect=RunError("step 3: the disk is full.")))
    assert cli.main(["train", "--model", "m", "--data", "d", "--adapter-path", "a"]) == 1
    assert capsys.readouterr().err == "mlx-segtrain: error: step 3: the disk is full.\n"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("command", ["train", "probe"])
def test_every_field_has_a_flag(command: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = changed(method)
    argv = [command]
    for name, value in given.items():
        if isinstance(value, dict):
            argv += [flag(name), json.dumps(value)]
        elif isinstance(value, bool):
            argv.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            argv += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    probed = training.ProbeResult(
        step_s=0.5,
        first_step_s=1,
        peak_gb=1,
        planned_gb=1,
        resting_gb=1,
        loss=1,
        grad_norm=1,
        finite=True,
        tokens=1,
    )
    call = replace(monkeypatch, command, TRAINED if command == "train" else probed)
    assert cli.main(argv) == 0
    got = json.loads(call.call_args.args[0].model_dump_json())
    defaults = {n: f.get_default() for n, f in TrainConfig.model_fields.items()}
    expected = {**defaults, **given}
    if command == "probe":
        del got["adapter_path"], expected["adapter_path"]  # probe writes no adapter
    assert got == expected


def test_a_flag_that_is_not_given_leaves_the_file_alone(train: Mock) -> None:
    values = {
        "model_dir": "m1",
        "data_dir": "d1",
        "adapter_path": "a1",
        "rank": 32,
        "grad_checkpoint": True,
        "append_eos": False,
        "target_modules": ["q_proj"],
        "segment_size": 0,
    }
    Path("run.yaml").write_text(json.dumps(values))  # JSON is valid YAML
    assert cli.main(["train", "--config", "run.yaml", "--iters", "5", "--append-eos"]) == 0
    want = TrainConfig.model_validate(values | {"iters": 5, "append_eos": True})
    assert train.call_args.args[0] == want


def test_an_adapter_goes_into_adapters_if_nothing_else_is_said(train: Mock) -> None:
    for argv, want in (
        (REQUIRED[:4], "adapters"),
        ([*REQUIRED[:4], "--config", "run.yaml"], "a1"),
        ([*REQUIRED, "--config", "run.yaml"], "a"),
    ):
        Path("run.yaml").write_text('{"adapter_path": "a1"}')
        assert cli.main(["train", *argv]) == 0
        assert train.call_args.args[0].adapter_path == Path(want)


def test_train_shows_progress_and_a_summary(
    train: Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: TrainConfig, on_event: events.OnEvent, **_: Any) -> training.TrainResult:
        on_event(events.val_metric(0, config.iters, loss=3.0, tokens=10, metrics={}))
        return TRAINED

    train.side_effect = run
    assert cli.main(["train", *REQUIRED]) == 0
    out = capsys.readouterr().out
    assert "step 0: validation loss 3.0000, perplexity 20.09\n" in out
    assert "trained 20 steps in 1m01s" in out
    assert "3.0000 -> 2.0000 (best 1.5000 at step 10)" in out
    assert "1,234 supervised of 12,346 tokens/s" in out and "3.25 GB" in out
    assert "mlx-segtrain generate --model m --adapter 'a b' --prompt …" in out


def test_ctrl_c_exits_with_130(train: Mock, capsys: pytest.CaptureFixture[str]) -> None:
    train.return_value = training.TrainResult(**{**vars(TRAINED), "interrupted": True})
    assert cli.main(["train", *REQUIRED]) == 130
    assert "interrupted after 20 steps" in capsys.readouterr().out
    train.side_effect = KeyboardInterrupt
    assert cli.main(["train", *REQUIRED]) == 130


def test_other_exceptions_are_not_swallowed(train: Mock) -> None:
    train.side_effect = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(["train", *REQUIRED])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--rank", "1"], "rank must be an integer >= 2; got '1'"),
        (["train", "--rank", "x"], "rank must be an integer >= 2; got 'x'"),
        (["train", "--learning-rate", "nan"], "learning_rate must be a finite number > 0"),
        (["train", "--rank-scaling", "by_luck"], "must be constant, by_bits or by_kl"),
        (["train", "--target-modules"], "expected at least one argument"),
        (["train", "--grad-checkpoint", "--segment-size", "4"], "contradict each other"),
        (["train", "--config", "none.yaml"], "cannot read the configuration none.yaml"),
        (["train", "--rnk", "8"], "train does not accept --rnk. Did you mean --rank?"),
        (["train", "--learning-rat=1"], "Did you mean --learning-rate?"),
        (["train", "--append"], "train does not accept --append. Did you mean --append-eos?"),
        (["train", "--rank"], "expected one argument (see mlx-segtrain train --help)"),
        (["probe", "--iters", "0"], "iters must be an integer >= 1; got '0'"),
    ],
)
def test_bad_input_of_a_run(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error(capsys, argv[0], *REQUIRED, *argv[1:])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train"], "model_dir is missing: set it in the YAML file or with --model"),
        (["plan", "--data", "d"], "plan does not accept --data. These commands do: init, train, "),
        (["trian"], "there is no command trian. Did you mean train? (see mlx-segtrain --help)"),
        (["fuse", "--model", "m"], "there is no command fuse. Did you mean merge?"),
        (["xyz"], "there is no command xyz. (see"),
        (["eval"], "required: --model, --data"),
        (["generate", "--model", "m"], "one of the arguments --prompt --prompt-file"),
        (["generate", "--model", "m", "--prompt", " "], "the prompt is empty"),
        (["generate", "--model", "m", "--prompt-file", "no"], "cannot read the prompt file no"),
        (["generate", "--model", "m", "--prompt", "x", "--max-tokens", "0"], "integer >= 1"),
        (["generate", "--model", "m", "--prompt", "x", "--temp", "-1"], "number >= 0"),
        (
            ["generate", "--model=m", "--prompt=x", "--system=y", "--prompt-format=raw"],
            "--system requires the chat template",
        ),
        (["eval", "--model=m", "--data=d", "--max-seq-length=1"], "integer >= 2; got '1'"),
        (
            ["eval", "--model=m", "--data=d", "--method=dpo", "--reward=length:5"],
            "rewards has no effect unless method is grpo: leave it out",
        ),
        (["demo", "--iters", "0"], "integer >= 1"),
    ],
)
def test_bad_input_of_other_commands(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error(capsys, *argv)


def test_unknown_field_in_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("model_dir: m\nmax_seq_len: 2048\n")
    text = error(capsys, "train", "--config", "run.yaml")
    assert text == "run.yaml, line 2: unknown field max_seq_len. Did you mean max_seq_length?"


@pytest.mark.parametrize(("finite", "code"), [(True, 0), (False, 1)])
def test_probe(
    finite: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = training.ProbeResult(
        step_s=0.5,
        first_step_s=0.75,
        peak_gb=3.0,
        planned_gb=3.0,
        resting_gb=1.5,
        loss=2.25,
        grad_norm=0.125,
        finite=finite,
        tokens=512,
    )
    probe = replace(monkeypatch, "probe", result)
    assert cli.main(["probe", *REQUIRED[:4]]) == code  # probe needs no --adapter-path
    out = capsys.readouterr().out.split()
    for word in ("1.50", "3.00", "0.500", "0.750", "1,024", "2.2500", "0.1250"):
        assert word in out
    assert probe.call_args.args[0].rank == 8
    assert list(Path().iterdir()) == []


def test_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = training.EvalResult(
        loss=2.0, perplexity=7.389, metrics={}, tokens=1000, rows=10, truncated=1, dropped=2
    )
    evaluate = replace(monkeypatch, "evaluate", result)
    argv = ["eval", "--model", "m", "--data", "d", "--split", "train"]
    assert cli.main([*argv, "--max-seq-length", "99", "--no-append-eos"]) == 0
    assert "7.389" in capsys.readouterr().out
    config, adapter = evaluate.call_args.args
    assert (config.model_dir, config.data_dir, adapter) == (Path("m"), Path("d"), None)
    assert (config.max_seq_length, config.append_eos) == (99, False)
    assert evaluate.call_args.kwargs == {"split": "train", "on_event": ANY}
    assert cli.main([*argv, "--adapter-path", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == 7.389
    assert evaluate.call_args.args[1] == Path("a")


def test_eval_of_pairs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"accuracy": 0.75, "margin": 1.5, "chosen_reward": 1.0, "rejected_reward": -0.5}
    result = training.EvalResult(0.4, None, metrics, 1000, 10, 1, 2)
    evaluate = replace(monkeypatch, "evaluate", result)
    argv = ["eval", "--model", "m", "--data", "d", "--method", "dpo", "--dpo-beta", "0.3"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "0.4000 per pair" in out and "accuracy        0.7500" in out
    assert evaluate.call_args.args[0].dpo_beta == 0.3
    names = ("accuracy", "margin", "desirable_reward", "undesirable_reward", "kl")
    result = training.EvalResult(0.4, None, dict.fromkeys(names, 0.5), 1000, 10, 1, 2)
    evaluate.return_value = result
    assert cli.main(["eval", "--model", "m", "--data", "d", "--method", "kto"]) == 0
    out = capsys.readouterr().out
    assert "0.4000 per row" in out and "undesirable reward 0.5000\n" in out


def test_inspect_counts_rows_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert cli.main(["inspect", "train.jsonl"]) == 0
    assert "rows     2 to train, 0 to validate" in capsys.readouterr().out
    assert cli.main(["inspect", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "text"


def test_inspect_of_bad_data(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "train.jsonl" in error(capsys, "inspect", "train.jsonl")
    assert cli.main(["inspect", "train.jsonl", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert "model_dir none is not a folder" in error(capsys, "inspect", ".", "--model", "none")
    Path("tokenizer_config.json").write_text("{}")
    Path("config.json").write_text("{}")
    assert "model_dir . cannot be loaded" in error(capsys, "inspect", ".", "--model", ".")
    assert "max_seq_length must be" in error(capsys, "inspect", ".", "--max-seq-length", "1")


def test_inspect_gives_its_flags_to_the_data_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect = create_autospec(data.inspect, return_value=data.Report(format="text"))
    monkeypatch.setattr(data, "inspect", inspect)
    tokenizer = Mock(eos_token_ids={7, 8}, eos_token_id=8)
    load = Mock(return_value=tokenizer)
    monkeypatch.setattr(import_module("mlx_lm.utils"), "load_tokenizer", load)
    Path("tokenizer_config.json").write_text("{}")
    Path("config.json").write_text('{"eos_token_id": [7, 8]}')
    argv = ["inspect", "x.jsonl", "--model", ".", "--rows", "0", "--train-on", "last"]
    assert cli.main([*argv, "--no-append-eos"]) == 0
    inspect.assert_called_once_with(
        Path("x.jsonl"),
        tokenizer,
        data.Options(512, method=None, train_on="last", append_eos=False),
        n_preview=0,
        batch_size=1,
        accumulation=1,
        step_s=None,
        model_dir=Path("."),
        on_event=ANY,
    )
    load.assert_called_once_with(Path("."), eos_token_ids=[7, 8])


def raw(text: str) -> list[int]:
    return [ord(letter) for letter in text]


class Chat:
    """A tokenizer whose template shows roles and whose ids are code points."""

    has_chat_template, bos_token = True, None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return raw(text)

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        asked = options.pop("add_generation_prompt", None)
        assert options == {"tokenize": False} and asked in (True, None)
        return "".join(f"{turn['role'][0]}:{turn['content']};" for turn in turns)


@pytest.mark.parametrize(
    ("argv", "stdin", "prompt"),
    [
        (["--prompt", "hi"], "", [ord(letter) for letter in "u:hi;"]),
        (["--prompt", "hi", "--system", "be"], "", [ord(letter) for letter in "s:be;u:hi;"]),
        (["--prompt", "hi", "--prompt-format", "raw"], "", raw("hi")),
        (["--prompt", "-", "--prompt-format", "raw"], "from stdin", raw("from stdin")),
        (["--prompt-file", "-", "--prompt-format", "raw"], "from stdin", raw("from stdin")),
        (["--prompt-file", "p.txt", "--prompt-format", "raw"], "", raw("from a file")),
    ],
)
def test_generate(
    argv: list[str],
    stdin: str,
    prompt: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlx_segtrain

    Path("p.txt").write_text("from a file")
    seen: list[Any] = []

    def stream(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> Any:
        seen.append((model, prompt, options["max_tokens"]))
        return (SimpleNamespace(text=text) for text in ("an ", "answer"))

    load = Mock(return_value=("model", Chat()))
    monkeypatch.setattr(mlx_segtrain, "load", load)
    monkeypatch.setattr(import_module("mlx_lm.generate"), "stream_generate", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    assert cli.main(["generate", "--model", "m", "--max-tokens", "5", *argv]) == 0
    assert capsys.readouterr().out == "an answer\n"
    assert seen == [("model", prompt, 5)]
    load.assert_called_once_with(Path("m"), None, ANY)


def test_system_message_needs_a_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlx_segtrain

    bare = SimpleNamespace(has_chat_template=False)
    monkeypatch.setattr(mlx_segtrain, "load", Mock(return_value=("model", bare)))
    text = error(capsys, "generate", "--model", "m", "--prompt", "x", "--system", "y")
    assert "a system message requires a chat template, but the model has none" in text


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_segtrain.commands import demo

    run = create_autospec(demo.run)
    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 0
    run.assert_called_once_with()
    assert cli.main(["demo", "--out", "o", "--iters", "3"]) == 0
    run.assert_called_with(out_dir=Path("o"), iters=3)


def test_ctrl_c_shows_the_command_that_continues(
    train: Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    train.return_value = training.TrainResult(**{**vars(TRAINED), "interrupted": True})
    for more, want in (
        ([], "--lr 1e-3 --resume"),
        (["--overwrite"], "--lr 1e-3 --resume"),
        (["--resume", "auto"], "--lr 1e-3 --resume"),
        (["--resume=auto", "--rank", "4"], "--lr 1e-3 --rank 4 --resume"),
    ):
        assert cli.main(["train", *REQUIRED, "--lr", "1e-3", *more]) == 130
        out = capsys.readouterr().out
        command = out.split("continue with:\n")[1].strip()
        assert command == f"mlx-segtrain train --model m --data d --adapter-path a {want}"
        assert cli.main(command.split()[1:]) == 130  # the printed command works
        capsys.readouterr()
        assert train.call_args.args[0].resume is True
        assert "generate" not in out


def test_ctrl_c_before_the_first_step_says_that_nothing_is_kept(
    train: Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    none = {"interrupted": True, "steps": 0}
    train.return_value = training.TrainResult(**{**vars(TRAINED), **none})
    assert cli.main(["train", *REQUIRED]) == 130
    out = capsys.readouterr().out
    assert "nothing was saved" in out and "--resume" not in out


@pytest.mark.parametrize("gpu", [True, False])
def test_hints_have_the_system_message_of_the_data_and_what_is_usable_here(
    gpu: bool, train: Mock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_segtrain.ops import selfcheck

    monkeypatch.setattr(selfcheck, "on_gpu", lambda: gpu)
    rows = [{"prompt": f"{i}", "completion": "x", "system": "Be brief."} for i in range(3)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["train", "--model", "m", "--data", "rows.jsonl"]) == 0
    out = capsys.readouterr().out
    adapter = "--model m --adapter 'a b' --system 'Be brief.'"
    assert f"mlx-segtrain chat {adapter}\n" in out
    assert f"mlx-segtrain generate {adapter} --prompt …\n" in out
    assert ("mlx_lm generate" in out) is gpu
    if gpu:
        theirs = "--model m --adapter-path 'a b' --system-prompt 'Be brief.' --prompt …"
        assert f" -m mlx_lm generate {theirs}" in out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b", "system": "S"}] * 2, "S"),
        ([{"prompt": "a", "completion": "b", "system": "S"}, {"prompt": "a", "completion": ""}], 0),
        ([{"prompt": "a", "completion": "b"}] * 2, 0),
        ([{"text": "a"}], 0),
        (
            [
                {
                    "messages": [
                        {"role": "system", "content": "S"},
                        {"role": "user", "content": "u"},
                        {"role": "assistant", "content": "a"},
                    ]
                }
            ],
            "S",
        ),
        ([{"instruction": "i", "input": "", "output": "o", "system": "S"}], "S"),
    ],
)
def test_the_system_message_that_rows_have_in_common(rows: list[Any], message: Any) -> None:
    from mlx_segtrain.data.sources import sources_of
    from mlx_segtrain.data.system import system_message

    assert system_message(sources_of(rows)[0], data.Options()) == (message or None)


def test_prompts_with_other_columns_have_a_system_message_too() -> None:
    from mlx_segtrain.data.sources import sources_of
    from mlx_segtrain.data.system import system_message

    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
    rows = sources_of([{"prompt": prompt, "answer": "4"}])[0]
    assert system_message(rows, data.Options(method="grpo")) == "S"


def test_a_run_that_fails_says_how_it_is_continued(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(training, "train", Mock(side_effect=RunError("step 3: the disk is full.")))
    Path("a/state/step-00002").mkdir(parents=True)
    assert cli.main(["train", *REQUIRED]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "mlx-segtrain: error: step 3: the disk is full."
    assert said[1].endswith("mlx-segtrain train --model m --data d --adapter-path a --resume")


def test_train_takes_how_much_is_shown(train: Mock, capsys: Any) -> None:
    def run(config: TrainConfig, on_event: events.OnEvent, **_: Any) -> training.TrainResult:
        on_event(events.stage("load", 0.01, "loading m"))
        return TRAINED

    train.side_effect = run
    assert cli.main(["train", *REQUIRED, "--quiet", "--log-file", "x.log"]) == 0
    out = capsys.readouterr().out
    assert "loading m" not in out and "training loss    1.2500" in out
    assert "loading m" in Path("x.log").read_text()
    assert cli.main(["train", *REQUIRED, "--quiet", "--verbose"]) == 2
