from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_pcm.inference.shapes import Shapes, batches_by_length


@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    max_tokens=st.integers(1, 300),
)
def test_batches_hold_every_row_once_within_their_tokens(lengths, max_tokens):
    groups = batches_by_length(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = max(lengths[i] for i in group) * len(group)
        assert padded <= max_tokens or len(group) == 1


LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)


@given(lengths=LENGTHS, others=LENGTHS)
def test_a_fixed_shape_depends_on_the_length_of_a_row_alone(lengths, others):
    shapes = Shapes(SimpleNamespace(), 200, is_fixed=True)

    def shapes_of(all_lengths):
        found = {}
        for group in shapes.batches(all_lengths, 1):
            padded = shapes.padded([[7] * all_lengths[k] for k in group])
            assert len(padded) == shapes.n_rows
            found |= {k: {len(row) for row in padded} for k in group}
        return [found[k] for k in range(len(all_lengths))]

    both = shapes_of(lengths + others)
    assert shapes_of(lengths) == both[: len(lengths)]
    assert all(
        len(one) == 1 and n <= min(one) <= 200
        for n, one in zip(lengths, both[: len(lengths)], strict=True)
    )


def test_rows_are_padded_with_their_own_last_token():
    shapes = Shapes(SimpleNamespace(), None, is_fixed=False)
    assert shapes.padded([[1, 2], [3, 4, 5]]) == [[1, 2, 2], [3, 4, 5]]


@given(positions=st.lists(st.integers(0, 500), min_size=1, max_size=70, unique=True).map(sorted))
def test_as_many_positions_are_kept_at_a_time_where_shapes_are_fixed(positions):
    kept = Shapes(SimpleNamespace(), None, is_fixed=True).kept(positions)
    assert len({len(some) for some in kept}) == 1
    assert [one for some in kept for one in some][: len(positions)] == positions
    assert Shapes(SimpleNamespace(), None, is_fixed=False).kept(positions) == [positions]


@pytest.mark.parametrize("max_tokens, short", [(None, 100), (300, 100), (100, None), (60, None)])
def test_rows_of_other_rotary_frequencies_go_apart(max_tokens, short):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 100}
    shapes = Shapes(SimpleNamespace(rope_parameters=rope), max_tokens, is_fixed=False)
    assert shapes.short_tokens == short
    n_groups = len(shapes.batches([50, 100, 101], 1000))
    assert n_groups == (1 if short is None else 2)


def test_experts_have_rows_of_their_own():
    assert Shapes(SimpleNamespace(num_local_experts=4), None, is_fixed=True).n_rows == 1
    assert Shapes(SimpleNamespace(num_local_experts=1), None, is_fixed=True).n_rows > 1
