"""Fixtures of the tests of runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import dask_pcm as pcm
from tests.support.jobs import LLM, META, Gatekeeper, verify


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "verdicts")


@pytest.fixture
def noted(tmp_path):
    """A function that notes its rows and fails on those named in a file; ``noted.ids()``."""
    log, bad = str(tmp_path / "computed"), str(tmp_path / "bad")
    Path(bad).write_text("")

    def infer(frame, model):
        failing = set(map(int, Path(bad).read_text().split()))
        if len(frame) == 1 and frame["id"].iloc[0] in failing:
            raise ValueError(f"row {frame['id'].iloc[0]} is bad")
        if failing & set(frame["id"]):
            raise ValueError("some row is bad")
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (" ".join(map(str, frame["id"])) + "\n").encode())
        os.close(descriptor)
        return verify(frame, model)

    def ids():
        text = Path(log).read_text() if os.path.exists(log) else ""
        Path(log).unlink(missing_ok=True)
        return sorted(map(int, text.split()))

    infer.ids = ids
    infer.fail = lambda rows: Path(bad).write_text(" ".join(map(str, rows)))
    return infer


@pytest.fixture
def gate(tmp_path):
    return Gatekeeper(tmp_path / "go")


@pytest.fixture
def job(claims):
    folder = claims()

    def make(func=verify, batch_rows=8, keep=None, context=LLM, **options):
        frame = pcm.read_parquet(folder, **options)
        verdicts = pcm.map_partitions(
            func, frame, context=context, meta=META, batch_rows=batch_rows
        )
        return verdicts if keep is None else verdicts[keep(verdicts)]

    make.folder = folder
    return make
