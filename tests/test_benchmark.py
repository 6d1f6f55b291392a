"""Tests the table of benchmark times: the values in a row, and the command that prints the
table."""

import json

import pytest

from mlx_segtrain.commands import bench as command
from mlx_segtrain.commands import main as cli
from mlx_segtrain.ops import bench
from mlx_segtrain.ops.cases import attention

pytestmark = pytest.mark.acceptance


def test_pairs_are_those_that_attention_sees():
    assert bench.pairs(5, None, None) == 15
    assert bench.pairs(5, 2, None) == 9
    assert bench.pairs(5, None, [0, 2, 5]) == 3 + 6
    assert bench.pairs(5, 2, [0, 2, 5]) == 3 + 5


def test_every_case_names_what_it_does():
    cases = command.cases()
    assert len({(case.op, case.shape) for case in cases}) == len(cases)
    for case in cases:
        assert case.flops or case.moved, case
    ops = {case.op for case in cases}
    assert {"attention", "geglu", "swiglu", "rms_norm", "dequantize"} <= ops
    assert {"lora_linears", "lora_glu_mlp", "linear_cross_entropy", "layer"} <= ops


def test_bench_prints_a_table(capsys):
    assert cli.main(["bench", "--only", "dequantize", "rms_norm 512", "--runs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("matrix product ") and "GB/s" in lines[0]
    assert lines[1] == command.HEADER
    rows = [line.split() for line in lines[2:]]
    assert {row[0] for row in rows} == {"dequantize", "rms_norm"}
    assert {"kernel", "mlx"} <= {word for row in rows for word in row}


def test_bench_as_json_says_why_a_row_has_no_figures(capsys, monkeypatch):
    own = attention.attention("window 512 D64 T600", 9, 3, 64, 600, window=512)
    monkeypatch.setattr(bench, "cases", lambda: [own])
    args = ["bench", "--only", "window 512 D64", "--impls", "kernel", "stock", "--runs", "1"]
    assert cli.main([*args, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in rows] == ["forward", "both"]
    assert all(row["ms"] > 0 and row["floor"] > 0 and row["unit"] == "GF/s" for row in rows)
    row = next(bench.measure(own, "stock", bench.Device(1, 1, 1), 1))
    assert "keeps an array of T × S scores" in row.reason and not row.ms


def test_bench_of_nothing(capsys):
    assert cli.main(["bench", "--only", "nothing", "--runs", "1"]) != 0
    assert "no op, shape or implementation" in capsys.readouterr().err
