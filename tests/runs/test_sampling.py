"""``sample``: some rows of the whole, and what the rest would take."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

import dask_pcm as pcm
from dask_pcm.errors import OutputError, SchemaError
from tests.support.jobs import write


def test_where_every_row_fails_alike(client, job, out, noted):
    noted.fail(range(200))
    with pytest.raises(ValueError, match="is bad"):
        pcm.sample(job(noted), 20)
    noted.fail(range(150))
    assert 0 < pcm.sample(job(noted), 20).n_failed < 20


def test_rows_of_the_whole_and_what_the_rest_would_take(client, job, out, noted):
    found = pcm.sample(job(noted), 20)
    assert len(found.frame) == 20 and found.frame.id.is_monotonic_increasing
    assert found.frame.id.max() > 100 and noted.ids() == found.frame.id.tolist()
    assert (found.n_rows, found.n_left, found.n_failed) == (200, 200, 0)
    assert found.device_hours == pytest.approx(200 / found.rows_per_s / 3600)
    assert "20 of 200 rows" in str(found)
    assert not os.path.exists(out)
    assert pcm.sample(job(noted), 20).frame.id.tolist() == found.frame.id.tolist()


def test_of_what_is_begun(client, job, out, noted):
    noted.fail([5])
    write(job(noted), out)
    sorted(Path(out).glob("part-*.parquet"))[-1].unlink()
    n_left = 200 - len(pd.read_parquet(out))
    before = sorted(p.name for p in Path(out).rglob("*"))
    found = pcm.sample(job(noted), 1000, output=out)
    assert (len(found.frame), found.n_left, found.n_failed) == (200, n_left, 1)
    assert found.errors == ("ValueError: row 5 is bad",)
    assert sorted(p.name for p in Path(out).rglob("*")) == before


def test_what_cannot_be_sampled(client, job, out):
    with pytest.raises(SchemaError, match="rows that can be computed separately"):
        pcm.sample(job(batch_rows=None), 5)
    with pytest.raises(SchemaError, match="at least 1"):
        pcm.sample(job(), 0)
    write(job(), out)
    with pytest.raises(OutputError, match="of another job"):
        pcm.sample(job(lambda f, m: f), 5, output=out)
