"""Divides the factors between the ranks of a pipeline by layer, and gathers them when a file is
written."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from ..config import TrainConfig
from .layout import Layout
from .optimizer import Optimizer
from .ranks import Ranks
from .state import Iterate

#: The first part of a moment's path in the optimizer state, if the optimizer treats all factors as
#: one vector.
VECTOR = "factors"


@dataclass(frozen=True)
class Holding:
    """The layouts of this rank's factors (`own`) and of the factors of all ranks (`whole`)."""

    config: TrainConfig
    whole: Layout
    own: Layout
    ranks: Ranks

    def apart(self, at: Iterate) -> Iterate:
        """Returns this rank's part of the factors and the optimizer state."""
        if self.own == self.whole:
            return at
        pieces = {name: x for own in self._sets(at, self.whole) for name, x in own.items()}
        return self._joined(pieces, self.own, at.step)

    def together(self, at: Iterate, moments: bool = True) -> Iterate:
        """Returns the factors of all ranks on rank 0, which writes the files, and only a part of
        them on the other ranks. Includes the optimizer state if `moments` is set.

        The arrays are gathered in main memory, one set at a time; only the result is on the device.
        """
        # Testing `own == whole` would be wrong: in a pipeline, even a rank that has all factors
        # must take part in the gathering.
        if not self.ranks.pipeline:
            return at
        if not moments:
            at = replace(at, moments=[])
        found: dict[str, np.ndarray] = {}
        for own in self._sets(at, self.own):
            aside, arrays = io.BytesIO(), {name: np.array(x) for name, x in own.items()}
            np.savez(aside, **cast(Any, arrays))
            for content in self.ranks.every(aside.getvalue()):
                if self.ranks.first:
                    with np.load(io.BytesIO(content)) as pieces:
                        found |= {name: pieces[name] for name in pieces.files}
        return self._joined(found, self.whole, at.step, moments) if self.ranks.first else at

    def fresh(self, layout: Layout | None = None) -> Iterate:
        """Returns an iterate of zeros for `layout`, by default the layout of all factors."""
        layout = layout or self.whole
        return Optimizer(self.config, layout).start(mx.zeros((layout.size,)))

    def _sets(self, at: Iterate, layout: Layout) -> Iterator[dict[str, mx.array]]:
        """Yields the arrays of an iterate in several sets, keyed by names that are unique across
        the sets. The number of sets is the same on all ranks."""
        yield dict(_cut(VECTOR, at.vector, layout))
        parts = layout.parts(len(at.moments)) if at.moments else []
        for i, (moments, part) in enumerate(zip(at.moments, parts, strict=True)):
            flat: Any = tree_flatten(moments)
            rest: dict[str, mx.array] = {}
            for path, x in flat:
                if path.startswith(f"{VECTOR}."):
                    yield dict(_cut(f"{i} {path}", x, part))
                else:
                    rest[f"{i} {path}"] = x
            yield rest

    def _joined(
        self, pieces: Mapping[str, Any], layout: Layout, step: int, moments: bool = True
    ) -> Iterate:
        fresh = self.fresh(layout).moments if moments else []

        def vector(of: str, part: Layout) -> mx.array:
            own = [pieces[f"{of} {name}"] for _, name, _ in part.entries]
            if own and isinstance(own[0], np.ndarray):
                return mx.array(np.concatenate(own))
            return mx.concatenate(own) if own else mx.zeros((0,))

        found = [
            tree_map_with_path(
                lambda path, x, i=i, part=part: (
                    vector(f"{i} {path}", part)
                    if path.startswith(f"{VECTOR}.")
                    else mx.array(pieces[f"{i} {path}"])
                ),
                own,
            )
            for i, (own, part) in enumerate(
                zip(fresh, layout.parts(len(fresh)) if fresh else [], strict=True)
            )
        ]
        at = Iterate(vector(VECTOR, layout), found, step)
        mx.eval(at.vector, at.moments)
        return at


def _cut(of: str, vector: mx.array, layout: Layout) -> Iterator[tuple[str, mx.array]]:
    for own in layout.split(vector).values():
        for name, x in own.items():
            yield f"{of} {name}", x.reshape(-1)
