"""Shows a run in a notebook: messages, followed by a line that is updated at each step."""

from __future__ import annotations

import sys
from html import escape
from typing import Any

from rich.console import Console

from mlx_segtrain.commands.terminal import Terminal
from mlx_segtrain.events import Event


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook, which can show HTML in its
    cells."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython  # pyright: ignore[reportMissingImports]

    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


class Notebook(Terminal):
    """A Terminal that shows the progress bar as HTML in the output of the cell."""

    def __init__(self) -> None:
        # Messages are plain lines in the output of the cell.
        super().__init__(Console(force_terminal=False, force_jupyter=False, highlight=False))
        self._shown: Any = None

    def _show(self, event: Event) -> None:
        if event["type"] == "metric" and event["kind"] == "train":
            self.step(event)
        else:
            super()._show(event)

    def _draw(self, event: Event) -> None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        self._last = event
        step = event["step"]
        text = f"{step}/{self.iters}  {self._figures(event, wide=True)}{self._loss}"
        html = HTML(
            f"<progress value='{step}' max='{self.iters}' style='width:16em'></progress> "
            f"<span style='font-family:monospace'>{escape(text)}</span>"
        )
        if self._shown is None:
            self._shown = display(html, display_id=True)
        else:
            self._shown.update(html)
