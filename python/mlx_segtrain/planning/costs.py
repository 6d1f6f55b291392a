"""Bytes and work of every stage of a fast family at one batch shape, from the model's shape alone.

Bytes are counts of numbers a token that are alive at once, read off the ops' code and checked by
measurement (bench/memory.py); the constants behind them are what was measured. Work is in
floating-point operations of the products.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .. import _core
from ..stages import HEAD_READS, MLP_ROWS, kv_names
from .shapes import LayerShape, ModelShape


@dataclass(frozen=True)
class Device:
    """What of a device the estimate depends on."""

    size: int  #: bytes of a number in training
    gpu: bool
    cudnn: bool  #: it serves plain causal attention, of heads up to 256
    stock: int  #: so does MLX's own, which saves nothing, of heads up to this; 0: never
    workspace: int  #: bytes that a library's products may take


CPU = Device(size=4, gpu=False, cudnn=False, stock=0, workspace=0)
CUDA = Device(size=2, gpu=True, cudnn=True, stock=128, workspace=33 << 20)
METAL = Device(size=2, gpu=True, cudnn=False, stock=256, workspace=0)


@dataclass(frozen=True)
class BatchShape:
    """Rows of tokens; of each the last `trimmed` come into question for the loss, `loss` in all."""

    rows: int
    length: int
    trimmed: int
    loss: int
    accumulates: bool = False  #: onto the gradient of batches before


def costs_of(
    model: ModelShape,
    batch: BatchShape,
    ranks: Mapping[str, int],
    device: Device,
) -> _core.Costs:
    """All that a plan depends on. `ranks` are those of adapted linears, by path in the model."""
    parameters = {path: sum(model.widths[path]) * rank for path, rank in ranks.items()}
    last = max(i for i, layer in enumerate(model.layers) if layer.key_value)
    specs, costs, layers = [], [], []
    for i, layer in enumerate(model.layers):
        trims = i == last
        after = batch.trimmed if i >= last else batch.length
        donor = None if layer.donor is None else model.layers[layer.donor].path
        reads = ["h", *(["positions"] if trims else []), *(kv_names(donor) if donor else [])]
        writes = ["h", *(kv_names(layer.path) if layer.gives else [])]
        own = {p: n for p, n in parameters.items() if p.startswith(f"{layer.path}.")}
        attention = sum(n for p, n in own.items() if ".self_attn." in p)
        mlp = sum(own.values()) - attention
        specs.append(_core.StageSpec(f"{layer.path}.self_attn", reads, writes, attention > 0))
        costs.append(_attention(model, i, batch, after, attention, device))
        more = ["tokens"] if layer.per_layer_input else []
        specs.append(_core.StageSpec(f"{layer.path}.mlp", ["h", *more], ["h"], mlp > 0))
        costs.append(_mlp(model, layer, batch.rows * after, mlp, device))
        layers.append(len(specs))
    n = batch.rows * batch.length
    factors = 4 * sum(parameters.values())
    per_layer = any(layer.per_layer_input for layer in model.layers)
    sizes = {
        "h": n * model.width * device.size,
        "tokens": 4 * n,
        "positions": 4 * batch.trimmed,
        **dict.fromkeys(HEAD_READS[1:], 4 * batch.loss),
    }
    inputs = ["h", *(["tokens"] if per_layer else []), "positions", *HEAD_READS[1:]]
    head, head_work = _head(model, batch, device)
    widest = max(layer.hidden for layer in model.layers)
    ahead = 0 if device.gpu else (4 << 20) + 7 * batch.rows * batch.trimmed * widest
    return _core.Costs(
        stages=specs,
        inputs=inputs,
        head_reads=list(HEAD_READS),
        input_bytes=[sizes[name] for name in inputs],
        layers=layers,
        costs=costs,
        head=head,
        ahead=ahead,
        head_work=head_work,
        # Factors and AdamW's two moments.
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
    model: ModelShape, i: int, batch: BatchShape, after: int, parameters: int, device: Device
) -> _core.StageCost:
    """`after` queries a row over all keys. Numbers a token: H, q of all heads, k of its own."""
    layer = model.layers[i]
    h, q, k, size = model.width, layer.query, layer.key_value, device.size
    rows, length = batch.rows, batch.length
    out = rows * after
    tokens = rows * length if k else out
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
        backward += rows * length * 2 * model.layers[layer.donor].key_value
    kept = tokens * (h + 3 * k) + (4 if device.gpu else 3.5) * out * q + copies
    kept += out * h * layer.after_norms + tokens * k * layer.v_norm
    writes = [out * h * size]
    if layer.gives:
        writes += [tokens * k * size] * 2
    # As csrc/attention.cpp chooses: MLX's own where it serves, unless cuDNN does.
    plain = after == length and not layer.softcap and (layer.window or length) >= length
    saves = not (plain and layer.head <= device.stock and not device.cudnn)
    core = 4.0 * rows * pairs(after, length, layer.window) * q
    linears = 2.0 * h * (out * q + tokens * k * (2 if layer.separate_values else 1))
    last = 2.0 * out * q * h
    return _core.StageCost(
        writes=writes,
        forward=int(forward * size) + device.workspace,
        backward=int(backward * size) + scratch + low_rank,
        kept=int(kept * size),
        saved=out * q * size + 4 * rows * (q // layer.head) * after if saves else 0,
        gradients=low_rank,
        forward_work=linears + core + last,
        again_work=linears + core,
        saved_work=core if saves else 0.0,
        backward_work=linears + last + 2.5 * core,
    )


def _mlp(
    model: ModelShape, layer: LayerShape, tokens: int, parameters: int, device: Device
) -> _core.StageCost:
    """Numbers a token: H, F. gate and up are one array of 2F, and so are their cotangents."""
    h, f, size = model.width, layer.hidden, device.size
    weights, low_rank = 2 * f * h, 4 * parameters
    tile = min(tokens, MLP_ROWS)
    tiled = tile < tokens  # keeps x alone, and makes the rest again tile by tile
    own = 4 * layer.per_layer_input + (2 * h if layer.per_layer_input else 0)
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
    product = 2.0 * tokens * h * f
    more = 4.0 * tokens * h * layer.per_layer_input + 3 * 2.0 * tokens * h * layer.experts
    return _core.StageCost(
        writes=[tokens * h * size],
        forward=int(forward),
        backward=int(backward) + low_rank,
        kept=int(kept * size),
        saved=0,
        gradients=low_rank,
        forward_work=3 * product + more,
        again_work=(0 if tiled else 2 * product) + more,
        saved_work=0.0,
        backward_work=(5 if tiled else 3) * product + more,
    )


def _head(model: ModelShape, batch: BatchShape, device: Device) -> tuple[int, float]:
    """Most bytes and the work: a block of the weight, logits of a chunk of rows, h, dh."""
    h, m = model.width, batch.loss
    work = 4.0 * m * h * model.vocabulary
    if device.gpu:  # csrc/head.cpp: a tile of the weight, logits and their cotangents of some rows
        tile, chunk = min(model.vocabulary, 16384), min(m, 2048)
        inside = 2 * tile * h + 4 * chunk * tile + 6 * chunk * h + 6 * m * h
        return max(inside, 4 * batch.rows * batch.trimmed * h + 12 * m * h), work
    return cpu_logits(model, batch) + 4 * h * (batch.rows * batch.trimmed + 2 * m), work


def cpu_logits(model: ModelShape, batch: BatchShape) -> int:
    """Bytes of the logits that the head has at a time on the CPU: csrc/cpu/cross_entropy.cpp."""
    return 4 * model.vocabulary * min(batch.loss, 256)
