"""Tests runs on formats other than JSON Lines, and on rows from Python."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.folders import write_rows
from lib.runs import config_of, files_of
from mlx_segtrain import InputError, TrainConfig, train
from mlx_segtrain.training import evaluate, record, verify


def rows_in(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def weights(folder):
    return {
        path: digest
        for path, digest in files_of(folder).items()
        if path.name == "adapters.safetensors" and "state" not in path.parts
    }


def test_the_same_rows_in_any_form_are_the_same_run(llama4, tmp_path):
    """A folder, a Parquet file, a list and an Arrow table give identical runs, which can be resumed
    only with the same rows."""
    data = write_rows(tmp_path / "data", 12)
    rows = rows_in(data)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    how = {"iters": 2, "val_split": 0}
    train(config_of(llama4, data, tmp_path / "folder", **how))
    train(config_of(llama4, tmp_path / "rows.parquet", tmp_path / "file", **how))
    for name, given in (("list", rows), ("table", pa.Table.from_pylist(rows))):
        config = config_of(llama4, None, tmp_path / name, **how)
        train(config, train_data=given)
        assert weights(tmp_path / name) == weights(tmp_path / "folder") != {}
        assert record.read(tmp_path / name)["inputs"].keys() >= {"train_data"}
    assert weights(tmp_path / "file") == weights(tmp_path / "folder")
    assert all(verify(tmp_path / name).ok for name in ("folder", "file", "list"))

    more = {**how, "iters": 3, "resume": True}
    config = config_of(llama4, None, tmp_path / "list", **more)
    with pytest.raises(InputError, match="train_data has changed since the run"):
        train(config, train_data=rows[1:])
    assert train(config, train_data=iter(rows)).steps == 3
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "rows.parquet")
    assert verify(tmp_path / "file").parts["data"] == ["data/rows.parquet has changed"]
    with pytest.raises(InputError, match=r"data/rows\.parquet has changed since the run"):
        train(config_of(llama4, tmp_path / "rows.parquet", tmp_path / "file", **more))
    card = (tmp_path / "file" / "README.md").read_text()
    assert f"{tmp_path} (rows.parquet " in card


def test_validation_rows_of_python(llama4, tmp_path):
    data = write_rows(tmp_path / "data", 8)
    rows, said = rows_in(data), []
    config = config_of(llama4, None, tmp_path / "a", iters=1)
    result = train(config, said.append, train_data=rows, valid_data=rows[:2])
    assert result.first_val_loss is not None
    shutil.copy(data / "train.jsonl", tmp_path / "valid.jsonl")
    other = config_of(llama4, data, tmp_path / "b", iters=1)
    train(other, valid_data=tmp_path / "valid.jsonl")
    assert verify(tmp_path / "b").ok
    assert {"data/train.jsonl", "valid/valid.jsonl"} <= record.read(tmp_path / "b")["inputs"].keys()


def test_which_data_is_meant(llama4, tmp_path):
    config = config_of(llama4, tmp_path, tmp_path / "a")
    with pytest.raises(InputError, match="data_dir and train_data are both given"):
        train(config, train_data=[{"text": "a"}])
    with pytest.raises(InputError, match="data_dir is missing: pass data"):
        train(TrainConfig(model_dir=llama4, adapter_path=tmp_path / "a"))
    with pytest.raises(InputError, match="data_dir is missing"):
        evaluate(TrainConfig(model_dir=llama4, adapter_path=tmp_path / "a"))
