"""What the product of a linear's factors is multiplied by, as each format says it."""

import math
import re
from collections.abc import Callable
from functools import partial

from ..errors import InputError
from .folder import CONFIG, OPTIQ_CONFIG, Folder, number, read_json, section


def multiplier_of(folder: Folder) -> Callable[[str, int], float]:
    """The multiplier of a linear's update, by its stored path and rank."""
    if folder.peft:
        return partial(_peft_multiplier, folder)
    scale, over_root = _scale(folder), _is_over_root(folder)
    return lambda _, rank: scale / math.sqrt(rank) if over_root else scale


def common_multiplier(folder: Folder, rank: int) -> float | None:
    """Of linears of this rank that no pattern of PEFT's names; None if the files do not say it."""
    if not folder.peft:
        return multiplier_of(folder)("", rank)
    alpha = number(folder.config_file, folder.config, "lora_alpha")
    r = number(folder.config_file, folder.config, "r")
    if alpha is None or not r or r < 0:
        return None
    return alpha / (math.sqrt(r) if folder.config.get("use_rslora") else r)


def _scale(folder: Folder) -> float:
    """Where mlx-lm has it, else at the top as OptiQ may have it, else alpha over the rank."""
    file, config = folder.config_file, folder.config
    for values in (section(file, config, "lora_parameters"), config):
        scale = number(file, values, "scale")
        if scale is not None:
            return scale
    alpha, r = number(file, config, "lora_alpha"), number(file, config, "r")
    if alpha is None or not r:
        raise InputError(
            f"{file} has no lora_parameters.scale, no scale, and no lora_alpha with an r: add the "
            "multiplier as lora_parameters.scale."
        )
    return alpha / r


def _is_over_root(folder: Folder) -> bool:
    """Whether the multiplier is the scale over the root of the rank; ours holds the root already.

    mlx-bun writes the flag into OptiQ's file only.
    """
    if "segtrain" in folder.config:
        return False
    configs = {folder.config_file: folder.config}
    optiq = folder.config_file.with_name(OPTIQ_CONFIG)
    if optiq.is_file():
        configs[optiq] = read_json(optiq)
    return any(
        values.get("rs_lora")
        for file, config in configs.items()
        for values in (config, section(file, config, "lora_parameters"))
    )


def _peft_multiplier(folder: Folder, stored: str, rank: int) -> float:
    expected = _by_pattern(folder, "rank_pattern", "r", stored)
    if expected != rank:  # then alpha is not for this rank either
        raise InputError(
            f"{folder.weights}: '{stored}' has rank {rank}, but r and rank_pattern in {CONFIG} say "
            f"{expected:g}: the two files are not of the same adapter."
        )
    alpha = _by_pattern(folder, "alpha_pattern", "lora_alpha", stored)
    return alpha / (math.sqrt(rank) if folder.config.get("use_rslora") else rank)


def _is_quick(pattern: str) -> bool:
    """Whether matching ends soon, whatever the text: at most one thing is repeated, and no group.

    Patterns are a stranger's, and have no time limit.
    """
    plain = re.sub(r"\\.", "x", pattern)
    repeats = len(re.findall(r"[*+{]", plain))
    return len(pattern) <= 1000 and repeats <= 1 and not re.search(r"\)[*+{?]", plain)


def _by_pattern(folder: Folder, patterns: str, general: str, stored: str) -> float:
    """The value of the first pattern that matches an end of the path, from a dot on, as PEFT does;
    the general one if there is none."""
    file, config = folder.config_file, folder.config
    own = section(file, config, patterns)
    if slow := next((key for key in own if not _is_quick(key)), None):
        raise InputError(f"{file}: {patterns} has {slow[:60]!r}, which may take for ever to match.")
    try:
        key = next((key for key in own if re.match(rf"(.*\.)?({key})$", stored)), None)
    except re.error as error:
        raise InputError(f"{file}: {patterns} has no regular expression: {error}.") from None
    value = number(file, config, general) if key is None else number(file, own, key)
    if value is None:
        raise InputError(f"{file} has no {general}: add it, as PEFT writes it.")
    return value
