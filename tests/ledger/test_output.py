"""Parts and JSON files of an output, in a folder and in an object store."""

from __future__ import annotations

import json
import multiprocessing
import os

import pyarrow as pa
import pytest

from dask_pcm.errors import OutputError
from dask_pcm.ledger.inventory import Counts, take_inventory
from dask_pcm.ledger.layout import MANIFEST
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.storage.folder import Folder
from tests.support.outputs import NAME, NOTE, OTHER, TABLE, at_work, values
from tests.support.patience import patient


class TestParts:
    def test_a_part_is_written_once(self, output):
        assert output.commit(NAME, [TABLE], lambda: NOTE)
        assert not output.commit(NAME, [OTHER], lambda: {"rows": 1, "failed": 0})
        assert values(output) == [1, 2]
        assert output.read_note(NAME).items() >= {**NOTE, "unit": NAME}.items()
        assert list(output.parts()) == [NAME]

    def test_a_part_is_replaced_as_a_whole(self, output):
        output.commit(NAME, [TABLE], lambda: NOTE)
        assert output.commit(NAME, [OTHER], lambda: {"rows": 1, "failed": 1}, replaces=True)
        assert values(output) == [9]
        assert take_inventory(output) == {NAME: Counts(1, 1)}

    def test_of_many_writers_one_is_first(self, output):
        spawn = multiprocessing.get_context("spawn")
        ready, results = spawn.Event(), spawn.Queue()
        writers = [
            spawn.Process(target=_commit, args=(output, i, ready, results)) for i in range(4)
        ]
        for writer in writers:
            writer.start()
        for _ in writers:
            assert results.get(timeout=patient(60)) == "here"
        ready.set()
        won = [results.get(timeout=patient(30)) for _ in writers]
        for writer in writers:
            writer.join(30)
        assert [kept for _, kept in won].count(True) == 1
        assert values(output) == [i for i, kept in won if kept]

    def test_several_tables_are_row_groups_of_one_part(self, output):
        output.commit(NAME, iter([TABLE, TABLE]), lambda: {"rows": 4, "failed": 0})
        assert values(output) == [1, 2, 1, 2]

    def test_foreign_files_are_listed(self, output):
        output.storage.write("thesis.txt", b"years of work")
        if isinstance(output.storage, Folder):  # what mkfs makes
            os.mkdir(os.path.join(output.path, "lost+found"))
        assert output.foreign_files() == ["thesis.txt"]


def _commit(output, value, ready, results):
    results.put("here")
    ready.wait()
    table = pa.table({"x": [value]})
    results.put((value, output.commit(NAME, [table], lambda: {"rows": 1, "failed": 0})))


def test_json_that_is_torn_is_named(tmp_path):
    with at_work(Output(Folder(str(tmp_path), "run"))) as output:
        output.storage.write(MANIFEST, json.dumps({"a": 1}).encode()[:4])
        with pytest.raises(OutputError, match=r"'_pcm/manifest\.json' in .* is damaged"):
            output.read_json(MANIFEST)
