"""Rows that cost processes: isolated by bisection over journals, without losing a process."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dask_pcm as pcm
from dask_pcm.errors import LostProcessError
from dask_pcm.ledger.inventory import take_inventory
from dask_pcm.ledger.log import read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.objects import Objects
from dask_pcm.ledger.suspects import N_TRIES, Cost, Suspects
from dask_pcm.ledger.takeover import fence_others
from dask_pcm.ledger.unit_journals import journal_names, read_journals
from dask_pcm.runs import identity as manifest
from dask_pcm.runs.cutter import Cutter
from dask_pcm.runs.plan import Plan
from dask_pcm.runs.progress.report import rows_recomputed
from dask_pcm.runs.recover import forget, recover
from dask_pcm.runs.units import attempt as attempts
from dask_pcm.runs.units import history, pace
from dask_pcm.runs.units.run_unit import run_unit
from dask_pcm.runs.units.schema import PartSchema
from dask_pcm.runs.units.unit import UnitSpec

N_ROWS, BATCH = 96, 8
#: What a row to blame costs: its batch twice, then 4 and 2 rows of it, and the row alone twice.
N_PROCESSES = 6
#: Rows that end their process, and rows that raise; calls of the function.
FATAL: set[int] = set()
BROKEN: set[int] = set()
CALLS: list[list[int]] = []


class Ended(BaseException):
    """The process is no more."""


def judge(frame, context):
    CALLS.append(frame["id"].tolist())
    if FATAL & set(frame["id"]):
        raise Ended
    if BROKEN & set(frame["id"]):
        raise ValueError("a broken row")
    return pd.DataFrame({"id": frame["id"], "twice": frame["id"] * 2})


class Losses:
    """Replaces the gate: how many processes a unit has lost since it was last asked."""

    def __init__(self):
        self.n, self.n_asked, self.is_forgiving, self.were_there = 0, 0, False, False

    def count(self):
        self.were_there = True
        self.n += not self.is_forgiving

    def was_lost(self):
        return self.were_there

    def n_losses(self):
        self.n_asked += 1
        n, self.n = self.n, 0
        return n


@pytest.fixture
def losses(monkeypatch):
    losses = Losses()
    monkeypatch.setattr(history, "n_losses", losses.n_losses)
    monkeypatch.setattr(history, "was_lost", losses.was_lost)
    return losses


@pytest.fixture(autouse=True)
def each_batch_is_noted(monkeypatch):
    monkeypatch.setattr(pace, "_RECORD_S", 0.0)
    monkeypatch.setattr("dask_pcm.runs.units.compute._PROBE_ROWS", N_ROWS)  # all is read at once
    for found in (FATAL, BROKEN, CALLS):
        found.clear()


@pytest.fixture(params=["folder", "objects"])
def work(request, tmp_path, losses):
    """One unit of a job, as runs of it see it."""
    source = tmp_path / "in.parquet"
    pd.DataFrame({"id": range(N_ROWS), "claim": "a claim"}).to_parquet(source, index=False)
    with ExitStack() as stack:
        yield Work(request.param, tmp_path, pcm.read_parquet(source), losses, stack)


class Work:
    def __init__(self, kind, place, frame, losses, stack):
        self.is_folder, self.place, self.losses = kind == "folder", place, losses
        self._stack = stack
        self.frame, self.use = frame, lambda verdicts: verdicts

    def opened(self, run="r1"):
        """The output as a run sees it that is at work from now on."""
        if self.is_folder:
            output = Output(Folder(str(self.place / "out"), run), "b")
        else:  # files by URL: an object store without a server
            made = Objects.at(f"local://{self.place}/out", str(self.place / "locks"))
            output = Output(made, "b").as_run(run)
        with output.storage.fence.takeover_lock():
            fence_others(output)
        self._stack.enter_context(output.storage.fence.open_run({}))
        return output

    def attempt(self, output, costs=()):
        """An attempt at the unit that is next."""
        meta = {"id": "i8", "twice": "i8"}
        verdicts = pcm.map_partitions(
            judge, self.frame, context=pcm.Context(list), meta=meta, batch_rows=BATCH
        )
        ddf = self.use(verdicts)
        plan = Plan(ddf)
        manifest.identify(ddf.expr, True)
        done = [tuple(map(int, n.removesuffix(".parquet").split("-")[1:])) for n in output.parts()]
        unit = Cutter(plan, done).cut(N_ROWS)
        layout = PartSchema.of(plan.meta, plan.reader)
        job = UnitSpec(output, layout, {"begun": "b", "job": "j"}, 1 << 20, BATCH, costs)
        return run_unit(unit, *plan.graph(unit), spec=job, refs=plan.refs)

    def finish(self, output, costs=()):
        """Attempts until one succeeds; return its result, and how many ended their process."""
        for n_ended in range(100):
            try:
                return self.attempt(output, costs=costs), n_ended
            except Ended:
                self.losses.count()
        raise AssertionError("it goes on for ever")


def whole(output):
    tables = [output.read_table(name).to_pandas() for name in output.parts()]
    return pd.concat(tables, ignore_index=True)


def check(output, fatal):
    """Every row once, and those to blame with an error."""
    found = whole(output)
    assert found.id.tolist() == list(range(N_ROWS))
    failed = found[found.error.notna()]
    assert failed.id.tolist() == sorted(fatal)
    assert failed.twice.isna().all()
    good = found[found.error.isna()]
    assert (good.twice == good.id * 2).all()
    assert not journal_names(output)
    n_again = sum(map(len, CALLS)) - N_ROWS
    n_told = rows_recomputed(read_lines(output), output.run, lambda name: 0)
    # In an object store, a unit without a journal does not tell which of its rows were called.
    assert n_told == n_again if output.storage.has_journals else n_told >= n_again


# -- the halving alone ------------------------------------------------------------------------


def find(fatal, suspects, n_rows, batch_rows):
    """Compute rows as attempts do; return how many processes that costs."""
    n_lost = at = 0
    while at < n_rows:
        end = min(suspects.end(at, batch_rows, batch_rows), n_rows)
        assert end > at and (end == at + 1 or not suspects.gives_up(at))
        if fatal & set(range(at, end)) and not suspects.gives_up(at):
            suspects.blame((at, end))  # what is finished stays so: it goes on from here
            n_lost += 1
            assert n_lost <= 10 * n_rows
        else:
            at = end
    return n_lost


@given(st.sets(st.integers(0, 99), max_size=6), st.integers(1, 40))
def test_what_is_given_up_is_to_blame_and_nothing_else(fatal, batch_rows):
    suspects = Suspects()
    n_lost = find(fatal, suspects, 100, batch_rows)
    assert suspects.given_up() == sorted(fatal)
    depth = max(0, (batch_rows - 1).bit_length())
    assert n_lost <= len(fatal) * (N_TRIES + depth + (depth > 0))


RANGES = st.tuples(st.integers(0, 99), st.integers(1, 40), st.integers(1, 5))


@given(st.sets(st.integers(0, 99), max_size=4), st.lists(RANGES, max_size=8), st.integers(1, 40))
def test_so_it_is_after_runs_that_cut_otherwise(fatal, before, batch_rows):
    """Costs of any ranges; but a row alone has cost nothing yet."""
    costs = [Cost(at, at + n, n_lost) for at, n, n_lost in before if n > 1]
    suspects = Suspects(costs)
    find(fatal, suspects, 100, batch_rows)
    assert suspects.given_up() == sorted(fatal)


def test_a_first_loss_changes_only_that_a_batch_stays_by_itself():
    suspects = Suspects([Cost(32, 64, 1)])
    assert [suspects.end(at, 1000, 32) for at in (0, 32, 64)] == [32, 64, 1064]
    assert suspects.end(16, 10, 32) == 26


def test_a_unit_that_left_no_journal_is_tried_in_batches():
    suspects = Suspects([Cost(0, 100, 1)])
    assert suspects.end(0, 1000, 32) == 32
    suspects.blame((32, 64))  # a second loss: it is known to be in there
    assert [suspects.end(at, 1000, 32) for at in (0, 32, 48, 64)] == [32, 48, 64, 96]


def test_of_what_several_tell_of_the_same_rows_the_most_counts():
    assert list(Suspects([Cost(0, 8, 2), Cost(0, 8, 1)])) == [(0, 8, 2, 0)]


def test_that_a_row_took_too_long_is_known_where_it_did_so_alone():
    suspects = Suspects([Cost(0, 8, 2, 2)])
    assert not suspects.is_late(3)
    suspects.blame((3, 4))
    assert not suspects.is_late(3)
    suspects.blame((3, 4), is_late=True)
    assert suspects.is_late(3) and suspects.gives_up(3)
    assert list(Suspects(list(suspects))) == [(0, 8, 2, 2), (3, 4, 2, 1)]


# -- over journals ----------------------------------------------------------------------------


def test_a_row_that_ends_its_process_fails_and_no_other_does(work):
    FATAL.add(45)
    output = work.opened()
    result, n_lost = work.finish(output)
    # Where it leaves no journal at first, the whole unit has been in hand: one loss tells less.
    assert n_lost == N_PROCESSES
    assert (result.n_rows, result.n_failed) == (N_ROWS, 1)
    assert "Row 45 of the input: the worker process ended 2 times" in result.errors[0]
    check(output, {45})


def test_what_is_finished_is_never_computed_again(work):
    FATAL.update({3, 45, 46})
    output = work.opened()
    work.finish(output)
    finished = Counter(row for rows in CALLS if not FATAL & set(rows) for row in rows)
    first = 0 if work.is_folder else 1  # without a journal, the first loss costs all
    assert set(finished.values()) <= {1, 1 + first}
    check(output, FATAL)


def test_a_loss_that_is_forgiven_does_not_count(work):
    FATAL.add(45)
    work.losses.is_forgiving = True
    output = work.opened()
    for _ in range(5):
        with pytest.raises(Ended):
            work.attempt(output)
        work.losses.count()
    fatal = [rows for rows in CALLS if 45 in rows]
    assert fatal == [list(range(40, 48))] * 5  # as large as ever
    assert work.losses.n_asked >= 4
    FATAL.clear()
    _, n_lost = work.finish(output)
    assert n_lost == 0
    check(output, {})


def test_a_unit_of_less_than_a_batch_is_halved_too(work):
    source = work.place / "small.parquet"
    pd.DataFrame({"id": range(5), "claim": "a claim"}).to_parquet(source, index=False)
    work.frame = pcm.read_parquet(source)
    FATAL.add(2)
    output = work.opened()
    result, n_lost = work.finish(output)
    assert (result.n_rows, result.n_failed) == (5, 1)
    assert n_lost == 5
    fatal = [rows for rows in CALLS if 2 in rows]
    assert fatal == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2], [2], [2]]
    assert not journal_names(output)


def test_a_process_that_ends_while_rows_are_read_is_not_asked_about(work, monkeypatch):
    output = work.opened()
    FATAL.add(20)
    for _ in range(2):  # a loss, and one that is told of
        with pytest.raises(Ended):
            work.attempt(output)
        work.losses.count()
    n_asked = work.losses.n_asked

    def unreadable(*args):
        raise Ended

    with monkeypatch.context() as patched:
        patched.setattr(attempts.Computation, "batches", unreadable)
        for n_more in (1, 1, 1):  # the last batch is told of once; then the gate counts on
            with pytest.raises(Ended):
                work.attempt(output)
            work.losses.count()
            assert work.losses.n_asked == n_asked + n_more
    assert work.losses.n == 3


def test_an_end_is_counted_once_however_often_what_it_left_is_found(work):
    """Killed after it has settled a journal, and before it has removed it."""
    output = work.opened()
    FATAL.add(20)
    for _ in range(2):
        with pytest.raises(Ended):
            work.attempt(output)
        work.losses.count()
    with pytest.MonkeyPatch.context() as patched:

        def killed(self, name):
            raise Ended

        patched.setattr(type(output.storage), "remove", killed)
        with pytest.raises(Ended):
            work.attempt(output)
        work.losses.count()
    assert len(journal_names(output)) == 2
    n_asked, CALLS[:] = work.losses.n_asked, []
    with pytest.raises(Ended):
        work.attempt(output)
    assert work.losses.n_asked == n_asked  # nothing was in hand at the last end
    assert len(CALLS[-1]) == 4  # two losses of its batch are counted, and not three


def test_what_rows_have_cost_is_carried_from_run_to_run(work):
    output = work.opened("r1")
    FATAL.add(20)
    for _ in range(4):
        with pytest.raises(Ended):
            work.attempt(output)
        work.losses.count()
    later = work.opened("r2")
    costs = recover(later)
    counted = {(16, 24, 2 if work.is_folder else 1, 0), (20, 24, 1, 0)}
    assert counted <= set(costs) and work.losses.n == 1  # the last end is nobody's
    assert recover(work.opened("r3")) == costs  # where the second came to nothing
    last = work.opened("r4")
    assert recover(last) == costs
    work.losses.__init__()
    CALLS.clear()
    while sum(n_rows for n_rows, _ in take_inventory(last).values()) < N_ROWS:
        work.finish(last, costs)
    assert [len(rows) for rows in CALLS if 20 in rows] == [2, 1, 1]
    assert len(journal_names(last)) == 1
    forget(last)
    found = whole(last)
    assert found.id.tolist() == list(range(N_ROWS))
    assert found[found.error.notna()].id.tolist() == [20]
    assert not journal_names(last)


def test_a_failed_row_looks_as_any_other_that_fails(work):
    """But for its reason; rows that a filter takes out are gone, and counted by nobody."""
    work.use = lambda verdicts: verdicts[verdicts.id % 7 != 0]  # 21 goes
    FATAL.update({20, 21})
    output = work.opened()
    result, _ = work.finish(output)
    found = whole(output)
    for name in list(output.parts()):
        output.storage.remove(name)
    FATAL.clear()
    BROKEN.update({20, 21})
    other, _ = work.finish(output)
    raised = whole(output)
    assert (result.n_rows, result.n_failed) == (other.n_rows, other.n_failed)
    told = [text.partition(":")[0] for text in found.error.dropna()]
    assert told == ["LostProcessError"] and raised.error.dropna().tolist() == [
        "ValueError: a broken row"
    ]
    assert found.index[found.error.notna()].equals(raised.index[raised.error.notna()])
    pd.testing.assert_frame_equal(found.drop(columns="error"), raised.drop(columns="error"))
    assert found.dtypes.equals(raised.dtypes)


def test_it_is_counted_where_the_reasons_do_not_come_through(work):
    work.use = lambda verdicts: verdicts[["id", "twice"]]
    FATAL.add(20)
    output = work.opened()
    result, _ = work.finish(output)
    assert (result.n_rows, result.n_failed) == (N_ROWS, 1)
    assert "Row 20 of the input" in result.errors[0]
    found = whole(output)
    assert list(found.columns) == ["id", "twice"]
    assert found[found.twice.isna()].id.tolist() == [20]


def test_what_was_noted_together_is_tried_in_batches(work, monkeypatch):
    """However fast they are: what is begun together is lost, and blamed, together."""
    monkeypatch.setattr(pace, "_RECORD_S", 1e9)
    output = work.opened()
    FATAL.update({45, 90})
    begun = []
    while len(begun) < 20:
        try:
            result = work.attempt(output)
            break
        except Ended:
            work.losses.count()
        begun.append([tuple(rows) for _, found in read_journals(output) for rows in found.begun])
    assert result.n_failed == 2
    if work.is_folder:  # twice as many each time, and then those to blame apart
        assert begun[0] == [(0, 8), (8, 24), (24, 56)]
        assert begun[1] == [(24, 32), (32, 40), (40, 48)]
        assert begun[2] == [(40, 44), (44, 48)]
    else:
        assert begun[0] == []
        assert begun[1] == [(at, at + 8) for at in range(0, 48, 8)]
    assert any((56, 64) in ranges for ranges in begun)  # as if nothing had been noted yet
    assert whole(output).error.notna().sum() == 2


def test_a_row_that_ends_its_process_though_no_function_sees_it_is_the_gates_to_end(work):
    """What else is done with it does that, and would for ever."""

    def more(number):
        if number in FATAL:
            raise Ended
        return number

    work.use = lambda verdicts: verdicts.assign(more=verdicts.id.map(more, meta=("more", "i8")))
    FATAL.add(20)
    output = work.opened()
    n_lost = 0
    while work.losses.n < 3:
        with pytest.raises(Ended):
            work.attempt(output)
        work.losses.count()
        n_lost += 1
        assert n_lost < 20
    assert n_lost == N_PROCESSES + 3  # after those that are asked about


def test_where_nothing_was_ever_answered_a_few_rows_are_enough(work):
    FATAL.update(range(N_ROWS))
    with pytest.raises(LostProcessError, match=r"5 rows of part-.* in succession, up to row 4 of"):
        work.finish(work.opened())


def test_where_every_row_ends_its_process_the_unit_does(work, monkeypatch):
    monkeypatch.setattr(attempts, "_HOPELESS_ROWS", 5)
    FATAL.update(range(10, 60))
    output = work.opened()
    with pytest.raises(LostProcessError, match=r"5 rows of part-.* in succession, up to row 14"):
        work.finish(output)
    again = work.opened("r2")  # the cause is mended: what has been blamed stays so
    work.losses.__init__()
    FATAL.clear()
    costs = recover(again)
    while sum(n_rows for n_rows, _ in take_inventory(again).values()) < N_ROWS:
        work.finish(again, costs)
    found = whole(again)
    assert found.id.tolist() == list(range(N_ROWS))
    assert found[found.error.notna()].id.tolist() == list(range(10, 15))
    assert journal_names(again)
    last = work.opened("r3")
    assert recover(last) == () and not journal_names(last)  # all that it tells of is committed
