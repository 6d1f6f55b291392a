"""Paths of modules: mlx-lm, transformers and files spell the path of the same module differently.

Of a model for text and images mlx-lm has the text model around `model`, transformers within it.
"""

#: mlx-lm's wrapper of a text model within a model for text and images.
WRAPPER = "language_model."
#: The same in transformers.
_WITHIN = "model.language_model."


def bare(path: str) -> str:
    """A module's path without the wrapper."""
    return path.removeprefix(WRAPPER)


def spellings(path: str) -> tuple[str, str, str]:
    """A module's path as it is, without the wrapper, and with it."""
    return path, bare(path), WRAPPER + bare(path)


def is_wrapped(path: str) -> bool:
    return path.startswith(WRAPPER)


def in_transformers(path: str) -> str:
    """mlx-lm's path of a module as transformers spells it in a model for text and images."""
    inner = bare(path)
    return _WITHIN + inner.removeprefix("model.") if inner.startswith("model.") else inner


def in_mlx_lm(stored: str) -> str:
    """A path of transformers or mlx-lm as mlx-lm spells it."""
    if stored.startswith(_WITHIN):
        return f"{WRAPPER}model.{stored.removeprefix(_WITHIN)}"
    return stored
