"""Which rows are held out, stand there twice, or stand in two sets: told by a row's own content.

So the order of rows decides nothing, equal rows are on one side, and a resumed run has the same.
"""

import numpy as np

from .samples import Samples, beginnings

#: Rows that are held out where nothing else is said: a share, at most so many; and the number of
#: rows up to which none are.
SHARE, MOST, FEW = 0.05, 500, 100


def repeated(samples: Samples) -> np.ndarray:
    """Whether each sample's row stands before it already, bool [n]."""
    _, at, of = np.unique(samples.content, return_index=True, return_inverse=True)
    return samples.record != samples.record[at][of]


def duplicates(samples: Samples) -> int:
    """How many rows are equal to an earlier one."""
    return len(beginnings(samples.record[repeated(samples)]))


def in_both(samples: Samples, other: Samples) -> int:
    """How many rows of one source stand in another, too."""
    return len(beginnings(samples.record[np.isin(samples.content, other.content)]))


def held_out(samples: Samples, chosen: np.ndarray, asked: float | str, seed: int) -> np.ndarray:
    """Whether each of the samples, by ascending index, is held out for validation: bool
    [len(chosen)].

    `asked` is a share of the rows below 1, a number of rows, or auto. Equal rows go together, so
    that there may be a few less.
    """
    content = samples.content[chosen]
    at = beginnings(samples.record[chosen])
    known, times = np.unique(content[at], return_counts=True)
    n = len(at)
    if asked == "auto":
        count = 0 if n <= FEW else min(round(SHARE * n), MOST)
    else:
        count = round(float(asked) * n) if float(asked) < 1 else int(asked)
    few = times <= count
    known, times = known[few], times[few]
    order = np.argsort(_mixed(known, seed), kind="stable")
    taken = known[order[np.cumsum(times[order]) <= count]]
    return np.isin(content, taken)


def _mixed(content: np.ndarray, seed: int) -> np.ndarray:
    """Other numbers for each seed, the same for equal content (the end of splitmix64)."""
    x = content ^ np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
