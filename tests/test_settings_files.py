"""Tests how YAML files with settings are read for the page: all errors in a file are reported, not
just the first."""

import json
import time

import pytest

from mlx_segtrain.errors import InputError
from mlx_segtrain.serving.api.copies import as_yaml, read_yaml


def faults_of(text: str) -> dict[str | None, str]:
    return {own.field: str(own) for own in read_yaml(text)[1]}


def test_what_was_copied_is_read_again() -> None:
    values = {"model_dir": "m", "iters": 3, "target_modules": ["q_proj"], "use_dora": True}
    assert read_yaml(as_yaml(values)) == (values, [])
    assert read_yaml("") == ({}, [])


def test_every_fault_is_named_and_values_are_kept_to_be_mended() -> None:
    text = "rank: 1\nbatch_size: many\nepoch: 2\niters: 7\nresume: true\noverwrite: true\n"
    values, _ = read_yaml(text)
    assert values == {
        **{"rank": 1, "batch_size": "many", "iters": 7},
        **{"resume": True, "overwrite": True},
    }
    found = faults_of(text)
    assert found["rank"] == "rank must be an integer >= 2; got 1"
    assert found["batch_size"] == "batch_size must be an integer >= 1; got 'many'"
    assert found["epoch"] == "unknown field epoch. Did you mean epochs?"
    assert "contradict" in found["resume"]
    assert len(found) == 4


def test_what_a_client_may_not_set_is_a_fault() -> None:
    values, faults = read_yaml("eval_command: rm -r /\nrank: 4\n")
    assert values == {"rank": 4}
    assert [own.field for own in faults] == ["eval_command"]
    assert "is not allowed here" in str(faults[0])


@pytest.mark.parametrize(
    "value",
    [".nan", "-.inf", "2001-01-01", "!!binary aGk=", "!!set {a}", f"0x{'f' * 9000}", "{1: .nan}"],
)
def test_what_json_has_not_is_text_beside_its_fault(value: str) -> None:
    values, (fault,) = read_yaml(f"learning_rate: {value}")
    assert json.dumps(values, allow_nan=False) and fault.field == "learning_rate"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "the file, line 1: not valid YAML"),
        ("- rank", "the file: expected lines of the form"),
        ("rank: 2\nrank: 3", "the file, line 2: rank is set a second time"),
        ("a: &x [1, 2]\nb: *x", "the file has anchors, aliases or merge keys"),
        ("<<: {rank: 2}", "the file has anchors, aliases or merge keys"),
        ("".join(f"a{n}: 1\n" for n in range(5000)), "the file has 5000 settings"),
        ("a: " + "[" * 200, "the file is not valid YAML: it is nested too deeply"),
        ("a: " + "[" * 30_000, "the file is not valid YAML: it is nested too deeply"),
    ],
)
def test_what_is_no_such_file_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_yaml(text)


def test_references_are_refused_before_they_are_expanded() -> None:
    keys = ", ".join(f"k{n}: 1" for n in range(3000))
    text = f"a: &a {{{keys}}}\nb: [{', '.join(['{<<: *a}'] * 2000)}]\n"
    assert len(text) < 1 << 16
    began = time.process_time()
    with pytest.raises(InputError, match="the file has anchors, aliases or merge keys"):
        read_yaml(text)
    assert time.process_time() - began < 2
