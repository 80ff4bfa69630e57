"""Writing a journal: when it is synced, and a full disk."""

from __future__ import annotations

import os

import pyarrow as pa
import pytest

import dask_pcm as pcm
from dask_pcm.ledger.journal import writer
from dask_pcm.ledger.journal.record import Record
from dask_pcm.ledger.journal.writer import FileJournal


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    journal = FileJournal(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "j", {"run": "r"})
    monkeypatch.setattr(os, "writev", lambda file, blocks: 5)
    with pytest.raises(pcm.PCMError, match="no room left for the journals"):
        journal.begin(0, 1)
    journal.close()


def test_what_is_noted_is_synced_every_few_seconds_and_no_more(tmp_path, monkeypatch):
    clock, synced = [0.0], []
    monkeypatch.setattr(writer.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(writer.os, "fdatasync", lambda fd: synced.append(clock[0]))
    path = tmp_path / "journal"
    journal = FileJournal(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "j", {"run": "r"})
    for second in range(16):
        clock[0] = float(second)
        journal.append(Record(second, second + 1, pa.table({"id": [second]})))
    journal.close()
    assert synced == [6.0, 12.0]
