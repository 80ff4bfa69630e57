"""What a function returned does not change with what the model does next."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import dask_pcm as pcm
from dask_pcm.frames.detach import detached
from tests.support.jobs import write

N_ROWS, BATCH_ROWS = 64, 16


class Buffered:
    """Answers into one buffer, as ONNX with bound outputs and CUDA graphs do."""

    def __init__(self):
        self.out = np.zeros((BATCH_ROWS, 2), "f4")
        self.frame = pd.DataFrame({"y": np.zeros(BATCH_ROWS, "f4")})

    def __call__(self, ids):
        self.out[: len(ids)] = np.asarray(ids)[:, None]
        return self.out[: len(ids)]


def objects(frame, model):
    return pd.DataFrame({"y": list(model(frame.id))}, index=frame.index)


def fixed_lists(frame, model):
    values = pa.array(model(frame.id).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(values, 2)
    return pd.DataFrame({"y": pd.arrays.ArrowExtensionArray(lists)}, index=frame.index)


def views(frame, model):
    column = pd.array(model(frame.id)[:, 1], copy=False)
    return pd.DataFrame({"y": column}, index=frame.index, copy=False)


def one_frame(frame, model):
    model.frame.loc[:, "y"] = model(frame.id)[:, 1]
    return model.frame


LISTS = pd.ArrowDtype(pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("func", "dtype"),
    [
        (objects, LISTS),
        (fixed_lists, pd.ArrowDtype(pa.list_(pa.float32(), 2))),
        (views, "f4"),
        (one_frame, "f4"),
    ],
)
def test_answers_of_one_batch_are_not_those_of_the_next(client, claims, tmp_path, func, dtype):
    frame = pcm.map_partitions(
        func,
        pcm.read_parquet(claims(n_files=1, n_rows=N_ROWS)),
        context=pcm.Context(Buffered),
        meta={"y": dtype},
        batch_rows=BATCH_ROWS,
    )
    write(frame, tmp_path / "out")
    found = pd.read_parquet(tmp_path / "out").y.tolist()
    assert [np.ravel(y)[-1] for y in found] == list(range(N_ROWS))


def test_objects_and_arrow_columns_are_copied_and_the_rest_stays():
    inner = [np.zeros(2), [1], None, "a", torch.zeros(2)]
    given = pd.DataFrame({"o": pd.Series(inner, dtype=object), "t": list("abcde")})
    given.index = list("vwxyz")
    found = detached(given)
    assert found.index.tolist() == list("vwxyz") and found.t.dtype == given.t.dtype
    inner[0][:], inner[1][0] = 7.0, 7
    inner[4][:] = 7.0
    assert found.o["v"].tolist() == [0.0, 0.0] and found.o["w"] == [1]
    assert found.o["x"] is None and found.o["z"].tolist() == [0.0, 0.0]
    assert detached(3) == 3
