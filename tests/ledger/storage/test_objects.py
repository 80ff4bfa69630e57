"""Outputs in an object store: conditional puts, lock files, late parts."""

from __future__ import annotations

import dataclasses
import io
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from dask_pcm.errors import OutputError
from dask_pcm.ledger.inventory import Counts, take_inventory
from dask_pcm.ledger.layout import LOG
from dask_pcm.ledger.log import note_called, read_lines
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import range_name, write_part
from dask_pcm.ledger.storage import fence, lock_objects
from dask_pcm.ledger.storage.objects import Objects
from dask_pcm.ledger.takeover import other_runs
from tests.support.outputs import NAME, NOTE, OTHER, TABLE, at_work, values


class TestObjects:
    def test_which_way_is_used_is_said(self, bucket, tmp_path):
        assert Output(Objects.at(f"{bucket}/out", None)).commit_method == "conditional put"
        with_locks = Output(Objects.at(f"{bucket}/out", str(tmp_path / "locks")))
        assert with_locks.commit_method == f"lock files in {tmp_path / 'locks'}"

    def test_a_store_without_conditional_put_needs_a_folder_for_locks(self, bucket, monkeypatch):
        monkeypatch.setattr(Objects, "create", lambda self, name, data: True)
        with pytest.raises(OutputError, match=r"only if there is none yet.*lock_folder"):
            Objects.at(f"{bucket}/out", None)
        with pytest.raises(OutputError, match="lock_folder"):
            Objects.at("memory://out", None)

    def test_a_store_that_cannot_be_written(self, tmp_path):
        with pytest.raises(OutputError, match="Cannot write to the output 'local:///proc/out'"):
            Objects.at("local:///proc/out", str(tmp_path))

    def test_a_store_that_cannot_be_reached(self):
        with pytest.raises(OutputError, match=r"Cannot write to the output 's3://no-such-bucket"):
            Objects.at(f"s3://no-such-bucket-{uuid.uuid4().hex}/out", None)

    def test_a_run_that_says_nothing_is_not_at_work(self, bucket, monkeypatch):
        output = Output(Objects.at(f"{bucket}/out", None))
        with at_work(output.as_run("second")):
            assert [writer.is_alive for writer in other_runs(output)] == [True]
            monkeypatch.setattr(fence, "SILENT_S", -1.0)
            assert [writer.is_alive for writer in other_runs(output)] == [False]

    def test_a_lock_whose_holder_died_is_taken_over(self, bucket, tmp_path, monkeypatch):
        output = Output(Objects.at(f"{bucket}/out", str(tmp_path)))
        with at_work(output):
            lock = Path(output.storage.locks, output.storage.lock_files._path_of(NAME))
            lock.write_text("")
            os.utime(lock, (1, 1))
            assert output.commit(NAME, [TABLE], lambda: NOTE)
        assert not list(tmp_path.glob("*/*part*"))

    def test_of_many_who_find_a_dead_holders_lock_one_at_a_time_goes_on(self, bucket, monkeypatch):
        """In any order of looking, creating and removing."""
        monkeypatch.setattr(lock_objects, "SILENT_S", 2.0)
        monkeypatch.setattr(lock_objects, "POLL_S", 0.001)
        output = Output(Objects.at(f"{bucket}/out", None))
        output.storage.create("_pcm/lock-000000007", b"dead")
        inside, seen = [], []

        def take(number):
            for _ in range(3):
                with output.as_run(f"run {number}").storage.fence.takeover_lock():
                    inside.append(number)
                    seen.append(len(inside))
                    time.sleep(0.01)
                    inside.remove(number)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(take, range(4)))
        assert seen == [1] * 12
        assert [name for name in output.storage.entries("_pcm") if "lock" in name] == [
            "lock-000000019"
        ]

    @pytest.mark.parametrize("has_locks", [False, True])
    def test_a_part_that_arrives_from_before_it_was_begun_anew(self, bucket, tmp_path, has_locks):
        """A put of an overwritten job that is still under way, under any name."""
        output = Output(Objects.at(f"{bucket}/out", str(tmp_path) if has_locks else None))
        old, new = (
            dataclasses.replace(output.as_run(name), generation=name) for name in ("old", "new")
        )
        late = [NAME, range_name(2, 3)]
        with at_work(old):
            for name in late:
                assert old.commit(name, [OTHER], lambda: {"rows": 1, "failed": 0, "begun": "old"})
        note = {**NOTE, "begun": "new"}
        with at_work(new):
            assert new.commit(NAME, [TABLE], lambda: note)  # though a part is there
            assert not new.commit(NAME, [TABLE], lambda: note)
            assert values(new) == [1, 2]
            assert take_inventory(new) == {NAME: Counts(2, 0)}
            assert list(new.parts()) == [NAME]
            late_bytes = io.BytesIO()
            write_part(late_bytes, NAME, [OTHER], lambda: {"rows": 1, "failed": 0, "begun": "old"})
            new.storage.fs.pipe_file(
                new.storage.url(NAME), late_bytes.getvalue()
            )  # in the place of ours
            assert take_inventory(new) == {} and not new.parts()

    def test_names_of_objects_are_no_longer_than_stores_allow(self, bucket):
        output = Output(Objects.at(f"{bucket}/{'deep/' * 20}out", None))
        rest = [(2 * n, 2 * n + 1) for n in range(300)]
        with at_work(output):
            note_called(output, rest, "a journal", output.run)
            assert output.commit(NAME, [TABLE], lambda: {**NOTE, "begun": "b" * 500})
            assert take_inventory(dataclasses.replace(output, generation="b" * 500)) == {
                NAME: Counts(2, 0)
            }
            (line,) = (line for line in read_lines(output) if "called" in line)
            assert line["called"] == [list(pair) for pair in rest]
            names = [f"{output.path}/{LOG}/{name}" for name in output.storage.entries(LOG)]
        assert max(len(name.partition("//")[2]) for name in names) <= 1024

    def test_large_parts_are_put_conditionally_too(self, bucket):
        output = Output(Objects.at(f"{bucket}/out", None))
        big = pa.table({"x": [os.urandom(1 << 20) for _ in range(110)]})
        with at_work(output):
            assert output.commit(NAME, [big], lambda: {"rows": 110, "failed": 0})
            assert not output.commit(NAME, [big], lambda: {"rows": 110, "failed": 0})
