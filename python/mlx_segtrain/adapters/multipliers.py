"""What the product of a linear's factors is multiplied by, as each format says it."""

import math
from collections.abc import Callable
from typing import Any

import re2  # pyright: ignore[reportMissingImports]

from ..errors import InputError
from ..files import read_json
from ..lora.folder import CONFIG, OPTIQ_CONFIG, Folder, number, section

#: Patterns of a configuration, characters of each, bytes for its automata, and how many of them are
#: tried for all linears together: seconds.
PATTERNS, LONGEST, MEMORY, TRIED = 5000, 1000, 1 << 20, 5_000_000


def multiplier_of(folder: Folder) -> Callable[[str, int], float]:
    """The multiplier of a linear's update, by its stored path and rank."""
    if not folder.peft:
        scale, over_root = _scale(folder), _is_over_root(folder)
        return lambda _, rank: scale / math.sqrt(rank) if over_root else scale
    ranks = _by_pattern(folder, "rank_pattern", "r")
    alphas = _by_pattern(folder, "alpha_pattern", "lora_alpha")

    def multiplier(stored: str, rank: int) -> float:
        if (expected := ranks(stored)) != rank:  # then alpha is not for this rank either
            raise InputError(
                f"{folder.weights}: '{stored}' has rank {rank}, but r and rank_pattern in {CONFIG} "
                f"say {expected:g}: the two files are not of the same adapter."
            )
        return alphas(stored) / (math.sqrt(rank) if folder.config.get("use_rslora") else rank)

    return multiplier


def common_multiplier(folder: Folder, rank: int) -> float | None:
    """The multiplier of linears of this rank that match no pattern of PEFT; None if unknown."""
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


def _by_pattern(folder: Folder, name: str, general: str) -> Callable[[str], float]:
    """Values by patterns of the path, as PEFT has them: the first that matches an end of the path,
    from a dot on; else the general one.

    Patterns are a stranger's: RE2 needs time in proportion to the text, whatever the pattern, and
    bounded memory. InputError for what it does not take, and for more than can be tried.
    """
    file, config = folder.config_file, folder.config
    own, tried = section(file, config, name), 0

    def refused(why: str) -> InputError:
        return InputError(f"{file}: {name} has {why}.")

    def compiled(pattern: str) -> Any:
        if len(pattern) > LONGEST:
            raise refused(f"a pattern of {len(pattern)} characters, more than {LONGEST}")
        options = re2.Options()
        options.log_errors, options.max_mem = False, MEMORY
        try:
            return re2.compile(rf"(.*\.)?({pattern})$", options=options)
        except (re2.error, UnicodeError) as error:
            told = error.args[0]
            reason = told.decode("utf-8", "replace") if isinstance(told, bytes) else "it is no text"
            raise refused(
                f"no regular expression, or one that RE2 does not take: {pattern[:60]!r} "
                f"({reason[:100]})"
            ) from None

    if len(own) > PATTERNS:
        raise refused(f"{len(own)} patterns, more than {PATTERNS}")
    patterns = {key: compiled(key) for key in own}

    def value(stored: str) -> float:
        nonlocal tried
        tried += len(patterns)
        if tried > TRIED:
            raise refused("too many patterns for so many linears")
        key = next((key for key, pattern in patterns.items() if pattern.match(stored)), None)
        found = number(file, config, general) if key is None else number(file, own, key)
        if found is None:
            raise InputError(f"{file} has no {general}: add it, as PEFT writes it.")
        return found

    return value
