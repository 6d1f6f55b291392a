"""Converts module paths between the spellings of mlx-lm, transformers and adapter files.

The spellings differ for multimodal models: in mlx-lm, `model` is inside `language_model`; in
transformers, `language_model` is inside `model`.
"""

#: The prefix of the text model in a multimodal model of mlx-lm.
WRAPPER = "language_model."
#: The corresponding prefix in transformers.
_WITHIN = "model.language_model."


def bare(path: str) -> str:
    """Returns the path of a module without WRAPPER."""
    return path.removeprefix(WRAPPER)


def spellings(path: str) -> tuple[str, str, str]:
    """Returns three spellings of a module's path: unchanged, without WRAPPER, and with WRAPPER."""
    return path, bare(path), WRAPPER + bare(path)


def is_wrapped(path: str) -> bool:
    return path.startswith(WRAPPER)


def in_transformers(path: str) -> str:
    """Converts an mlx-lm path to the corresponding path in transformers' multimodal model."""
    inner = bare(path)
    return _WITHIN + inner.removeprefix("model.") if inner.startswith("model.") else inner


def in_mlx_lm(stored: str) -> str:
    """Converts a transformers path to the corresponding mlx-lm path. Returns mlx-lm paths
    unchanged."""
    if stored.startswith(_WITHIN):
        return f"{WRAPPER}model.{stored.removeprefix(_WITHIN)}"
    return stored
