"""Tests calling `mlx_segtrain.train` from Python: keywords, rows, a loaded model, callbacks, and
the result."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
from rich.console import Console

import mlx_segtrain
from lib.runs import weights_of
from mlx_segtrain import InputError, TrainConfig, TrainResult, api, load, train
from mlx_segtrain.commands import notebook

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = [
    {"prompt": f"Count to {i}.", "completion": " ".join(str(j) for j in range(1, i + 1))}
    for i in range(1, 13)
]
HOW = {"iters": 4, "lr": 1e-2, "rank": 4, "max_seq_length": 100}


@pytest.fixture(scope="module")
def trained(llama4, tmp_path_factory):
    """Trains on rows that are Python dictionaries. Returns the result, and the arguments of the
    callbacks."""
    steps, evals = [], []
    out = tmp_path_factory.mktemp("runs") / "a"
    how = {**HOW, "iters": 6, "val_split": 3, "steps_per_eval": 3, "steps_per_report": 4}
    calls = {"on_step": steps.append, "on_eval": evals.append}
    return train(model=llama4, data=ROWS, adapter=out, **how, **calls), steps, evals


def test_keywords_are_the_fields_under_their_own_names_or_those_of_flags(trained, llama4):
    result, _, _ = trained
    assert isinstance(result, TrainResult) and result.steps == 6
    config = json.loads((result.adapter_path / "run.json").read_text())["config"]
    assert (config["learning_rate"], config["rank"], config["iters"]) == (1e-2, 4, 6)
    assert result.config.model_dir == llama4


def test_callbacks_get_the_metrics_of_every_step_and_evaluation(trained):
    result, steps, evals = trained
    assert [own["step"] for own in steps] == [1, 2, 3, 4, 5, 6]
    assert [own["step"] for own in evals] == [0, 3, 6]
    assert evals[-1]["loss"] == result.final_val_loss
    assert all(own["left_s"] > 0 for own in steps[:-1])


def test_the_training_loss_is_the_same_mean_wherever_it_is_shown(trained, llama4, tmp_path):
    """The training loss is the mean over the last steps_per_report steps, here 4."""
    result, steps, _ = trained
    single = []
    config = {**result.config.model_dump(exclude_unset=True), "adapter_path": tmp_path / "a"}
    how = {**config, "steps_per_report": 1, "on_step": lambda own: single.append(own["loss"])}
    train(train_data=ROWS, **how)
    means = [sum(single[max(0, i - 4) : i]) / min(i, 4) for i in range(1, 7)]
    assert [own["loss"] for own in steps] == pytest.approx(means)
    assert result.final_train_loss == pytest.approx(means[5])
    reported = {own["step"]: own["loss"] for own in result.history if own["kind"] == "train"}
    assert reported == {step: steps[step - 1]["loss"] for step in (1, 4, 6)}
    assert f"{means[5]:.4f}" in (result.adapter_path / "README.md").read_text()


def test_a_result_in_one_line_as_html_and_as_a_plot(trained):
    result, _, _ = trained
    assert repr(result).startswith("TrainResult(steps: 6, training loss: ")
    assert len(repr(result)) < 300 and "applied_ranks" not in repr(result)
    html = result._repr_html_()
    assert html.startswith("<table>") and "<svg" in html and "validation loss" in html
    (axes,) = result.plot().axes
    assert [line.get_label() for line in axes.lines] == ["training", "held out"]
    assert [own["step"] for own in result.history if own["kind"] == "val"] == [0, 3, 6]


def test_the_model_of_a_result_has_the_adapter(trained, llama4):
    result, _, _ = trained
    tokens = mx.array([[1, 5, 9, 200]])
    own, _ = load(llama4, result.adapter_path)
    assert mx.array_equal(result.model(tokens), own(tokens))
    assert result.model is result.model


def test_an_earlier_adapter_is_not_that_of_a_run_without_steps(llama4, tmp_path):
    """A run that ends before its first step does not replace the adapter in its folder."""
    train(model=llama4, data=ROWS, adapter=tmp_path / "a", **HOW)
    how = {"valid_data": ROWS, "on_eval": lambda metrics: True, "overwrite": True}
    result = train(model=llama4, data=ROWS, adapter=tmp_path / "a", **{**HOW, **how})
    tokens = mx.array([[1, 5, 9, 200]])
    assert result.steps == 0 and mx.array_equal(result.model(tokens), load(llama4)[0](tokens))


def test_a_loaded_model_gives_the_same_bytes_and_comes_back_with_the_adapter(llama4, tmp_path):
    train(model=llama4, data=ROWS, adapter=tmp_path / "a", **HOW)
    loaded = load(llama4)
    tokens = mx.array([[1, 5, 9, 200]])
    before = loaded[0](tokens)
    for name in ("b", "c"):  # the second run reuses the model with the first run's adapter
        result = train(model=loaded, data=ROWS, adapter=tmp_path / name, **HOW)
        assert result.model is loaded[0] and result.tokenizer is loaded[1]
        for key, x in weights_of(tmp_path / "a").items():
            assert mx.array_equal(x, weights_of(tmp_path / name)[key])
    after, _ = load(llama4, tmp_path / "c")
    assert mx.array_equal(loaded[0](tokens), after(tokens))
    assert mx.abs(before - after(tokens)).max() > 1e-2


def test_a_model_of_mlx_lm_can_be_given_but_not_with_an_adapter(trained, llama4, tmp_path):
    pair = mlx_lm.load(str(llama4))
    result = train(model=pair, data=ROWS, adapter=tmp_path / "a", **HOW)
    assert result.model is pair[0]
    adapted = mlx_lm.load(str(llama4), adapter_path=str(trained[0].adapter_path))
    with pytest.raises(InputError, match=r"already has an mlx-lm adapter .*warm_start"):
        train(model=adapted, data=ROWS, adapter=tmp_path / "b", **HOW)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("callback", ["on_step", "on_eval"])
def test_a_callback_that_returns_true_ends_the_run(callback, llama4, tmp_path):
    how = {"steps_per_eval": 2, "val_split": 3, "iters": 50}
    stop = {callback: lambda metrics: metrics["step"] == 2}
    result = train(model=llama4, data=ROWS, adapter=tmp_path / "a", **{**HOW, **how}, **stop)
    assert (result.steps, result.stopped_early, result.interrupted) == (2, True, False)
    more = train(result.config, train_data=ROWS, resume=True, iters=3)
    assert (more.resumed_from, more.steps) == (2, 3)


def test_what_a_callback_returns_besides_true_changes_nothing(llama4, tmp_path):
    how = {**HOW, "on_step": lambda metrics: 1}
    assert train(model=llama4, data=ROWS, adapter=tmp_path / "a", **how).steps == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 1}, "rank must be an integer >= 2; got 1"),
        ({"model": None}, "model_dir is missing: pass model=…"),
        ({"data": None}, "data_dir is missing: pass data=…"),
        ({"num_epochs": 3}, "unknown field num_epochs. Did you mean epochs?"),
        ({"learning_rate": 1}, "lr and learning_rate name the same field: set only one of them."),
        ({"train_data": []}, "data and train_data are both given: leave one of them out."),
        (
            {"resume": True},
            'leave resume=True out, or use resume="auto", which starts a new run if there is no '
            "checkpoint.",
        ),
        ({"model": (1, 2)}, "pass the two values that load returns."),
        ({"data": [{"prompt": "x"}]}, "train_data:1: the row needs the keys"),
    ],
)
def test_errors_are_those_of_the_command_line_in_words_of_python(
    changes, sentence, llama4, tmp_path
):
    given = {"model": llama4, "data": ROWS, "adapter": tmp_path / "a", **HOW, **changes}
    with pytest.raises(InputError) as error:
        train(**given)
    assert sentence in str(error.value) and not re.search(r"--[a-z]", str(error.value))
    assert not (tmp_path / "a").exists()


def test_an_adapter_that_is_there_is_kept_and_the_sentence_names_keywords(trained, llama4):
    with pytest.raises(InputError) as error:
        train(model=llama4, data=ROWS, adapter=trained[0].adapter_path, **HOW)
    assert "use resume=True to " in str(error.value) and "overwrite=True" in str(error.value)


def test_a_configuration_says_in_one_sentence_what_is_wrong():
    with pytest.raises(InputError) as error:
        TrainConfig(model_dir="m", adapter_path="a", rank=1)  # type: ignore[arg-type]
    assert str(error.value) == "rank must be an integer >= 2; got 1"


def test_fields_go_on_top_of_a_configuration():
    config = TrainConfig(model_dir="m", adapter_path="a", rank=4)  # type: ignore[arg-type]
    assert api._config(config, {"lr": 1e-3, "adapter": "b"}) == TrainConfig(
        model_dir="m",  # type: ignore[arg-type]
        adapter_path="b",  # type: ignore[arg-type]
        rank=4,
        learning_rate=1e-3,
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_where_people_see_it(terminal, trained, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, highlight=False)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    called = []
    with api._shown(None, called.append, None) as (tell, step):
        if tell is not None:
            tell({"type": "stage", "stage": "train", "iters": 6, "step": 0, "message": ""})
            for own in trained[1]:
                step(own)
    assert ("━" in out.getvalue() and "6/6" in out.getvalue()) is terminal
    assert len(called) == (6 if terminal else 0)
    with api._shown(print, None, None) as (tell, _):  # events go to the caller's function
        assert tell is print


def test_in_a_notebook_one_line_of_html_moves(trained, monkeypatch, capsys):
    shown = []
    handle = SimpleNamespace(update=lambda html: shown.append(html))
    fake = SimpleNamespace(
        get_ipython=lambda: type("ZMQInteractiveShell", (), {})(),
        display=SimpleNamespace(
            HTML=lambda text: text,
            display=lambda html, display_id: shown.append(html) or handle,
        ),
    )
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake.display)
    assert notebook.in_notebook()
    with api._shown(None, None, None) as (tell, step):
        tell({"type": "stage", "stage": "train", "iters": 6, "step": 0, "message": "6 <steps>"})
        for own in trained[1]:
            step(own)
    assert len(shown) == 6 and "value='6' max='6'" in shown[-1]
    assert f"loss {trained[0].final_train_loss:.4f}" in shown[-1]
    assert capsys.readouterr().out == "6 <steps>\n"


def test_dir_is_the_public_api():
    assert dir(mlx_segtrain) == sorted(mlx_segtrain.__all__)
    assert all(getattr(mlx_segtrain, name) for name in mlx_segtrain.__all__)


def test_the_notebook_runs(llama4, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "finetune.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    space = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", ()):
                space |= {"MODEL": str(llama4), "STEPS": 2}
    assert space["result"].steps == 2 and set(space["answers"]) == {"before", "after"}
    assert (tmp_path / "notebook-adapter-again" / "adapters.safetensors").exists()


def test_rewards_are_functions_and_names_of_checks(llama4, tmp_path):
    def vowels(completions):
        return [sum(char in "aeiou" for char in text) / 8 for text in completions]

    how = {"method": "grpo", "iters": 1, "batch_size": 2, "group_size": 2}
    how |= {"max_completion_tokens": 4, "max_seq_length": 64, "prompt_format": "raw"}
    how |= {"model": llama4, "data": [{"prompt": row["prompt"]} for row in ROWS[:4]]}
    result = train(adapter=tmp_path / "a", rewards=[vowels, "length:3"], **how)
    assert result.config.rewards == ["length:3"]
    (line, *_) = (result.adapter_path / "completions.jsonl").read_text().splitlines()
    assert set(json.loads(line)["rewards"]) == {"length", "vowels"}
    with pytest.raises(InputError, match="rewards has no effect unless method is grpo"):
        train(model=llama4, data=ROWS, adapter=tmp_path / "b", rewards=[vowels], **HOW)
    with pytest.raises(InputError, match="rewards must be"):
        train(adapter=tmp_path / "b", rewards=vowels, **how)
