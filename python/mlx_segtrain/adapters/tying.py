"""Handles updates of an embedding that is also the head. Their meaning differs between mlx-lm, PEFT
and this package.

In mlx-lm, and therefore in our files, an update of the embedding changes its weight, so a head that
uses this weight also changes. In PEFT, an update changes only the module: the head keeps the weight
of the base model unless the head also has an update. With `ensure_weight_tying`, PEFT also applies
the embedding's update to the head, and writes its factors a second time, transposed, under the
head's name. Therefore PEFT's adapters for a base model whose embedding is also the head can be read
only if both modules have the same update. In our files, `segtrain.tied` says whether the base model
of an adapter that updates an embedding uses this embedding as its head.
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import InputError
from ..lora import Adapter
from ..lora.folder import Folder
from ..models.headers import read_shape
from ..models.snapshot import Snapshot

#: The tensor names of each layer, keyed by the layer's stored path.
Found = dict[str, list[str]]
#: Names of the head in transformers.
HEADS = ("lm_head", "embed_out")
MENDED = (
    "but this model has one weight for both: train the adapter again with ensure_weight_tying, "
    "or merge it with PEFT into a model that has a separate head."
)


def is_head(path: str) -> bool:
    return path.rpartition(".")[2] in HEADS


def tied_by_files(folder: Folder, found: Found, model_dir: Path | None) -> bool | None:
    """Returns whether the adapter's base model lacks a separate head, or None if the answer is
    unknown or irrelevant for the adapter.

    The base model is `model_dir`, or else the folder that the adapter names. Raises InputError if
    the answer matters and cannot be determined, or if the base model cannot be read.
    """
    embeds, heads = _embeddings(folder, found), list(filter(is_head, found))
    if not (embeds or heads or folder.tied is not None):
        return None
    if base := model_dir or folder.base_folder:
        return read_shape(base).tied
    if not embeds:
        return folder.tied
    if heads and folder.config.get("ensure_weight_tying"):
        return True
    raise InputError(
        f"{folder.weights} changes an embedding, and without the base model it is unknown whether "
        "the output head shares this embedding: pass the base model with --model."
    )


def joined(folder: Folder, found: Found, tied: bool | None) -> tuple[Found, dict[str, str]]:
    """Returns the tensors to read, and a dict that is empty unless the base model uses one weight
    for embedding and head. In that case, the head's update is left out of the tensors, and the dict
    maps the path of the embedding's update to the path of the head's update.

    Only names are checked here: `check_twins` tests whether both updates are equal. Raises
    InputError if the adapter updates only one of the two modules. Also raises InputError if
    embedding and head are tied in this model but not in the model on which the adapter was trained,
    or vice versa.
    """
    if tied is None:
        return found, {}
    if folder.tied is not None and folder.tied != tied:
        kinds = ("no separate head", "a separate head")
        own, other = kinds if tied else kinds[::-1]
        raise InputError(
            f"{folder.weights}: the adapter changes the embedding, and was trained on a model with "
            f"{other}, but this model has {own}: pass the model that the adapter was trained on."
        )
    if not tied:
        return found, {}
    embeds, heads = _embeddings(folder, found), list(filter(is_head, found))
    if heads and not folder.peft:
        raise InputError(
            f"{folder.weights} changes the head '{heads[0]}', but this model has no separate head: "
            "it uses the embedding as its head."
        )
    if heads and not embeds:
        raise InputError(
            f"{folder.weights}: PEFT's update of '{heads[0]}' leaves the embedding unchanged, "
            f"{MENDED}"
        )
    if embeds and not heads and not folder.config.get("ensure_weight_tying"):
        raise InputError(
            f"{folder.weights}: PEFT's update of '{embeds[0]}' leaves the head unchanged, {MENDED}"
        )
    rest = {path: names for path, names in found.items() if path not in heads}
    return rest, dict(zip(embeds, heads, strict=False))


def check_twins(
    folder: Folder,
    twins: Mapping[str, str],
    update: Mapping[str, tuple[mx.array, mx.array, float]],
) -> None:
    """Raises InputError unless each head has the same update as its embedding, with the factors a
    and b exchanged and transposed.

    `update` maps each stored path to the factors a [in, R] and b [R, out], and the multiplier.
    """
    for embedding, head in twins.items():
        (a, b, scale), (head_a, head_b, head_scale) = update[embedding], update[head]
        same = a.shape[::-1] == head_b.shape and b.shape[::-1] == head_a.shape
        if not (same and mx.array_equal(a, head_b.T) and mx.array_equal(b, head_a.T)) or (
            abs(scale - head_scale) > 1e-6 * abs(scale)
        ):
            raise InputError(
                f"{folder.weights}: PEFT's updates of '{embedding}' and '{head}' differ, {MENDED}"
            )


def check_base(adapter: Adapter, base: Snapshot) -> None:
    """Raises InputError if the adapter updates a separate head that the base model lacks. Also
    raises InputError if the adapter updates an embedding that is also the head in the base model
    but not in the model on which the adapter was trained, or vice versa."""
    heads = list(filter(is_head, adapter.tensors))
    if not heads and adapter.tied is None:
        return
    tied = read_shape(base).tied
    if tied and heads:
        raise InputError(
            f"the adapter changes the head '{heads[0]}', but {base.folder} has no separate head: "
            "it uses the embedding as its head."
        )
    if None not in (tied, adapter.tied) and adapter.tied != tied:
        has = "no separate head" if tied else "a separate head"
        raise InputError(
            f"{base.folder} has {has}, unlike the model that the adapter was trained on, and the "
            "adapter changes the embedding: pass the model that the adapter was trained on."
        )


def common(adapters: list[Adapter]) -> bool | None:
    """Returns the value of `tied` for the sum of adapters. Raises InputError if the adapters have
    different values."""
    kinds = {adapter.tied for adapter in adapters} - {None}
    if len(kinds) > 1:
        raise InputError(
            "the adapters belong to different models: in one model the embedding is also the head, "
            "in another the head is separate."
        )
    return kinds.pop() if kinds else None


def _embeddings(folder: Folder, found: Found) -> list[str]:
    """Returns the paths of the layers that PEFT stores as embeddings."""
    if not folder.peft:
        return []
    return [path for path, names in found.items() if any(".lora_embedding_" in x for x in names)]
