"""Names of parts."""

from __future__ import annotations

from dask_pcm.ledger.parts import parse_name, partition_name, range_name


def test_names_sort_in_input_order_and_parse():
    ranges = [(0, 32), (32, 1_000), (1_000, 10**9), (10**9, 10**12)]
    names = [range_name(*pair) for pair in ranges]
    assert sorted(names) == names
    assert [parse_name(name) for name in names] == ranges
    assert parse_name(partition_name(7)) == 7
    assert parse_name("part-1.parquet") is None
