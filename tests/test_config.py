"""Tests TrainConfig: YAML, overrides, one-sentence errors, and the table in the documentation."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlx_segtrain.config import FACETS, TrainConfig, load_config, table
from mlx_segtrain.errors import InputError

REQUIRED = {"model_dir": "m", "data_dir": "d", "adapter_path": "a"}
DOCS = Path(__file__).parents[1] / "docs" / "configuration.md"


def write(path: Path, text: str) -> Path:
    file = path / "run.yaml"
    file.write_text("model_dir: m\ndata_dir: d\nadapter_path: a\n" + text, encoding="utf-8")
    return file


def fault(yaml_path: Path | None, **overrides: object) -> str:
    with pytest.raises(InputError) as caught:
        load_config(yaml_path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_those_of_the_reference() -> None:
    config = load_config(None, dict(REQUIRED))
    assert config.model_dump(exclude=set(REQUIRED)) == {
        "method": "sft",
        "rank": 8,
        "scale": 1.0,
        "rank_scaling": "by_bits",
        "target_modules": [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
        "num_layers": -1,
        "warm_start": None,
        "iters": 100,
        "epochs": None,
        "optimizer": "adamw",
        "learning_rate": 2e-4,
        "lr_schedule": "constant",
        "warmup_iters": 0,
        "lora_plus_ratio": 1.0,
        "rs_lora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "dpo_beta": 0.1,
        "dpo_loss": "sigmoid",
        "label_smoothing": 0.0,
        "reference_free": False,
        "kto_beta": 0.1,
        "kto_loss": "kto",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "orpo_lambda": 0.1,
        "sft_scope": "full",
        "simpo_beta": 2.0,
        "simpo_gamma": 1.0,
        "rewards": [],
        "reward_functions": [],
        "reward_command": None,
        "reward_model": None,
        "reward_weights": [],
        "environment": None,
        "max_turns": 8,
        "group_size": 8,
        "max_completion_tokens": 256,
        "temperature": 1.0,
        "grpo_loss": "grpo",
        "advantage_scaling": "group",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "grpo_beta": 0.0,
        "mask_truncated": False,
        "updates_per_step": 1,
        "importance_cap": 2.0,
        "rollout_batch": "auto",
        "collapse_patience": 0,
        "max_seq_length": 512,
        "batch_size": 1,
        "packing": False,
        "grad_accumulation_steps": 1,
        "parallel": "data",
        "seed": 0,
        "deterministic": True,
        "matmul_precision": "float32",
        "activation_offloading": True,
        "steps_per_report": 10,
        "steps_per_eval": 50,
        "weight_decay": 0.01,
        "grad_clip_norm": 1.0,
        "grad_checkpoint": False,
        "segment_size": "auto",
        "memory_budget_gb": "auto",
        "steps_per_save": 50,
        "keep_checkpoints": 2,
        "resume": False,
        "on_spike": "warn",
        "report_to": [],
        "save_checkpoints": False,
        "early_stopping_patience": 0,
        "keep_best": False,
        "sample_prompts": [],
        "sample_tokens": 64,
        "eval_command": None,
        "data_format": "auto",
        "columns": {},
        "train_on": "assistant",
        "append_eos": True,
        "prompt_format": "auto",
        "chat_template_kwargs": {},
        "val_split": "auto",
        "dedup": False,
        "strict": False,
        "overwrite": False,
    }


def test_defaults_and_names_of_methods() -> None:
    dpo = load_config(None, {**REQUIRED, "method": "dpo"})
    assert (dpo.learning_rate, dpo.lr_schedule) == (5e-5, "cosine")
    orpo = load_config(None, {**REQUIRED, "method": "orpo", "learning_rate": 1e-4})
    assert (orpo.learning_rate, orpo.lr_schedule) == (1e-4, "cosine")
    names = {"dpo_lr_schedule": "linear", "dpo_warmup_iters": 3}
    dpo = load_config(None, {**REQUIRED, "method": "dpo", **names})
    assert (dpo.lr_schedule, dpo.warmup_iters) == ("linear", 3)
    assert load_config(None, dpo.model_dump()) == dpo


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "orpo", "simpo_gamma": 2}, "simpo_gamma has no effect unless method is simpo"),
        ({"rewards": ["length:9"]}, "rewards has no effect unless method is grpo"),
        ({"method": "grpo", "append_eos": False}, "append_eos has no effect with method grpo"),
        (
            {"method": "grpo", "max_completion_tokens": 600},
            "max_completion_tokens = 600 leaves no room for a prompt in max_seq_length = 512",
        ),
        ({"dpo_beta": 0.2}, "dpo_beta has no effect unless method is dpo: leave it out"),
        ({"method": "orpo", "reference_free": True}, "reference_free has no effect unless method"),
        ({"method": "dpo", "sft_scope": "response"}, "sft_scope has no effect unless method is"),
        (
            {"method": "dpo", "dpo_loss": "ipo", "label_smoothing": 0.1},
            "label_smoothing has no effect unless method is dpo and dpo_loss is sigmoid, robust",
        ),
        ({"method": "dpo", "dpo_loss": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ({"method": "dpo", "kto_beta": 0.2}, "kto_beta has no effect unless method is kto"),
        ({"method": "kto", "packing": True}, "packing has no effect unless method is sft"),
        ({"method": "dpo", "train_on": "last"}, "train_on has no effect with preference rows"),
        ({"warm_start": "x", "rank": 16}, "rank has no effect with warm_start, whose adapter"),
        ({"epochs": 2, "iters": 7}, "iters has no effect when epochs is set: leave it out"),
        ({"sample_tokens": 9}, "sample_tokens has no effect without sample_prompts"),
        ({"dpo_warmup_iters": 9}, "dpo_warmup_iters only applies to method dpo: use warmup_iters"),
        (
            {"method": "dpo", "dpo_lr_schedule": "linear", "lr_schedule": "linear"},
            "dpo_lr_schedule and lr_schedule name the same field: set only one of them",
        ),
        ({"label_smoothing": 0.5, "method": "dpo"}, "a finite number >= 0 and < 0.5; got 0.5"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a finite number >= 0 and < 1; got 1.0"),
    ],
)
def test_options_without_an_effect_are_errors(fields: dict[str, object], text: str) -> None:
    assert text in fault(None, **{**REQUIRED, **fields})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rank": 1}, "rank"),
        ({"dpo_beta": 0.2}, "dpo_beta"),
        ({"warmup_iters": 100}, "warmup_iters"),
        ({"data_dir": ""}, "data_dir"),
    ],
)
def test_an_error_says_which_field_it_is_about(fields: dict[str, object], name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, {**REQUIRED, **fields})
    assert caught.value.field == name
    assert str(caught.value).startswith(name)


def test_yaml_is_read_and_overrides_win(tmp_path: Path) -> None:
    file = write(tmp_path, "rank: 16\nlearning_rate: 1e-5\nsegment_size: 4\nnum_layers: 3\n")
    config = load_config(file, {"rank": "32", "grad_checkpoint": False, "data_dir": "~/x"})
    assert (config.rank, config.segment_size, config.num_layers) == (32, 4, 3)
    assert config.learning_rate == 1e-5  # YAML 1.1 would read 1e-5 as a string
    assert config.data_dir == Path.home() / "x"
    with pytest.raises(ValidationError):
        config.rank = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("rank", 1, "an integer >= 2"),
        ("rank", True, "an integer >= 2"),
        ("rank", 8.5, "an integer >= 2"),
        ("scale", 0, "a finite number > 0"),
        ("scale", "nan", "a finite number > 0"),
        ("scale", float("inf"), "a finite number > 0"),
        ("rank_scaling", "by_bit", "constant, by_bits or by_kl"),
        ("method", "ppo", "sft, dpo, orpo, simpo, kto or grpo"),
        ("target_modules", [], "one or more names"),
        ("target_modules", ["q_proj", ""], "one or more names"),
        ("target_modules", ["q_proj", "q_proj"], "each at most once"),
        ("num_layers", 0, "-1 or an integer >= 1"),
        ("num_layers", -2, "-1 or an integer >= 1"),
        ("iters", 0, "an integer >= 1"),
        ("learning_rate", "fast", "a finite number > 0"),
        ("max_seq_length", 1, "an integer >= 2"),
        ("batch_size", 0, "an integer >= 1"),
        ("grad_accumulation_steps", 0, "an integer >= 1"),
        ("seed", -1, "an integer >= 0"),
        ("rank", 2**31, "an integer <= 2147483647"),
        ("num_layers", 2**40, "an integer <= 2147483647"),
        ("segment_size", 2**63, "an integer <= 2147483647"),
        ("weight_decay", -0.1, "a finite number >= 0"),
        ("grad_clip_norm", -1, "a finite number >= 0"),
        ("grad_checkpoint", "perhaps", "true or false"),
        ("segment_size", "four", "auto or an integer >= 0"),
        ("segment_size", -1, "auto or an integer >= 0"),
        ("segment_size", False, "auto or an integer >= 0"),
        ("adapter_path", "", "a path"),
        ("model_dir", None, "a path"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    text = fault(None, **{**REQUIRED, field: value})
    assert text.startswith(f"{field} must be ")
    assert allowed in text
    assert text.endswith(f"; got {value!r}")


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    file = write(tmp_path, "# a comment\nrank: 1\n")
    assert fault(file) == f"{file}, line 5: rank must be an integer >= 2; got 1"
    assert fault(file, rank="0") == "rank must be an integer >= 2; got '0'"


def test_unknown_field_suggests_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path, "learning_rat: 1\n")
    text = fault(file)
    assert text == f"{file}, line 4: unknown field learning_rat. Did you mean learning_rate?"
    assert fault(None, **REQUIRED, xyzzy=1) == "unknown field xyzzy."


def test_missing_field() -> None:
    text = fault(None, model_dir="m", data_dir="d")
    assert text.startswith("adapter_path is missing") and "--adapter-path" in text


def test_two_memory_plans_contradict_each_other() -> None:
    text = fault(None, **REQUIRED, grad_checkpoint=True, segment_size=2)
    assert "grad_checkpoint and segment_size = 2 contradict each other" in text
    for size in ("auto", 0):
        assert load_config(None, REQUIRED | {"grad_checkpoint": True, "segment_size": size})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"rank: [1\n", "line 2: not valid YAML"),
        (b"a: 1\nrank: 8\nrank: 9\n", "line 3: rank is set a second time (first on line 2)"),
        (b"- rank\n", "expected lines of the form"),
        (b"just words", "expected lines of the form"),
        (b"1: 2\n", "expected lines of the form"),
        (b"{a: b}: 2\n", "not valid YAML"),
        (b"? [a, b]\n: 1\n", "line 1: not valid YAML"),
        (b"rank: 2001-99-99\n", "not valid YAML"),
        (b"rank: !!python/name:os.system\n", "not valid YAML"),
        (b"rank: 8\n---\nrank: 9\n", "not valid YAML"),
        (b"\xff\xfe\x00rank", "is not UTF-8 text"),
        (b"a: \x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    text = fault(file)
    assert str(file) in text and expected in text


def test_an_absent_and_an_empty_file(tmp_path: Path) -> None:
    assert "cannot read the configuration" in fault(tmp_path / "none.yaml")
    assert "cannot read the configuration" in fault(tmp_path)
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load_config(empty, dict(REQUIRED)).rank == 8


def test_every_field_is_described_in_the_documentation() -> None:
    assert all(field.description for field in TrainConfig.model_fields.values())
    assert table() in DOCS.read_text(encoding="utf-8"), (
        "paste the output of `python -m mlx_segtrain.config` into docs/configuration.md"
    )


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
ANYTHING = st.recursive(
    LEAVES, lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=5), own)
)


@settings(max_examples=500)
@given(st.sampled_from(sorted(TrainConfig.model_fields)), ANYTHING)
def test_any_value_is_taken_or_refused_in_a_sentence(field: str, value: object) -> None:
    """If a field accepts a value, it also accepts the converted value."""
    try:
        config = load_config(None, {**REQUIRED, field: value})
    except InputError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 500 and text.startswith(field)
    else:
        again = load_config(None, {**REQUIRED, field: getattr(config, field)})
        assert repr(again) == repr(config)


def test_second_defaults_are_those_of_a_run():
    """A default that depends on the method or on the loss of grpo is set by one function, and
    described by the field's `other_default`."""
    where = {"model_dir": ".", "data_dir": ".", "adapter_path": "."}
    cases = {loss: {"method": "grpo", "grpo_loss": loss} for loss in ("dr_grpo", "dapo", "gspo")}
    cases |= {"grpo": {"method": "grpo"}, "all methods except sft": {"method": "orpo"}}
    runs = {case: TrainConfig(**where, **given) for case, given in cases.items()}
    described = {case: set() for case in cases}
    for name, facets in FACETS.items():
        for one in filter(None, facets.other_default.split(" and ")):
            value, case = one.split(" for ")
            own = getattr(runs[case], name)
            assert own == (
                float(value) if isinstance(own, float) else {"true": True}.get(value, value)
            )
            described[case].add(name)
    for case, run in runs.items():
        fields = TrainConfig.model_fields.items()
        other = {name for name, field in fields if getattr(run, name) != field.default}
        shared = described["grpo"] if "grpo_loss" in cases[case] else set()
        shared |= described["all methods except sft"]
        assert other - where.keys() - cases[case].keys() == described[case] | shared
