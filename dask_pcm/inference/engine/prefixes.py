"""Which beginnings rows share: found over all rows at hand, before any of them is computed.

Pure: token ids in, a tree of prefixes out.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

#: A prefix is worth its pages if it saves at least as many tokens in all.
_LEAST_SAVED_TOKENS = 64


@dataclass(slots=True)
class SharedPrefix:
    """A beginning that several rows share.

    Attributes
    ----------
    n_tokens
        Its length.
    rows
        Positions of the rows that begin with it.
    inner
        Longer prefixes of some of these rows.
    """

    n_tokens: int
    rows: list[int]
    inner: list[SharedPrefix] = field(default_factory=list)


def shared_prefixes(
    rows: Sequence[Sequence[int]], least_saved_tokens: int = _LEAST_SAVED_TOKENS
) -> list[SharedPrefix]:
    """Find the prefixes of `rows` that are worth computing once.

    At least one token of each row is left to compute, since its logits are wanted.

    Examples
    --------
    >>> rows = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [9]]
    >>> [(one.n_tokens, sorted(one.rows)) for one in shared_prefixes(rows, least_saved_tokens=2)]
    [(2, [0, 1, 2])]
    """
    # Any order in which rows that begin alike are neighbours; bytes are the fastest to compare.
    keys = [array("i", row[:-1]).tobytes() for row in rows]
    starts = [np.frombuffer(key, np.intc) for key in keys]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    common = [0, *itertools.starmap(common_length, itertools.pairwise(starts[k] for k in order))]
    found: list[SharedPrefix] = []
    # Intervals of sorted rows, with the prefix around them and where what is found goes.
    todo: list[tuple[int, int, int, list[SharedPrefix]]] = [(0, len(rows), 0, found)]
    while todo:
        low, high, n_outer, siblings = todo.pop()
        if high - low < 2:
            continue
        n_shared = min(common[low + 1 : high])
        if (n_shared - n_outer) * (high - low - 1) >= least_saved_tokens:
            one = SharedPrefix(n_shared, order[low:high])
            siblings.append(one)
            n_outer, siblings = n_shared, one.inner
        cuts = [low, *(k for k in range(low + 1, high) if common[k] == n_shared), high]
        todo += [(a, b, n_outer, siblings) for a, b in itertools.pairwise(cuts)]
    return found


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two rows."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n
