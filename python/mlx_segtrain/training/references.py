"""Computes log-probabilities under the model without an adapter, and caches them.

The cache directory contains one file per model. For each row that a run has used, the file contains
the log-probabilities of the row's responses. Rows are identified by their tokens, so a row that is
truncated, rendered or tokenized differently counts as a different row.
"""

import hashlib
import zipfile
from collections.abc import Collection
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import _core, events
from ..config import TrainConfig
from ..data import Dataset, Pair, Row, one_row
from ..data.encoding import sequences
from ..files import atomic, cache_dir, make_folder
from ..models import Chain
from ..objectives import Objective, Value, value
from .ranks import ALONE, Ranks

#: The size of a row's key in bytes.
KEY = 16


def with_references(
    objective: Objective,
    config: TrainConfig,
    chain: Chain,
    data: Dataset,
    on_event: events.OnEvent = lambda event: None,
    wanted: Collection[int] | None = None,
    ranks: Ranks = ALONE,
    value: Value = value,
) -> Dataset:
    """Adds the outputs of the objective's reference model to the rows whose indices are in `wanted`
    (by default, to all rows). If the objective has no reference, `data` is returned unchanged.

    Each row is run alone, so that its values do not depend on other rows. The ranks share the work
    on the rows that are missing from the cache of at least one rank, and all ranks cache the
    results.
    """
    reference = objective.reference
    if reference is None:
        return data
    file = cache_dir() / "references" / f"{model_key(config)}.npz"
    known = _read(file)
    keys = {i: row_key(data.rows[i]) for i in (range(len(data)) if wanted is None else wanted)}
    unknown = ranks.gather([i for i, key in keys.items() if key not in known])
    missing = sorted({i for own in unknown for i in own})
    if missing:
        count = f"{len(missing)} rows with the model without its adapter"
        on_event(events.stage("data", 0.03, f"reference: {count}"))
        found = {}
        for i in ranks.share(missing):
            if keys[i] not in known or ranks.pipeline:  # in a pipeline, all ranks take part
                batch = one_row(data, i)
                sums = value(reference, chain, {}, {}, batch, reference.total([batch]))
                if not ranks.ends:
                    continue
                known[keys[i]] = tuple(map(float, np.array(sums[0])))
            found[keys[i].hex()] = known[keys[i]]
        known |= {bytes.fromhex(key): tuple(x) for key, x in ranks.gathered(found).items()}
        try:
            _write(file, known)
        except OSError as error:
            said = f"{file} cannot be written ({error.strerror or error})"
            on_event(
                events.warning(
                    f"{said}; other runs will compute the reference log-probabilities again"
                )
            )
    of_rows = {i: known[key] for i, key in keys.items()}
    return data.map(lambda i, row: replace(row, reference=of_rows.get(i)))


def model_key(config: TrainConfig) -> str:
    """Returns a hash that identifies the model and the conditions under which it runs. The hash
    covers MLX's version, the device, the settings of the kernels, and the path, size and
    modification time of the model's files. It does not cover the content of these files, which
    would take too long to read."""
    digest, folder = hashlib.blake2b(digest_size=KEY), config.model_dir
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    digest.update(
        f"{version('mlx')}\0{mx.default_device()}\0{mx.device_info().get('device_name')}\0"
        f"{_core.is_repeatable()}\0{_core.is_bfloat16_products()}".encode()
    )
    return digest.hexdigest()


def row_key(whole: Row | Pair) -> bytes:
    """Returns a hash of a row's tokens and of the set of tokens that belong to a response."""
    digest = hashlib.blake2b(digest_size=KEY)
    for row in sequences(whole):
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.ids.astype("<i4").tobytes() + (row.weights != 0).tobytes())
    return digest.digest()


def _read(file: Path) -> dict[bytes, tuple[float, ...]]:
    """Returns the content of a cache file, or {} if the file cannot be read."""
    try:
        with np.load(file) as stored:
            parts = np.split(stored["values"], np.cumsum(stored["counts"])[:-1])
            keys = [key.tobytes() for key in stored["keys"]]
            return {key: tuple(own.tolist()) for key, own in zip(keys, parts, strict=True)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _write(file: Path, known: dict[bytes, tuple[float, ...]]) -> None:
    make_folder(file.parent)
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, KEY)
    with atomic(file) as aside, open(aside, "wb") as stored:
        counts = np.array([len(own) for own in known.values()], np.int64)
        values = np.array([x for own in known.values() for x in own], np.float64)
        np.savez(stored, keys=keys, counts=counts, values=values)
