"""What functions return comes out as it went in, or is an error: by batch and after a bisection."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import dask_pcm as pcm
from dask_pcm.errors import SchemaError
from tests.support.jobs import load, write

N_ROWS, BATCH_ROWS = 40, 8
LARGE = 2**53 + 1


def texts(frame, model):
    return frame[["id"]].assign(v=[f"c{i % 3}" for i in frame.id])


def categories_of_each_batch(frame, model):
    return frame[["id"]].assign(v=pd.Categorical([f"c{i // 8}" for i in frame.id]))


def large_unsigned(frame, model):
    if len(frame) > 1 and 13 in frame.id.values:
        raise ValueError("not together")
    if frame.id.iloc[0] == 13:
        raise ValueError("row 13 is bad")
    kind = "u8" if frame.id.iloc[0] % 2 else "i8"
    return frame[["id"]].assign(v=np.full(len(frame), LARGE, kind))


def some_categorical(frame, model):
    if 13 in frame.id.values:
        raise ValueError("row 13 is bad")
    return categories_of_each_batch(frame, model)


def no_categories_in_a_file(frame, model):
    values = [None if i < N_ROWS // 2 else f"c{i // 8}" for i in frame.id]
    return frame[["id"]].assign(v=pd.Categorical(values))


CASES = {
    "texts": (texts, "category", lambda i: f"c{i % 3}"),
    "categories": (categories_of_each_batch, "category", lambda i: f"c{i // 8}"),
    "known categories": (
        texts,
        pd.CategoricalDtype(["c0", "c1"]),
        lambda i: f"c{i % 3}",
    ),
    "a file without categories": (
        no_categories_in_a_file,
        "category",
        lambda i: None if i < N_ROWS // 2 else f"c{i // 8}",
    ),
    "… of known ones": (
        no_categories_in_a_file,
        pd.CategoricalDtype(["c2", "c3", "c4"]),
        lambda i: None if i < N_ROWS // 2 else f"c{i // 8}",
    ),
    "bisected integers": (large_unsigned, "i8", lambda i: None if i == 13 else LARGE),
    "bisected categories": (
        some_categorical,
        "category",
        lambda i: None if i == 13 else f"c{i // 8}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_survive(client, claims, tmp_path, case):
    func, dtype, expected = CASES[case]
    frame = pcm.read_parquet(claims(n_files=2, n_rows=N_ROWS // 2))
    job = pcm.map_partitions(
        func,
        frame,
        context=pcm.Context(load),
        meta={"id": "i8", "v": dtype},
        batch_rows=BATCH_ROWS,
    )
    wanted = [expected(i) for i in range(N_ROWS)]
    write(job, tmp_path / "out")
    for found in (job.compute(), pd.read_parquet(tmp_path / "out")):
        found = found.sort_values("id")
        values = found["v"].astype(object)
        assert values.where(values.notna(), None).tolist() == wanted


def test_a_function_after_another_gets_its_categories(client, claims, tmp_path):
    frame = pcm.read_parquet(claims(n_files=2, n_rows=N_ROWS // 2))
    meta = {"id": "i8", "v": "category"}
    first = pcm.map_partitions(
        texts, frame, context=pcm.Context(load), meta=meta, batch_rows=BATCH_ROWS
    )

    def second(given, model):
        return given[["id"]].assign(w=[f"{v}!" for v in given["v"]])

    meta = {"id": "i8", "w": "str"}
    job = pcm.map_partitions(second, first, context=pcm.Context(load), meta=meta, batch_rows=5)
    write(job, tmp_path / "out")
    assert pd.read_parquet(tmp_path / "out").w.tolist() == [f"c{i % 3}!" for i in range(N_ROWS)]


def test_columns_that_are_not_declared_are_refused(client, claims, tmp_path):
    frame = pcm.read_parquet(claims())
    job = pcm.map_partitions(
        texts, frame, context=pcm.Context(load), meta={"id": "i8"}, batch_rows=BATCH_ROWS
    )
    with pytest.raises(SchemaError, match=r"not declared: \['v'\]"):
        write(job, tmp_path / "out")
