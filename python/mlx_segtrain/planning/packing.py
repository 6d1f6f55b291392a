"""Decides whether packing saves time, by predicting the time of an epoch with and without
packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..config import TrainConfig
from ..data import Dataset, batches_in_epoch
from ..data.batching import epoch_rows
from ..models.headers import read_shape
from ..objectives import objective_of
from ..streams import BatchShape, padded, trim_start
from . import named
from .run import RunPlan, planned
from .speeds import SPEEDS

#: The maximum number of groups into which `typical` divides the batches of an epoch.
LOOKED_AT = 64


def pays(config: TrainConfig, data: Dataset) -> bool:
    """Returns whether to pack rows: for sft, only if an epoch with packing fits into memory and
    takes less time; for grpo, always; for other methods, never. Rows are not packed if the model
    family does not support packed rows."""
    if not read_shape(config.model_dir).fast:
        return False
    if config.method == "grpo":  # its rows are not known before they are generated
        return True
    if config.method != "sft":
        return False
    apart, packed = (
        (own, planned(config, objective_of(config).batch_shapes(own, config.batch_size)))
        for own in (data, data.in_rows_of(config.max_seq_length))
    )
    if len(data) < config.batch_size:  # without packing, there is not even one batch
        return packed[1].fits
    return packed[1].fits and epoch_s(*packed) < epoch_s(*apart)


def epoch_s(data: Dataset, run: RunPlan) -> float:
    """Returns the predicted time of an epoch with the plan of `run`, in seconds."""
    assert run.planned is not None
    shape, speed = run.shape, SPEEDS[run.device.name]
    numbers = sum(inputs * outputs for inputs, outputs in shape.widths.values())
    once = speed.layer_s * len(shape.layers) + speed.unpacking * numbers / speed.work_per_s
    seconds = 0.0
    for count, batch in typical(data, run.batch.rows):
        more = {name: getattr(run.batch, name) for name in ("accumulates", "dropout", "dora")}
        work = named(shape, replace(batch, **more), run.ranks, run.device, 0).work
        seconds += count * (once + (1 + run.planned.recomputed) * work / speed.work_per_s)
    return seconds


def typical(data: Dataset, batch_size: int) -> list[tuple[int, BatchShape]]:
    """Groups the batches of an epoch by shape. Returns the number of batches and their mean shape
    for each group."""
    columns = data.columns
    lengths, first, trained = (x[:, 0] for x in (columns.length, columns.first, columns.trained))
    if data.packed:
        count = batches_in_epoch(data, batch_size)
        rows, part = len(data.packing), float((lengths**2).sum() / lengths.sum())
        length, loss = (round(x.sum() / rows) for x in (lengths - 1, trained))
        return [(round(count), BatchShape.packed(batch_size, length, part, batch_size * loss))]
    windows = np.asarray(epoch_rows(data, batch_size, 0, 0))
    lengths = padded(lengths[windows].max(1), batch_size) - 1
    trimmed = lengths - trim_start(np.maximum(first[windows].min(1) - 1, 0))
    table = np.stack([lengths, trimmed, trained[windows].sum(1)], 1)
    alike = np.array_split(table[np.argsort(lengths)], min(LOOKED_AT, len(table)))
    return [
        (len(own), BatchShape.single(batch_size, *map(round, own.mean(0).tolist())))
        for own in alike
    ]
