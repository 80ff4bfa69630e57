"""What rows share: a tree of prefixes, over all rows at hand."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dask_pcm.inference.engine.prefixes import common_length, shared_prefixes

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12)


def flat(found):
    for one in found:
        yield one
        yield from flat(one.inner)


@given(ROWS, st.integers(1, 8))
def test_rows_have_the_prefix_that_they_are_given_and_a_token_besides(rows, least):
    for one in flat(shared_prefixes(rows, least)):
        assert len(one.rows) > 1
        assert len({tuple(rows[k][: one.n_tokens]) for k in one.rows}) == 1
        assert all(len(rows[k]) > one.n_tokens for k in one.rows)
        for inner in one.inner:
            assert inner.n_tokens > one.n_tokens and set(inner.rows) <= set(one.rows)


@given(ROWS)
def test_no_token_is_computed_twice_where_every_token_counts(rows):
    """With a threshold of one token, what is computed are the nodes of a trie, and last tokens."""
    n_computed = 0
    length = dict.fromkeys(range(len(rows)), 0)
    todo = [(one, 0) for one in shared_prefixes(rows, 1)]
    while todo:
        one, n_outer = todo.pop()
        n_computed += one.n_tokens - n_outer
        length.update(dict.fromkeys(one.rows, one.n_tokens))
        todo += [(inner, one.n_tokens) for inner in one.inner]
    n_computed += sum(len(row) - length[k] for k, row in enumerate(rows))
    starts = {tuple(row[:n]) for row in rows for n in range(1, len(row))}
    assert n_computed == len(starts) + len(rows)


def test_instructions_and_evidence_are_found_on_two_levels():
    rng = random.Random(0)
    instructions, *evidence = ([rng.randrange(999) for _ in range(100)] for _ in range(4))
    rows = [[*instructions, *evidence[k % 3], rng.randrange(999), k] for k in range(12)]
    (outer,) = shared_prefixes(rows)
    assert outer.n_tokens == 100 and len(outer.rows) == 12
    assert [one.n_tokens for one in outer.inner] == [200] * 3
    assert sorted(sorted(one.rows) for one in outer.inner) == [
        [k, k + 3, k + 6, k + 9] for k in range(3)
    ]


def test_what_saves_little_is_no_prefix():
    rows = [[1] * 30 + [k] * 9 for k in range(3)]
    assert not shared_prefixes(rows)
    assert shared_prefixes([*rows, [1] * 30 + [4] * 9])[0].n_tokens == 30


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_the_length_of_a_common_beginning(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    assert common_length(np.array(a), np.array(b)) == n
