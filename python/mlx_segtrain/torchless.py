"""Keeps torch out of our own processes even if it is installed."""

import sys
from typing import Any


def hide_torch() -> None:
    """Makes this process behave as if torch were not installed.

    transformers would import it, which takes seconds and memory, and nothing here needs it. Call
    this before transformers is imported, and only in our own processes.
    """
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # makes `import torch` raise ModuleNotFoundError


def show_torch() -> None:
    """Lets this process import torch again, for code of the user."""
    if "torch" in sys.modules and sys.modules["torch"] is None:
        del sys.modules["torch"]
