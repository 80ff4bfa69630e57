"""What a report counts."""

from __future__ import annotations

from dask_pcm.ledger.parts import partition_name, range_name
from dask_pcm.runs.progress.report import rows_recomputed
from tests.support.outputs import NAME


def test_rows_recomputed_compares_ranges_and_not_names():
    def starts(*rows):
        return [{"run": run, "start": range_name(a, b), "rows": b - a} for run, a, b in rows]

    def again(*rows):
        return rows_recomputed(starts(*rows), "now", lambda name: 7)

    assert again(("now", 0, 10), ("now", 10, 20)) == 0
    assert again(("now", 0, 10), ("now", 0, 10)) == 10
    assert again(("before", 0, 15), ("now", 10, 20)) == 5
    assert again(("before", 0, 9), ("before", 0, 9), ("now", 9, 20)) == 0
    whole = [{"run": run, "start": partition_name(3), "rows": None} for run in ("before", "now")]
    assert rows_recomputed(whole, "now", lambda name: 7) == 7
    assert rows_recomputed(whole[1:], "now", lambda name: 7) == 0
    assert rows_recomputed(whole[1:] * 2, "now", lambda name: 7) == 7
    assert rows_recomputed([{"run": "now", "commit": NAME}], "now", lambda name: 7) == 0
