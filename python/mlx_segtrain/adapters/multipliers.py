"""Finds the multiplier of a layer's update, which each format stores in a different way."""

import math
from collections.abc import Callable
from typing import Any

import re2  # pyright: ignore[reportMissingImports]

from ..errors import InputError
from ..files import read_json
from ..lora.folder import CONFIG, OPTIQ_CONFIG, Folder, number, section

#: Limits on the number of patterns in a configuration, the characters in a pattern, and the bytes
#: of a pattern's automata. TRIED limits the total number of attempts to match a pattern with a
#: path, and therefore the running time.
PATTERNS, LONGEST, MEMORY, TRIED = 5000, 1000, 1 << 20, 5_000_000


def multiplier_of(folder: Folder) -> Callable[[str, int], float]:
    """Returns a function that computes the multiplier of a layer from its stored path and its
    rank."""
    if not folder.peft:
        scale, over_root = _scale(folder), _is_over_root(folder)
        return lambda _, rank: scale / math.sqrt(rank) if over_root else scale
    ranks = _by_pattern(folder, "rank_pattern", "r")
    alphas = _by_pattern(folder, "alpha_pattern", "lora_alpha")

    def multiplier(stored: str, rank: int) -> float:
        if (expected := ranks(stored)) != rank:  # alpha is for the expected rank
            raise InputError(
                f"{folder.weights}: '{stored}' has rank {rank}, but r and rank_pattern in {CONFIG} "
                f"say {expected:g}: the two files belong to different adapters."
            )
        return alphas(stored) / (math.sqrt(rank) if folder.config.get("use_rslora") else rank)

    return multiplier


def common_multiplier(folder: Folder, rank: int) -> float | None:
    """Returns the multiplier for layers of this rank that match no PEFT pattern. If the
    configuration does not determine it, returns None."""
    if not folder.peft:
        return multiplier_of(folder)("", rank)
    alpha = number(folder.config_file, folder.config, "lora_alpha")
    r = number(folder.config_file, folder.config, "r")
    if alpha is None or not r or r < 0:
        return None
    return alpha / (math.sqrt(r) if folder.config.get("use_rslora") else r)


def _scale(folder: Folder) -> float:
    """Returns mlx-lm's scale or, if that is missing, the scale at the top level, where OptiQ may
    write it. If both are missing, returns alpha divided by the rank."""
    file, config = folder.config_file, folder.config
    for values in (section(file, config, "lora_parameters"), config):
        scale = number(file, values, "scale")
        if scale is not None:
            return scale
    alpha, r = number(file, config, "lora_alpha"), number(file, config, "r")
    if alpha is None or not r:
        raise InputError(
            f"{file} does not set the LoRA scale (lora_parameters.scale, scale, or lora_alpha and "
            "r): add lora_parameters.scale."
        )
    return alpha / r


def _is_over_root(folder: Folder) -> bool:
    """Returns whether the scale must still be divided by the square root of the rank. In our own
    adapters, the scale already includes this division.

    mlx-bun writes the flag `rs_lora` only into OptiQ's file.
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


def _by_pattern(folder: Folder, name: str, general: str) -> Callable[[str], float]:
    """Returns a function that looks up a layer's value as PEFT does. Its result is the value of the
    first pattern that matches the whole path or the end of the path after a dot, or the general
    value if no pattern matches.

    Patterns are untrusted. RE2 matches any pattern in bounded memory and in time proportional to
    the length of the text. Raises InputError if RE2 does not support a pattern, or if there are too
    many patterns.
    """
    file, config = folder.config_file, folder.config
    own, tried = section(file, config, name), 0

    def refused(why: str) -> InputError:
        return InputError(f"{file}: {name} has {why}.")

    def compiled(pattern: str) -> Any:
        if len(pattern) > LONGEST:
            raise refused(f"a pattern of {len(pattern)} characters; the maximum is {LONGEST}")
        options = re2.Options()
        options.log_errors, options.max_mem = False, MEMORY
        try:
            return re2.compile(rf"(.*\.)?({pattern})$", options=options)
        except (re2.error, UnicodeError) as error:
            why = error.args[0]
            reason = why.decode("utf-8", "replace") if isinstance(why, bytes) else "not text"
            raise refused(
                f"a pattern that RE2 does not support: {pattern[:60]!r} ({reason[:100]})"
            ) from None

    if len(own) > PATTERNS:
        raise refused(f"{len(own)} patterns; the maximum is {PATTERNS}")
    patterns = {key: compiled(key) for key in own}

    def value(stored: str) -> float:
        nonlocal tried
        tried += len(patterns)
        if tried > TRIED:
            raise refused("too many patterns for this many layers")
        key = next((key for key, pattern in patterns.items() if pattern.match(stored)), None)
        found = number(file, config, general) if key is None else number(file, own, key)
        if found is None:
            raise InputError(f"{file} does not set {general}, which PEFT always writes: add it.")
        return found

    return value
