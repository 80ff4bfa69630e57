from __future__ import annotations

from dataclasses import replace

import dask.dataframe as dd
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_pcm as pcm
from dask_pcm.parquet.reader import Span
from dask_pcm.plugins.worker.stats import TaskStats
from dask_pcm.runs.cutter import Cutter
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.units.compute import Computation


def load():
    return 10


def score(frame, model):
    return pd.DataFrame({"id": frame["id"], "score": frame["id"] * model})


META = {"id": "i8", "score": "i8"}
CONTEXT = pcm.Context(load)


def mapped(frame, **options):
    return pcm.map_partitions(score, frame, context=CONTEXT, meta=META, **options)


def compute(plan, unit):
    pickled, keys, inputs = plan.graph(unit)
    assert not keys and not inputs
    (frame,) = Computation(pickled, TaskStats()).whole(unit).frames
    return frame


def cut_all(plan, n_rows, done=(), partitions=()):
    cutter = Cutter(plan, list(done), frozenset(partitions))
    units = []
    while not cutter.is_empty:
        units.append(cutter.cut(n_rows))
    return units


def test_units_of_any_size_give_the_same_rows(claims):
    frame = pcm.read_parquet(claims())
    out = mapped(frame[frame.id % 3 == 0].assign(x=1), batch_rows=8)[["score"]]
    plan = Plan(out)
    assert plan.is_splittable and plan.batch_rows == 8
    whole = out.compute(scheduler="sync")
    for n_rows in (8, 20, 1000):
        parts = [compute(plan, unit) for unit in cut_all(plan, n_rows)]
        assert pd.concat(parts).score.tolist() == whole.score.tolist()


def test_functions_of_partitions_are_never_given_less(claims):
    frame = pcm.read_parquet(claims())
    plan = Plan(mapped(frame))
    assert not plan.is_splittable
    assert [unit.n_rows for unit in cut_all(plan, 7)] == [50] * 4
    before = frame.map_partitions(lambda part: part.head(3), meta=frame._meta)
    assert not Plan(mapped(before, batch_rows=8)).is_splittable


def test_partitions_that_were_picked_keep_their_rows(claims):
    plan = Plan(mapped(pcm.read_parquet(claims()).partitions[2:], batch_rows=8))
    units = cut_all(plan, 100)
    assert [unit.name for unit in units] == [
        "part-000000000100-000000000196.parquet",
        "part-000000000196-000000000200.parquet",
    ]


def test_frames_of_other_origin_go_by_partition(claims):
    frame = dd.read_parquet(claims())
    plan = Plan(mapped(frame[["id"]], batch_rows=8))
    assert plan.spans is None
    units = cut_all(plan, 10, partitions={1})
    assert [unit.partition for unit in units] == [0, 2, 3]
    assert compute(plan, units[1]).id.tolist() == list(range(100, 150))


def test_the_optimiser_does_not_regroup_partitions(tmp_path):
    for i in range(60):
        wide = pd.DataFrame({"id": [i], "text": [str(i) * 10_000]})
        wide.to_parquet(tmp_path / f"{i}.parquet", compression=None)
    frame = dd.read_parquet(tmp_path, filesystem="arrow")[["id"]].assign(x=1)
    assert frame.optimize().npartitions < 60
    assert Plan(mapped(frame)).n_partitions == 60


class FakePlan:
    is_splittable = True

    def __init__(self, sizes, batch_rows):
        self.batch_rows = batch_rows
        self.spans, offset = [], 0
        for piece, n_rows in enumerate(sizes):
            self.spans.append(Span(piece, f"f{piece}", "", 0, n_rows, offset))
            offset += n_rows
        self.n_rows = offset
        self.n_partitions = len(sizes)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=12),
    batch_rows=st.integers(1, 40),
    wants=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    data=st.data(),
)
def test_cutting_covers_exactly_what_is_missing(sizes, batch_rows, wants, data):
    plan = FakePlan(sizes, batch_rows)
    edges = sorted(data.draw(st.sets(st.integers(0, plan.n_rows), max_size=8)))
    done = list(zip(edges[::2], edges[1::2], strict=False))
    cutter, covered, n = Cutter(plan, done, set()), [], 0
    while not cutter.is_empty:
        unit = cutter.cut(wants[n % len(wants)])
        n += 1
        rows = [r for span in unit.spans for r in range(span.offset, span.offset + span.n_rows)]
        assert rows == list(range(rows[0], rows[0] + unit.n_rows))
        assert unit.name.startswith(f"part-{rows[0]:012d}-{rows[-1] + 1:012d}")
        for span in unit.spans:
            inside = plan.spans[span.piece]
            assert span.offset - inside.offset == span.start and span.stop <= inside.n_rows
        covered += rows
    missing = set(range(plan.n_rows)) - {r for a, b in done for r in range(a, b)}
    assert sorted(covered) == sorted(missing)


def test_small_pieces_are_put_together_up_to_a_batch():
    units = cut_all(FakePlan([10] * 10, 32), 32)
    assert [unit.n_rows for unit in units] == [32, 32, 36]


def test_very_small_pieces_are_put_together_up_to_a_unit_and_its_bytes():
    sizes = [unit.n_rows for unit in cut_all(FakePlan([10] * 30, 32), 100)]
    assert sizes == [96, 96, 108]
    assert [unit.n_rows for unit in cut_all(FakePlan([20] * 10, 4), 100)] == [100, 100]
    wide = FakePlan([10] * 30, 4)
    wide.spans = [replace(span, n_bytes=1_000) for span in wide.spans]
    cutter = Cutter(wide, max_bytes=3_500)
    sizes = []
    while not cutter.is_empty:
        sizes.append(cutter.cut(100).n_rows)
    assert sizes == [30] * 10


def test_no_crumb_is_left_at_the_end():
    units = cut_all(FakePlan([200, 190], 32), 192)
    assert [unit.n_rows for unit in units] == [192, 198]
    units = cut_all(FakePlan([200, 200], 32), 192)
    assert [unit.n_rows for unit in units] == [192, 192, 16]


@pytest.mark.parametrize("n_rows", [32, 64, 100])
def test_units_are_whole_batches(n_rows):
    sizes = [unit.n_rows for unit in cut_all(FakePlan([320], 32), n_rows)]
    assert all(size % 32 == 0 for size in sizes)
