"""Divides factors between ranks for a step, by their layers, and joins them for a file."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from ..config import TrainConfig
from .layout import Layout
from .optimizer import Optimizer
from .ranks import Ranks
from .state import Iterate

#: Begins the path of what an optimizer remembers of a vector of factors; others have a name.
VECTOR = "factors"


@dataclass(frozen=True)
class Holding:
    """The factors of a rank: `own`, a part of `whole`."""

    config: TrainConfig
    whole: Layout
    own: Layout
    ranks: Ranks

    def apart(self, at: Iterate) -> Iterate:
        """Returns this rank's part of all factors and of the optimizer's state."""
        if self.own == self.whole:
            return at
        return self._joined(dict(self._pieces(at, self.whole)), self.own, at.step)

    def together(self, at: Iterate) -> Iterate:
        """Returns all factors and the optimizer's whole state, on every rank."""
        if self.own == self.whole:
            return at
        aside = io.BytesIO()
        own: Any = {name: np.array(x) for name, x in self._pieces(at, self.own)}
        np.savez(aside, **own)
        found: dict[str, mx.array] = {}
        for content in self.ranks.every(aside.getvalue()):
            with np.load(io.BytesIO(content)) as pieces:
                found |= {name: mx.array(pieces[name]) for name in pieces.files}
        return self._joined(found, self.whole, at.step)

    def fresh(self, layout: Layout | None = None) -> Iterate:
        """Returns an iterate of a layout (by default of all factors) whose numbers are 0."""
        layout = layout or self.whole
        return Optimizer(self.config, layout).start(mx.zeros((layout.size,)))

    def _pieces(self, at: Iterate, layout: Layout) -> Iterator[tuple[str, mx.array]]:
        """Yields the parts of an iterate, each with a unique name."""
        yield from _cut(VECTOR, at.vector, layout)
        parts = layout.parts(len(at.moments))
        for i, (moments, part) in enumerate(zip(at.moments, parts, strict=True)):
            flat: Any = tree_flatten(moments)
            for path, x in flat:
                if path.startswith(f"{VECTOR}."):
                    yield from _cut(f"{i} {path}", x, part)
                else:
                    yield f"{i} {path}", x

    def _joined(self, pieces: Mapping[str, mx.array], layout: Layout, step: int) -> Iterate:
        fresh = self.fresh(layout)

        def vector(of: str, part: Layout) -> mx.array:
            own = [pieces[f"{of} {name}"] for _, name, _ in part.entries]
            return mx.concatenate(own) if own else mx.zeros((0,))

        moments = [
            tree_map_with_path(
                lambda path, x, i=i, part=part: (
                    vector(f"{i} {path}", part)
                    if path.startswith(f"{VECTOR}.")
                    else pieces[f"{i} {path}"]
                ),
                own,
            )
            for i, (own, part) in enumerate(
                zip(fresh.moments, layout.parts(len(fresh.moments)), strict=True)
            )
        ]
        at = Iterate(vector(VECTOR, layout), moments, step)
        mx.eval(at.vector, at.moments)
        return at


def _cut(of: str, vector: mx.array, layout: Layout) -> Iterator[tuple[str, mx.array]]:
    for own in layout.split(vector).values():
        for name, x in own.items():
            yield f"{of} {name}", x.reshape(-1)
