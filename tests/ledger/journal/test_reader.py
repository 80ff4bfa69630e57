"""Reading a journal: what is whole before a torn or damaged end is kept."""

from __future__ import annotations

import os

import pyarrow as pa
import pytest

from dask_pcm.ledger.journal.reader import apart, read_journal
from dask_pcm.ledger.journal.record import Record, frame
from dask_pcm.ledger.journal.writer import FileJournal


def records():
    tables = [pa.table({"id": range(n * 10, n * 10 + 10)}) for n in range(3)]
    return [Record(n * 10, n * 10 + 10, table, n, [f"e{n}"]) for n, table in enumerate(tables)]


def test_torn_anywhere_what_is_whole_before_is_there(tmp_path):
    path, ends = tmp_path / "journal", []
    journal = FileJournal(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "j", {"run": "r"})
    for record in records():
        journal.append(record)
        ends.append(path.stat().st_size)
    journal.close()
    data = path.read_bytes()
    for n_bytes in range(0, len(data), 7):
        found = read_journal(data[:n_bytes])
        n_whole = sum(end <= n_bytes for end in ends)
        assert n_whole == 0 if found is None else len(found.records) == n_whole
    damaged = bytearray(data)
    damaged[ends[0] + 100] ^= 1
    assert len(read_journal(bytes(damaged)).records) == 1
    found = read_journal(data)
    assert [(r.start, r.stop, r.n_failed, r.errors) for r in found.records] == [
        (0, 10, 0, ["e0"]),
        (10, 20, 1, ["e1"]),
        (20, 30, 2, ["e2"]),
    ]
    assert all(r.table.equals(own.table) for r, own in zip(found.records, records(), strict=True))


@pytest.mark.parametrize(
    "head",
    [
        b"5",
        b"{",
        b"\xff",
        b"[" * 99_999,
        b'{"rows": [9, 0]}',
        b'{"rows": 5}',
        b'{"begin": [0]}',
        b'{"wait": 3}',
        b'{"call": [[0, 1]]}',
        b'{"costs": [[0, 1]], "settled": []}',
        b'{"costs": [], "settled": [5]}',
        b'{"rows": [0, 10], "failed": "1", "errors": [], "facts": {}}',
        b'{"rows": [0, 10], "failed": 1, "errors": 5, "facts": {}}',
        b'{"rows": [0, 10], "failed": 0, "errors": [], "facts": {}}',  # and no table
        b"{}",
    ],
)
def test_a_record_of_other_content_counts_as_not_written(tmp_path, head):
    path = tmp_path / "journal"
    journal = FileJournal(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "j", {"run": "r"})
    journal.append(records()[0])
    journal._write(frame(head, b"junk"))
    journal.append(records()[1])
    journal.close()
    found = read_journal(path.read_bytes())
    assert [(r.start, r.stop) for r in found.records] == [(0, 10)]
    assert (found.begun, found.costs, found.settled) == ([], [], [])


def test_of_records_with_rows_in_common_one_counts():
    one, two, three = records()
    other = Record(5, 15, one.table)
    assert apart([three, other, two, one]) == [one, two, three]


def test_the_last_words_of_a_process_whose_call_took_too_long(tmp_path):
    path = tmp_path / "journal"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    journal = FileJournal(descriptor, "j", {"run": "r"})
    journal.append(Record(0, 10, pa.table({"x": ["Timeout (0:00:01)!"]})))
    journal.begin(10, 20)
    assert read_journal(path.read_bytes()).last_words == ""
    os.write(journal.descriptor, b"Timeout (0:00:01)!\nThread 1 (most recent call first)")
    journal.close()
    found = read_journal(path.read_bytes())
    assert found.last_words.startswith("Timeout (0:00:01)!\nThread 1")
    assert (found.in_flight, len(found.records)) == ([(10, 20)], 1)


def test_drafts_grow_from_record_to_record(tmp_path):
    path = tmp_path / "journal"
    journal = FileJournal(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "j", {"run": "r"})
    journal.keep({7: [1, 2], -(2**63): [5]})
    journal.append(records()[0])
    before = path.stat().st_size
    journal.keep({7: [3], 9: []})
    journal.close()
    data = path.read_bytes()
    found = read_journal(data)
    assert found.drafts == {7: [1, 2, 3], -(2**63): [5], 9: []} and len(found.records) == 1
    torn = read_journal(data[: before + 40])
    assert torn.drafts == {7: [1, 2], -(2**63): [5]} and len(torn.records) == 1
