"""Bytes and work of every stage of a fast family at one batch shape, from the model's shape alone.

Bytes are counts of numbers a token that are alive at once, read off the ops' code and checked by
measurement (bench/memory.py); the constants behind them are what was measured. Work is in
floating-point operations of the products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .. import _core
from ..models.chain import HEAD_ROWS
from ..models.form import LayerForm, StageForm
from ..models.headers import ModelShape
from ..models.layer import MLP_ROWS
from ..streams import BatchShape, StreamShape, head_reads


@dataclass(frozen=True)
class Device:
    """What of a device the estimate depends on."""

    name: Literal["cpu", "metal", "cuda"]
    size: int  #: bytes of a number in training
    workspace: int = 0  #: bytes that a library's products may take
    cudnn: bool = False  #: the package has cuDNN's attention
    nax: bool = False  #: MLX's own attention has kernels for neural accelerators
    repeatable: bool = False  #: implementations whose bits vary are not taken

    @property
    def gpu(self) -> bool:
        return self.name != "cpu"

    def attention(self, head: int) -> str:
        """The implementation that plain causal attention with heads of this size gets."""
        dtype = mx.float32 if self.size == 4 else mx.bfloat16
        how = {"cudnn": self.cudnn, "nax": self.nax, "repeatable": self.repeatable}
        return _core.attention_way(self.name, head, dtype, **how)


CPU = Device("cpu", size=4)
CUDA = Device("cuda", size=2, cudnn=True, workspace=33 << 20)
METAL = Device("metal", size=2)


#: What heads read besides h and its rows: a few numbers a token that counts.
COUNTED = ("targets", "weights")


def costs_of(
    model: ModelShape,
    batch: BatchShape,
    ranks: Mapping[str, int],
    device: Device,
) -> _core.Costs:
    """All that a plan depends on. `ranks` are those of adapted linears, by path in the model."""
    parameters = {
        path: sum(model.widths[path]) * rank + batch.dora * model.widths[path][1]
        for path, rank in ranks.items()
    }
    owned: Counter[str] = Counter()
    for layer, paths in zip(model.layers, model.linears, strict=True):
        for path in paths:
            owned[layer.owner_of(path)] += parameters.get(path, 0)
    embeds, heads = (parameters.get(path, 0) for path in (model.embedding, model.head))
    specs, costs, layers = [], [], []

    def add(stage: StageForm, cost: _core.StageCost, trainable: int) -> None:
        reads, writes = list(stage.reads), list(stage.writes)
        specs.append(_core.StageSpec(stage.name, reads, writes, trainable > 0))
        costs.append(cost)

    for shape in batch.streams:
        after = shape.length
        if embeds:
            stage = StageForm.embedding(model.embedding, shape.stream)
            add(stage, _embedding(model, batch, shape, embeds, device), embeds)
        for layer in model.layers:
            after = shape.trimmed if layer.trims else after
            for stage, cost in zip(layer.stages(shape.stream), (_attention, _mlp), strict=True):
                own = owned[stage.owner]
                add(stage, cost(model, layer, batch, shape, after, own, device), own)
            layers.append(len(specs))
    factors = 4 * sum(parameters.values())
    per_layer = any(layer.own_input for layer in model.layers)
    sizes: dict[str, int] = {}
    for shape in batch.streams:
        of, n = shape.stream.of, batch.rows * shape.length
        sizes |= {} if embeds else {of("h"): n * model.width * device.size}
        sizes |= {of("tokens"): 4 * n} if per_layer or embeds else {}
        sizes[of("positions")] = 4 * shape.trimmed
        sizes[of("rows")] = 4 * batch.loss // len(batch.streams)
    reads = [*head_reads(tuple(shape.stream for shape in batch.streams)), *COUNTED]
    # Of pairs, which of the two sequences of each row a token belongs to.
    sizes |= dict.fromkeys(COUNTED, 4 * batch.loss * (1 if len(batch.streams) == 1 else batch.rows))
    head, head_work = _head(model, batch, heads, device)
    widest = max(layer.hidden for layer in model.layers)
    trimmed = batch.rows * sum(shape.trimmed for shape in batch.streams)
    ahead = 0 if device.gpu else (4 << 20) + 7 * trimmed * widest
    return _core.Costs(
        stages=specs,
        inputs=list(sizes),
        head_reads=reads,
        input_bytes=list(sizes.values()),
        layers=layers,
        costs=costs,
        head=head,
        ahead=ahead,
        head_work=head_work,
        # Factors and AdamW's two moments; on a GPU what was measured beside them.
        fixed=model.weight_bytes(float32=not device.gpu)
        + (3 + batch.accumulates) * factors
        + (12 << 20) * device.gpu,
        update=5 * factors,
        widened=4 / device.size,
    )


def pairs(rows: int, keys: int, window: int | None) -> float:
    """(query, key) pairs of the last `rows` of `keys` positions, causal and in the window."""
    seen = window or keys
    full = max(0, min(rows, keys - seen))  # queries that see a whole window
    ramp = rows - full
    first = keys - rows + 1
    return full * seen + ramp * (first + min(keys, seen)) / 2 if ramp else full * seen


def _attention(
    model: ModelShape,
    layer: LayerForm,
    batch: BatchShape,
    shape: StreamShape,
    after: int,
    parameters: int,
    device: Device,
) -> _core.StageCost:
    """`after` queries a row over all keys. Numbers a token: H, q of all heads, k of its own."""
    h, q, k, size = model.width, layer.query, layer.key_value, device.size
    rows, length = batch.rows, shape.length - shape.branch
    out = rows * after
    tokens = rows * shape.length if k else out
    # Keys that the branch sees stand in an array of their own; so does o of both parts.
    behind = rows * (shape.shared + shape.branch) if shape.branch else 0
    both = out * (shape.branch > 0)
    weights = h * (q + 2 * k)
    low_rank = 4 * parameters
    if device.gpu:
        # Our kernel for wide heads goes over ranges of queries, with their scores in a scratch.
        scores = 4 * (q // layer.head) * length * min(length, (layer.window or length) + 128)
        scratch = min(256 << 20, scores) if layer.head > 256 else 12 << 20
        parts = 5.5 if layer.head > 128 else 10  # cuDNN's dk and dv are those of each query head
        backward = out * (2 * h + 6 * q) + tokens * h + tokens * parts * k
        forward = out * (h + 3 * q) + tokens * (h + 3 * k) + weights
        # Without a norm rotation reads columns of the common product, and copies them first.
        copies = 0 if layer.q_norm else out * q + 3 * tokens * k
    else:
        scratch = 1 << 20
        backward = out * (1.5 * h + 5 * q) + tokens * h + tokens * 5 * k
        forward = out * (h + 3 * q) + tokens * (h + 3 * k)
        copies = 0
    if layer.donor is not None:  # dk and dv of the donor's
        donor = next(other for other in model.layers if other.name == layer.donor)
        backward += rows * length * 2 * donor.key_value
    kept = tokens * (h + 3 * k) + (4 if device.gpu else 3.5) * out * q + copies
    kept += 2 * k * (rows * shape.shared - tokens * layer.gives)  # what it writes counts apart
    forward += 2 * k * behind + both * q
    if behind and device.gpu:  # our kernel sums dk and dv of each query head in float32
        backward += 2 * behind * q * 4 / size
    elif behind:
        backward += 4 * k * behind
    kept += out * h * layer.after_norms + tokens * k * layer.v_norm
    if batch.dropout:  # random bits and what is left of x, of one projection at a time
        masks = (4 / size + 1) * max(tokens * h, out * q)
        forward, backward = forward + masks, backward + masks
    if batch.dora and parameters:  # what each linear gives is kept beside that stretched
        given = out * (q + h) + 2 * tokens * k
        kept, forward, backward = kept + given, forward + given, backward + given + out * q
    writes = [out * h * size]
    if layer.gives:
        writes += [tokens * k * size] * 2
    # MLX's own gives nothing that its backward pass could be spared.
    plain = (
        after == shape.length
        and not shape.branch
        and not layer.softcap
        and (layer.window or length) >= length
    )
    saves = not (plain and device.attention(layer.head) == "stock")
    seen = pairs(max(after - shape.branch, 0), length, layer.window)
    seen += pairs(shape.branch, shape.shared + shape.branch, layer.window)
    core = 4.0 * rows * seen * q
    linears = 2.0 * h * (out * q + tokens * k * (2 if layer.separate_values else 1))
    last = 2.0 * out * q * h
    return _core.StageCost(
        writes=writes,
        forward=int(forward * size) + device.workspace,
        backward=int(backward * size) + scratch + low_rank,
        kept=int(kept * size),
        saved=out * q * size + 4 * rows * (q // layer.head) * after if saves else 0,
        gradients=low_rank if shape is batch.streams[-1] else 0,  # others are added to these
        forward_work=linears + core + last,
        again_work=linears + core,
        saved_work=core if saves else 0.0,
        backward_work=linears + last + 2.5 * core,
    )


def _mlp(
    model: ModelShape,
    layer: LayerForm,
    batch: BatchShape,
    shape: StreamShape,
    after: int,
    parameters: int,
    device: Device,
) -> _core.StageCost:
    """Numbers a token: H, F. gate and up are one array of 2F, and so are their cotangents."""
    tokens = batch.rows * after
    h, f, size = model.width, layer.hidden, device.size
    weights, low_rank = 2 * f * h, 4 * parameters
    dora = batch.dora and parameters > 0
    tile = tokens if batch.dropout or dora else min(tokens, MLP_ROWS)
    tiled = tile < tokens  # keeps x alone, and makes the rest again tile by tile
    own = 4 * layer.own_input + (2 * h if layer.own_input else 0)
    experts = 6 * layer.experts
    rest = h * layer.after_norms + own + experts
    kept = tokens * (h + rest) + (0 if tiled else 2 * f * tokens)
    whole = tokens * (4 if tiled else 2) * h  # x and its cotangent; of tiles before they are joined
    if device.gpu:
        # The first product: its weight dequantized, and what the library lays out beside it.
        first = (tile * 2 * f + whole + 1.6 * weights) * size + device.workspace
        forward = max(first, (tile * 3 * f + whole) * size)
        backward = tile * 5 * f + whole + tokens * (own + 2 * experts)
        backward = max(first, (backward + 0.4 * weights * layer.after_norms) * size)
    else:
        forward = (tile * 3 * f + whole + weights) * size
        backward = (tile * 7 * f + whole - tokens * h + tokens * (own + 2 * experts)) * size
        backward += 1.2e6
    if batch.dropout or dora:  # act(gate)·up is kept
        kept += f * tokens
    if batch.dropout:  # random bits and what is left of it
        masks = (2 + 4 / size) * f * tokens * size
        forward, backward = forward + masks, backward + masks
    if dora:  # what each linear gives is kept beside that stretched
        given = tokens * (2 * f + h)
        kept, forward = kept + given, forward + tokens * 2 * f * size
        backward += (given + tokens * 2 * f) * size
    product = 2.0 * tokens * h * f
    more = 4.0 * tokens * h * layer.own_input + 3 * 2.0 * tokens * h * layer.experts
    return _core.StageCost(
        writes=[tokens * h * size],
        forward=int(forward),
        backward=int(backward) + low_rank,
        kept=int(kept * size),
        saved=0,
        gradients=low_rank if shape is batch.streams[-1] else 0,  # others are added to these
        forward_work=3 * product + more,
        again_work=(0 if tiled else 2 * product) + more,
        saved_work=0.0,
        backward_work=(5 if tiled else 3) * product + more,
    )


def _embedding(
    model: ModelShape, batch: BatchShape, shape: StreamShape, parameters: int, device: Device
) -> _core.StageCost:
    """An adapted one: rows of the table, and of the update in float32."""
    tokens, size, low_rank = batch.rows * shape.length, device.size, 4 * parameters
    inside = int(tokens * model.width * (size + 4))
    return _core.StageCost(
        writes=[tokens * model.width * size],
        forward=inside,
        backward=inside + low_rank,
        kept=inside,
        saved=0,
        gradients=low_rank if shape is batch.streams[-1] else 0,
        forward_work=0.0,
        again_work=0.0,
        saved_work=0.0,
        backward_work=0.0,
    )


def _head(
    model: ModelShape, batch: BatchShape, parameters: int, device: Device
) -> tuple[int, float]:
    """Most bytes and the work: a block of the weight, logits of a chunk of rows, h, dh.

    One with an update makes its logits a second time.
    """
    h, m = model.width, batch.loss
    trimmed = batch.rows * sum(shape.trimmed for shape in batch.streams)
    work = 4.0 * m * h * model.vocabulary
    if parameters:
        logits = min(m, HEAD_ROWS) * model.vocabulary
        inside = int(logits * (8 + 2 * device.size)) + 8 * parameters
        if device.gpu:  # the weight dequantized, and logits in float32 once more
            inside += head_weight(model, device) + 4 * logits
        return inside + 2 * device.size * h * (trimmed + 2 * m) + device.workspace, 1.5 * work
    if device.gpu:  # csrc/ops/head: a tile of the weight, logits and their cotangents of some rows
        tile, chunk = min(model.vocabulary, 16384), min(m, 2048)
        inside = 2 * tile * h + 4 * chunk * tile + 6 * chunk * h + 6 * m * h
        return max(inside, 4 * trimmed * h + 12 * m * h), work
    return cpu_logits(model, batch) + 4 * h * (trimmed + 2 * m), work


def head_weight(model: ModelShape, device: Device) -> int:
    """Bytes of the head's weight, unpacked."""
    return device.size * model.width * model.vocabulary


def cpu_logits(model: ModelShape, batch: BatchShape) -> int:
    """Bytes of the logits that the head has at a time on the CPU: csrc/ops/head/cpu.cpp."""
    return 4 * model.vocabulary * min(batch.loss, 256)
