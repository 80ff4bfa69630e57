"""Journals of a unit: kept by the next attempt, committed by a later run."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_pcm as pcm
from dask_pcm.ledger.inventory import Extent, take_inventory
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.journal.writer import FileJournal
from dask_pcm.ledger.log import read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import range_name
from dask_pcm.ledger.ranges import Ranges
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.takeover import fence_others
from dask_pcm.ledger.unit_journals import begin_journal, journal_names
from dask_pcm.runs import identity as manifest
from dask_pcm.runs.cutter import Cutter
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.progress.report import rows_recomputed
from dask_pcm.runs.recover import recover
from dask_pcm.runs.units import pace
from dask_pcm.runs.units.run_unit import run_unit
from dask_pcm.runs.units.schema import PartSchema
from dask_pcm.runs.units.unit import UnitSpec

N_ROWS, BATCH = 100, 10


OWN = {"rows": 27, "failed": 0, "begun": "b"}


#: Rows that were given to the function; its code finds this list by its module's name.
DONE: list[int] = []


ENDS_AT: list[int] = []


class Ended(BaseException):
    """The process is no more."""


def compute(frame, context):
    if set(ENDS_AT) & set(frame["id"]):
        raise Ended
    DONE.extend(frame["id"])
    if 55 in frame["id"].values:
        raise ValueError("a broken row")
    return pd.DataFrame({"id": frame["id"], "twice": frame["id"] * 2})


@pytest.fixture(autouse=True)
def each_batch_is_noted(monkeypatch):
    monkeypatch.setattr(pace, "_RECORD_S", 0.0)
    monkeypatch.setattr("dask_pcm.runs.units.compute._PROBE_ROWS", N_ROWS)  # all is read at once
    DONE.clear()
    ENDS_AT.clear()


@pytest.fixture
def work(tmp_path):
    """A unit of a job in a folder, as runs of it see them."""
    source = tmp_path / "in.parquet"
    pd.DataFrame({"id": range(N_ROWS)}).to_parquet(source, index=False)
    ddf = pcm.map_partitions(
        compute,
        pcm.read_parquet(source),
        context=pcm.Context(list),
        meta={"id": "i8", "twice": "i8"},
        batch_rows=BATCH,
    )
    return Work(tmp_path / "out", ddf)


class Work:
    def __init__(self, path, ddf):
        self.path = path
        self.plan = Plan(ddf)
        self.mine = manifest.identify(ddf.expr, True)

    def opened(self, run):
        output = Output(Folder(str(self.path), run), "b")
        with output.storage.fence.takeover_lock():
            fence_others(output)
        return output, output.storage.fence.open_run({})

    def run(self, output, unit=None):
        cutter = Cutter(self.plan, [place(name) for name in take_inventory(output)])
        unit = unit or cutter.cut(N_ROWS)
        layout = PartSchema.of(self.plan.meta, self.plan.reader)
        about = {"begun": "b", "job": "j"}
        job = UnitSpec(output, layout, about, 1 << 20, BATCH)
        graph = self.plan.graph(unit)
        return unit, run_unit(unit, *graph, spec=job, refs=self.plan.refs)


def place(name):
    return tuple(map(int, name.removesuffix(".parquet").split("-")[1:]))


def whole(output):
    parts = [pq.read_table(f"{output.path}/{name}").to_pandas() for name in output.parts()]
    return pd.concat(parts)


def is_right(found):
    assert found.id.tolist() == list(range(N_ROWS))
    failed = found[found.error.notna()]
    assert failed.id.tolist() == [55]
    good = found[found.error.isna()]
    return (good.twice == good.id * 2).all()


def recomputed(output):
    return rows_recomputed(read_lines(output), output.run, lambda name: 0)


def test_the_next_attempt_goes_on_after_what_is_finished(work):
    output, at_work = work.opened("r1")
    with at_work:
        ENDS_AT.append(63)
        with pytest.raises(Ended):
            work.run(output)
        assert len(journal_names(output)) == 1
        ENDS_AT.clear()
        n_before = len(DONE)
        _, result = work.run(output)
        assert sorted(set(DONE[n_before:])) == list(range(60, 100))
        assert (result.n_rows, result.n_failed, result.n_kept) == (N_ROWS, 1, 60)
        assert "a broken row" in result.errors[0]
        assert is_right(whole(output))
        assert not journal_names(output)
        assert recomputed(output) == BATCH  # the one that it was at


def test_a_third_attempt_has_what_the_first_and_the_second_had(work):
    output, at_work = work.opened("r1")
    with at_work:
        for row in (23, 71):
            ENDS_AT[:] = [row]
            with pytest.raises(Ended):
                work.run(output)
            assert len(journal_names(output)) == 1  # the second has taken the first one's over
        ENDS_AT.clear()
        work.run(output)
        twice = [i for i, n in Counter(DONE).items() if n > 1 and i // 10 != 5]
        assert not twice and is_right(whole(output))
        assert recomputed(output) == 2 * BATCH


def test_a_later_run_commits_what_is_finished(work, caplog):
    output, at_work = work.opened("r1")
    with at_work:
        ENDS_AT.append(63)
        with pytest.raises(Ended):
            work.run(output)
    ENDS_AT.clear()
    n_before = len(DONE)
    later, at_work = work.opened("r2")
    with at_work, caplog.at_level(logging.INFO):
        recover(later)
        assert list(take_inventory(later).values()) == [(60, 1)]
        assert not journal_names(later)
        work.run(later)
        assert DONE[n_before:] == list(range(60, 100))
        assert is_right(whole(later))
        assert recomputed(later) == BATCH
        (first, _) = later.parts()
        assert later.read_note(first)["run"] == "r1" and later.read_note(first)["job"] == "j"


def test_what_was_committed_after_all_is_not_committed_again(work):
    """Killed between its commit and the removal of its journal."""
    output, at_work = work.opened("r1")
    with at_work:
        ENDS_AT.append(63)
        with pytest.raises(Ended):
            work.run(output)
        (name,) = journal_names(output)
        left = output.storage.read(name)
        ENDS_AT.clear()
        work.run(output)
        Path(output.path, name).write_bytes(left)
    later, at_work = work.opened("r2")
    with at_work:
        recover(later)
        assert len(later.parts()) == 1 and not journal_names(later)


def left_by_zombie(output, start, stop, **about):
    """A journal of a fenced run, of units as it had cut them."""
    rows = range(start, stop)
    table = pa.table({"id": rows, "twice": [2 * i for i in rows], "error": pa.nulls(len(rows))})
    name = f"_pcm/journal/part-{start:012d}-{stop:012d}.parquet.zombie.1"
    descriptor = os.open(Path(output.path, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    told = {"run": "zombie", "begun": "b", "unit": name.split("/")[-1].split(".zombie")[0]}
    journal = FileJournal(descriptor, "j", {**told, **about})
    for first in range(start, stop, BATCH):
        journal.append(Record(first, first + BATCH, table.slice(first - start, BATCH)))
    journal.close()


def test_what_overlaps_is_never_committed(work):
    """A fenced run leaves journals of rows that have been computed since."""
    output, at_work = work.opened("r1")
    with at_work:
        output.commit(range_name(35, 62), [pa.table({"id": range(35, 62)})], lambda: OWN)
        left_by_zombie(output, 0, 50)
        left_by_zombie(output, 20, 100)
        recover(output)
        ranges = sorted(place(name) for name in output.parts())
        assert ranges == [(0, 30), (35, 62), (70, 100)]
        assert not journal_names(output)
        take_inventory(output)


@pytest.mark.parametrize(
    "about", [{"begun": "other"}, {"run": 5}, {"unit": 7}, {"unit": range_name(0, 10)}]
)
def test_a_journal_that_is_not_ours_is_removed(work, about):
    output, at_work = work.opened("r1")
    with at_work:
        left_by_zombie(output, 0, 50, **about)
        recover(output)
        assert not output.parts() and not journal_names(output)


def test_rows_of_a_journal_that_the_job_does_not_have(work, caplog):
    """Another input, or other columns: else a part would be there that is never accepted."""
    output, at_work = work.opened("r1")
    layout = PartSchema.of(work.plan.meta, work.plan.reader)
    with at_work:
        left_by_zombie(output, 40, 60)
        recover(output, Extent(Ranges([(0, 50)]), 1, keeps_rows=True), None)
        assert list(output.parts()) == [range_name(40, 50)]
        left_by_zombie(output, 0, 20)  # its errors have no type
        recover(output, work.plan.extent(), layout)
        assert list(output.parts()) == [range_name(40, 50)]
    assert "Rows 50 to 60 of a journal do not belong to this job" in caplog.text


def test_a_journal_of_another_job_in_the_same_place_is_removed(work):
    output, at_work = work.opened("r1")
    with at_work:
        ENDS_AT.append(63)
        with pytest.raises(Ended):
            work.run(output)
    other = Output(Folder(output.path, "r2"), "anew")
    with other.storage.fence.takeover_lock():
        fence_others(other)
    with other.storage.fence.open_run({}):
        recover(other)
        assert not other.parts() and not journal_names(other)


def test_a_fenced_run_harms_nothing(work):
    """Its worker lives on, and appends to a journal that is not read again."""
    output, at_work = work.opened("r1")
    with at_work:
        journal = begin_journal(output, "part-000000000000-000000000100.parquet", {})
        later, at_work_later = work.opened("r2")
        with at_work_later:
            recover(later)
            journal.append(Record(0, 1, pa.table({"id": [0]})))
            with pytest.raises(pcm.PCMError, match="replaced by a newer one"):
                begin_journal(output, "part-000000000000-000000000100.parquet", {})
            assert not journal_names(later)
    journal.close()
