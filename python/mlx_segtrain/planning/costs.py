"""Computes the memory and the work of every stage from the shapes of the model and the batch, for
model families that run on our ops.

Each op reports the memory that it needs internally, which depends on its implementation
(csrc/core/cost.h). This module adds the memory of the arrays outside the ops, in elements per
token. The results agree with measurements (bench/memory.py). Work is the number of floating-point
operations in matrix multiplications.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import _core
from ..models.chain import HEAD_ROWS
from ..models.form import LayerForm, StageForm
from ..models.headers import ModelShape
from ..models.layer import mlp_rows
from ..streams import BatchShape, StreamShape, head_reads

Device = _core.Device

#: The size, in bytes, of the workspace that matrix multiplications may use on CUDA.
WORKSPACE = 33 << 20

#: The number of bytes that are copied to host memory while a GPU computes one floating-point
#: operation. An H200 copies 50 GB/s and computes 6e14 operations per second; slower GPUs have more
#: time for their copies.
COPIED = 7e-5

CPU = Device("cpu", 4)
CUDA = Device("cuda", 2, WORKSPACE, cudnn=True)
METAL = Device("metal", 2)

#: The inputs of a head in addition to h and the indices of its rows. These inputs have only a few
#: values for each token in the loss.
COUNTED = ("targets", "weights")


@dataclass(frozen=True)
class _Stage:
    """A stage of a stream. `parameters` is the number of the stage's trainable parameters."""

    model: ModelShape
    batch: BatchShape
    stream: StreamShape
    device: Device
    parameters: int

    def cost(
        self,
        writes: Sequence[float],
        forward: float,
        backward: float,
        kept: float,
        saved: int = 0,
        work: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    ) -> _core.StageCost:
        """Returns the cost of the stage. All arguments except `work` are in bytes. They exclude the
        gradients of the parameters, which this method adds. Only the stages of the last stream
        store these gradients. `work` has four parts: the forward pass, its recomputation, the part
        of the recomputation that saved values make unnecessary, and the backward pass."""
        gradients = 4 * self.parameters
        return _core.StageCost(
            writes=[int(n) for n in writes],
            forward=int(forward),
            backward=int(backward) + gradients,
            kept=int(kept),
            saved=saved,
            gradients=gradients if self.stream is self.batch.streams[-1] else 0,
            forward_work=work[0],
            again_work=work[1],
            saved_work=work[2],
            backward_work=work[3],
        )


def parameters_of(model: ModelShape, ranks: Mapping[str, int], dora: bool) -> dict[str, int]:
    """Returns the number of trainable parameters of each adapted layer, keyed by path."""
    return {
        path: sum(model.widths[path]) * rank + dora * model.widths[path][1]
        for path, rank in ranks.items()
    }


def costs_of(
    model: ModelShape,
    batch: BatchShape,
    ranks: Mapping[str, int],
    device: Device,
) -> _core.Costs:
    """Returns the costs of all stages and the other values on which a plan depends. `ranks`
    contains the LoRA rank of each adapted layer, keyed by path."""
    parameters = parameters_of(model, ranks, batch.dora)
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
            add(stage, _embedding(_Stage(model, batch, shape, device, embeds)), embeds)
        for layer in model.layers:
            after = shape.trimmed if layer.trims else after
            for stage, cost in zip(layer.stages(shape.stream), (_attention, _mlp), strict=True):
                own = owned[stage.owner]
                add(stage, cost(_Stage(model, batch, shape, device, own), layer, after), own)
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
    # For pairs, the inputs also specify to which of the two sequences of a pair each token belongs.
    sizes |= dict.fromkeys(COUNTED, 4 * batch.loss * (1 if len(batch.streams) == 1 else batch.rows))
    head, head_work = _head(model, batch, heads, device)
    return _core.Costs(
        stages=specs,
        inputs=list(sizes),
        head_reads=reads,
        input_bytes=list(sizes.values()),
        layers=layers,
        costs=costs,
        head=head,
        ahead=0 if device.gpu else 2 << 20,
        head_work=head_work,
        # The weights, the factors, AdamW's two moments and, if gradients are accumulated, the sum
        # of the gradients; on a GPU, also a measured constant, which is larger with offloading.
        fixed=model.weight_bytes(float32=not device.gpu)
        + (3 + batch.accumulates) * factors
        + (12 << 20) * device.gpu
        + (6 << 20) * (device.host > 0),
        update=5 * factors,
        widened=4 / device.size,
        host=device.host,
        copied=COPIED,
    )


def pairs(rows: int, keys: int, window: int | None) -> float:
    """Counts the (query, key) pairs in which the query attends to the key, in causal attention with
    this window. The queries are at the last `rows` of the `keys` positions."""
    seen = window or keys
    full = max(0, min(rows, keys - seen))  # queries that attend to a full window
    ramp = rows - full
    first = keys - rows + 1
    return full * seen + ramp * (first + min(keys, seen)) / 2 if ramp else full * seen


def pairs_within(length: float, window: int | None) -> float:
    """Counts the same pairs as `pairs`, but for all queries of a sequence."""
    seen = min(length, window or length)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def _attention(stage: _Stage, layer: LayerForm, after: int) -> _core.StageCost:
    """Returns the cost of attention for `after` queries per row and all keys. In the code, h, q and
    k are the numbers of elements per token in the residual stream, in the queries of all heads, and
    in the keys that the layer itself computes."""
    batch, shape, device = stage.batch, stage.stream, stage.device
    h, q, k, size = stage.model.width, layer.query, layer.key_value, device.size
    rows, length = batch.rows, shape.length - shape.branch
    out = rows * after
    tokens = rows * shape.length if k else out
    # The keys to which a branch attends are copied to a separate array. The outputs of the branch
    # and of the tokens before it are copied to a common array.
    behind = rows * (shape.shared + shape.branch) if shape.branch else 0
    both = out * (shape.branch > 0)
    op = _core.attention_cost(
        device,
        rows=rows,
        heads=q // layer.head,
        groups=k // layer.head,
        head=layer.head,
        queries=after,
        keys=shape.length,
        window=layer.window,
        softcap=layer.softcap,
        branch=shape.branch,
        shared=shape.shared,
        packed=shape.part > 0,
    )
    dora = batch.dora and stage.parameters > 0
    # On CUDA, one pass splits the output of the joint matrix multiplication into heads
    # (`lora_qkv`). This output is then freed, unless norms read it again; the array of values is a
    # copy. On other devices, RoPE reads columns of this output, and copies them first if no norm
    # comes in between.
    plain = not (layer.wide_norms or dora or batch.dropout or shape.branch)
    one_pass = device.name == "cuda" and plain and tokens == out
    copies = 0 if not device.gpu or layer.q_norm else out * q + 3 * tokens * k
    if one_pass and not layer.q_norm:
        copies = tokens * k - out * q
    elif one_pass and not layer.v_norm:
        copies = tokens * k
    forward = out * (h + 3 * q) + tokens * (h + 3 * k) + 2 * k * behind + both * q
    if device.gpu:
        backward = out * (2 * h + 6 * q) + tokens * (h + 4 * k)
    else:
        backward = out * (h + 4 * q) + tokens * (h + 5 * k) + 4 * k * behind
    if layer.donor is not None:  # gradients of the donor layer's k and v
        donor = next(other for other in stage.model.layers if other.name == layer.donor)
        backward += rows * length * 2 * donor.key_value
    kept = tokens * (h + 3 * k) + (4 if device.gpu else 3.5) * out * q + copies
    kept += 2 * k * (rows * shape.shared - tokens * layer.gives)  # given k and v are in `writes`
    kept += out * h * layer.after_norms + tokens * k * layer.v_norm
    if dora:  # the output of each layer is kept in addition to its rescaled copy
        given = out * (q + h) + 2 * tokens * k
        kept, forward, backward = kept + given, forward + given, backward + given + out * q
    dropped = _core.dropout_bytes(device, max(tokens * h, out * q)) if batch.dropout else 0
    weights = _core.lora_linears_cost(device, inputs=h, outputs=q + 2 * k)
    writes = [out * h * size]
    if layer.gives:
        writes += [tokens * k * size] * 2
    if shape.part:
        seen = after / shape.part * pairs_within(shape.part, layer.window)
    else:
        seen = pairs(max(after - shape.branch, 0), length, layer.window)
        seen += pairs(shape.branch, shape.shared + shape.branch, layer.window)
    core = 4.0 * rows * seen * q
    linears = 2.0 * h * (out * q + tokens * k * (2 if layer.separate_values else 1))
    last = 2.0 * out * q * h
    again = linears + core
    return stage.cost(
        writes=writes,
        forward=forward * size + op.forward + weights.forward + dropped,
        backward=backward * size + op.backward + dropped,
        kept=kept * size + _factors(stage),
        saved=op.saved,
        work=(again + last, again, core if op.saved else 0.0, again + last + 1.5 * core),
    )


def _mlp(stage: _Stage, layer: LayerForm, after: int) -> _core.StageCost:
    """Returns the cost of the MLP. In the code, h is the number of elements per token in the
    residual stream, and f is the number inside the MLP."""
    batch, device = stage.batch, stage.device
    tokens = batch.rows * after
    h, f, size = stage.model.width, layer.hidden, device.size
    dora = batch.dora and stage.parameters > 0
    in_parts = batch.dropout or dora  # the fused op does not support these
    op = _core.lora_glu_mlp_cost(
        device, rows=tokens, inputs=h, hidden=f, tile_rows=None if in_parts else mlp_rows(f)
    )
    own = 4 * layer.own_input + (2 * h if layer.own_input else 0)
    experts = 6 * layer.experts
    kept = tokens * (h + h * layer.after_norms + own + experts)
    forward = 2 * tokens * h * size + op.forward
    more = tokens * (own + 2 * experts)
    if device.gpu:  # measured: a fraction of the dequantized weights if there are norms
        more += 0.8 * f * h * layer.after_norms
    around = (2 if device.gpu else 1) * tokens * h
    backward = max(forward, (around + more) * size + op.backward)
    kept = kept * size + op.kept + _factors(stage)
    if in_parts:  # act(gate)·up is kept, too
        kept += f * tokens * size
    if batch.dropout:
        masks = _core.dropout_bytes(device, f * tokens) + f * tokens * size
        forward, backward = forward + masks, backward + masks
    if dora:  # the output of each layer is kept in addition to its rescaled copy
        kept += tokens * (2 * f + h) * size
        forward += tokens * 2 * f * size
        backward += tokens * (4 * f + h) * size
    product = 2.0 * tokens * h * f
    rest = 4.0 * tokens * h * layer.own_input + 3 * 2.0 * tokens * h * layer.experts
    again, back = (2, 3) if op.kept else (0, 5)
    # On CUDA, the low-rank product z of `down` is computed as a part of the product with the whole
    # weight, so this product is repeated, too, unless z is saved.
    whole = device.name == "cuda" and stage.parameters > 0 and not in_parts and f > h
    rank = -(-stage.parameters // (3 * (f + h)) // 16) * 16
    savable = whole and op.kept > 0
    again, back = again + whole * (op.kept > 0), back + whole * (op.kept == 0)
    return stage.cost(
        writes=[tokens * h * size],
        forward=forward,
        backward=backward,
        kept=kept,
        saved=savable * int(tokens * rank * size),
        work=(
            *(3 * product + rest, again * product + rest),
            *(savable * product, back * product + rest),
        ),
    )


def _factors(stage: _Stage) -> float:
    """Returns the size, in bytes, of the padded half-precision factors that matrix multiplications
    on CUDA keep."""
    return 1.5 * stage.device.size * stage.parameters * (stage.device.name == "cuda")


def _embedding(stage: _Stage) -> _core.StageCost:
    """Returns the cost of an adapted embedding: the embedded rows, and the rows of the update in
    float32."""
    size = stage.device.size
    numbers = stage.batch.rows * stage.stream.length * stage.model.width
    inside = numbers * (size + 4)
    return stage.cost(writes=[numbers * size], forward=inside, backward=inside, kept=inside)


def _head(
    model: ModelShape, batch: BatchShape, parameters: int, device: Device
) -> tuple[int, float]:
    """Returns the peak memory of the head in bytes, including h and its gradient, and the work of
    the head. An adapted head computes its logits twice."""
    h, m = model.width, batch.loss
    trimmed = batch.rows * sum(shape.trimmed for shape in batch.streams)
    work = 4.0 * m * h * model.vocabulary
    if parameters:
        logits = min(m, HEAD_ROWS) * model.vocabulary
        inside = int(logits * (8 + 2 * device.size)) + 8 * parameters
        if device.gpu:  # the dequantized weight and one more float32 copy of the logits
            inside += head_weight(model, device) + 4 * logits
        return inside + 2 * device.size * h * (trimmed + 2 * m) + device.workspace, 1.5 * work
    inside = head_op(model, batch, device)
    if device.gpu:
        return max(inside + 6 * m * h, 4 * trimmed * h + 12 * m * h), work
    return inside + 4 * h * (trimmed + 2 * m), work


def head_weight(model: ModelShape, device: Device) -> int:
    """Returns the size of the head's dequantized weight in bytes."""
    return device.size * model.width * model.vocabulary


def head_op(model: ModelShape, batch: BatchShape, device: Device) -> int:
    """Returns the peak memory, in bytes, that the op of a head without an adapter uses
    internally."""
    shape = {"rows": batch.loss, "inputs": model.width, "vocabulary": model.vocabulary}
    return _core.head_cost(device, **shape).backward
