"""Determines, from the content of rows, which rows are held out, which are duplicates, and which
occur in two data sets.

Because only the content counts, the order of rows does not matter, equal rows are in the same
split, and a resumed run splits the data in the same way.
"""

import numpy as np

from .samples import Samples, beginnings

#: By default, the fraction SHARE of the rows is held out, but at most MOST rows, and none if there
#: are at most FEW rows.
SHARE, MOST, FEW = 0.05, 500, 100


def repeated(samples: Samples) -> np.ndarray:
    """Returns, for each sample, whether its row repeats an earlier one; bool [n]."""
    _, at, of = np.unique(samples.content, return_index=True, return_inverse=True)
    return samples.record != samples.record[at][of]


def duplicates(samples: Samples) -> int:
    """Counts the rows that repeat an earlier one."""
    return len(beginnings(samples.record[repeated(samples)]))


def in_both(samples: Samples, other: Samples) -> int:
    """Counts the rows of one source that are also in another."""
    return len(beginnings(samples.record[np.isin(samples.content, other.content)]))


def held_out(samples: Samples, chosen: np.ndarray, asked: float | str, seed: int) -> np.ndarray:
    """Returns, for each chosen sample (ascending indices), whether it is held out for validation;
    bool [len(chosen)].

    `asked` is a fraction below 1, a number of rows, or auto. Because equal rows stay together,
    slightly fewer rows than requested may be held out.
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
    """Hashes the content together with the seed, using the final steps of splitmix64."""
    x = content ^ np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
