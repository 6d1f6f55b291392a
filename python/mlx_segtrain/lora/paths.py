"""Converts paths of modules, which mlx-lm, transformers and adapter files spell differently.

In a model for text and images, mlx-lm has `model` inside `language_model`, and transformers has
`language_model` inside `model`.
"""

#: mlx-lm's prefix for the text model of a model for text and images.
WRAPPER = "language_model."
#: The prefix in transformers.
_WITHIN = "model.language_model."


def bare(path: str) -> str:
    """Returns a module's path without WRAPPER."""
    return path.removeprefix(WRAPPER)


def spellings(path: str) -> tuple[str, str, str]:
    """Returns a module's path as it is, without WRAPPER, and with it."""
    return path, bare(path), WRAPPER + bare(path)


def is_wrapped(path: str) -> bool:
    return path.startswith(WRAPPER)


def in_transformers(path: str) -> str:
    """Converts mlx-lm's path to that of transformers' model for text and images."""
    inner = bare(path)
    return _WITHIN + inner.removeprefix("model.") if inner.startswith("model.") else inner


def in_mlx_lm(stored: str) -> str:
    """Converts a path of transformers or mlx-lm to mlx-lm's."""
    if stored.startswith(_WITHIN):
        return f"{WRAPPER}model.{stored.removeprefix(_WITHIN)}"
    return stored
