"""How much of a run is outstanding, on a real cluster."""

from __future__ import annotations

import os
import time
from pathlib import Path

import dask_pcm as pcm
from dask_pcm.runs.gate_link import GateLink, GateStatus
from tests.support.jobs import META, load, verify, write
from tests.support.patience import patient

#: Of the two workers of the cluster, with two lanes each.
N_LANES = 4


class Together:
    """A function that goes on once it runs in as many units at a time as there are lanes."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, frame, model):
        Path(self.folder, f"{frame['id'].iloc[0]}").touch()
        deadline = time.monotonic() + patient(20)
        while len(os.listdir(self.folder)) < N_LANES:
            assert time.monotonic() < deadline, os.listdir(self.folder)
            time.sleep(0.01)
        return verify(frame, model)


def test_all_lanes_of_all_workers_get_units(client, claims, tmp_path):
    (tmp_path / "running").mkdir()
    shared = pcm.Context(load, exclusive=False)
    frame = pcm.read_parquet(claims())
    job = pcm.map_partitions(
        Together(tmp_path / "running"), frame, context=shared, meta=META, batch_rows=8
    )
    report = write(job, tmp_path / "out").report
    assert (report.rows, report.rows_failed) == (200, 0)


def test_the_gate_tells_of_its_workers(client):
    link = GateLink(client, "run", (pcm.Context(load).ref,), "kind")
    try:
        status = link.report(100.0, 4)
        assert status is not None and status.n_workers == 2
        (demand,) = status.demand
        assert demand.n_workers == 2 and demand.row_s is None
    finally:
        link.close()


def test_every_field_of_the_gates_answer_is_taken_over(client, monkeypatch):
    """Whatever its type."""
    link = GateLink(client, "run", (pcm.Context(load).ref,), "kind")
    try:
        says = client.sync(client.scheduler.pcm_run, **link._fixed, n_rows=1.0, n_units=1)
        status = link.report(1.0, 1)
        assert says.keys() == set(GateStatus.__slots__)
        assert [tuple(one) for one in status.demand] == [tuple(one) for one in says["demand"]]
        assert {name: getattr(status, name) for name in says if name != "demand"} == {
            name: value for name, value in says.items() if name != "demand"
        }
    finally:
        link.close()
