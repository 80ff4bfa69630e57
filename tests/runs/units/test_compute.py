"""Units in chunks that fit in memory."""

from __future__ import annotations

import pytest

from dask_pcm.parquet import cursors as reading
from dask_pcm.parquet.reader import Span
from dask_pcm.runs.units.compute import _PROBE_ROWS
from dask_pcm.runs.units.compute import chunks as chunks_of
from dask_pcm.runs.units.graph import Unit

ROW_BYTES = 10


@pytest.fixture(autouse=True)
def nothing_known():
    reading._inflation.clear()
    yield
    reading._inflation.clear()


def unit(*sizes):
    spans, offset = [], 0
    for number, n in enumerate(sizes):
        spans.append(Span(number, f"f{number}", "", 0, n, offset, n * ROW_BYTES))
        offset += n
    return Unit("part", 0, tuple(spans), offset)


def chunks(unit, max_bytes, real=1.0):
    """Sizes of the chunks, each of which is read before the next is cut."""
    sizes, seen = [], []
    for chunk in chunks_of(unit, max_bytes):
        sizes.append(chunk.n_rows)
        for span in chunk.spans:
            reading.note_inflation(span.path, span.n_bytes * real, span.n_bytes)
            seen += range(span.offset, span.offset + span.n_rows)
    assert seen == list(range(unit.n_rows))
    return sizes


@pytest.fixture
def known():
    reading.note_inflation("another", 10, 10)


def test_what_fits_is_one_chunk(known):
    assert chunks(unit(500), 10**6) == [500]
    assert chunks(unit(*[3] * 50), 10**6) == [150]  # many small files


def test_a_unit_that_is_not_to_be_split_stays_whole():
    assert chunks(unit(5_000), 0) == [5_000]


def test_more_than_fits_is_several(known):
    assert chunks(unit(1_000), 2_500) == [250] * 4
    assert chunks(unit(100, 100, 100), 1_500) == [150, 150]


def test_what_rows_really_take_is_learned_from_the_first():
    """A text that is stored once for all rows, and takes its room in each."""
    sizes = chunks(unit(20_000), 10**6, real=100.0)
    assert sizes[0] == _PROBE_ROWS
    assert max(sizes[1:]) == 1_000  # of 1,000 bytes each


def test_a_row_larger_than_all_comes_alone():
    assert chunks(unit(3), 5) == [1, 1, 1]
