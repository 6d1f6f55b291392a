"""What keeps torch out of our own processes, where it is installed."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

__all__ = ["hide_torch"]


def hide_torch() -> None:
    """transformers does not find torch in this process any more.

    It would import it, which takes seconds and memory, and nothing of ours needs it. To be called
    before transformers is imported, and only where the process is ours.
    """
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] == "torch" else find(name, package)

    importlib.util.find_spec = without
