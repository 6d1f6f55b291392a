"""What keeps torch out of our own processes, where it is installed."""

import sys
from typing import Any


def hide_torch() -> None:
    """To this process torch is not installed any more.

    transformers would import it, which takes seconds and memory, and nothing of ours needs it. To
    be called before transformers is imported, and only where the process is ours.
    """
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # Python's own way to say that a module is not there
