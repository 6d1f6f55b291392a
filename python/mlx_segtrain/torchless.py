"""Prevents our processes from importing torch, even if it is installed."""

import sys
from typing import Any


def hide_torch() -> None:
    """Makes this process behave as if torch were not installed.

    transformers would import torch, which takes seconds and uses memory, although nothing here
    needs torch. This must be called before transformers is imported, and only in our own processes.
    """
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # `import torch` now raises ModuleNotFoundError


def show_torch() -> None:
    """Allows this process to import torch again, because the user's code may need it."""
    if "torch" in sys.modules and sys.modules["torch"] is None:
        del sys.modules["torch"]
