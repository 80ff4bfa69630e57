"""Parts that are none of a job's: whatever has become of an output, its rows are the job's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.errors import OutputError
from dask_pcm.ledger.inventory import Extent
from dask_pcm.ledger.parts import partition_name, range_name
from dask_pcm.ledger.ranges import Ranges

N_ROWS = 200


@pytest.fixture(scope="module")
def client():
    """Threads: processes are not what this is about."""
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
    )
    with cluster, Client(cluster) as client:
        yield client


#: What is done beside the run when it comes to a row.
MEANWHILE = {}


def double(frame, context):
    from tests.ledger.test_inventory import MEANWHILE  # in here it is no part of the function

    for row, act in MEANWHILE.items():
        if row in frame["id"].values:
            act()
    return pd.DataFrame({"id": frame["id"], "twice": frame["id"] * 2})


@pytest.fixture
def job(tmp_path, client):
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    pd.DataFrame({"id": range(N_ROWS)}).to_parquet(source, index=False)
    MEANWHILE.clear()

    def run(batch_rows=10, **options):
        frame = pcm.map_partitions(
            double,
            pcm.read_parquet(source, rows_per_piece=50),
            context=pcm.Context(list),
            meta={"id": "i8", "twice": "i8"},
            batch_rows=batch_rows,
        )
        return pcm.write_parquet(frame, out, client=client, progress=False, **options)

    run.out = out
    return run


def parts(job):
    return sorted(path for path in job.out.glob("part-*") if path.name != range_name(0, 0))


def is_whole(job):
    found = pd.read_parquet(job.out)
    assert found.id.tolist() == list(range(N_ROWS))
    return (found.twice == 2 * found.id).all()


@pytest.mark.parametrize("batch_rows", [10, None], ids=["by rows", "partitions"])
@pytest.mark.parametrize(
    "name", [range_name(200, 210), partition_name(1), range_name(5, 200), range_name(150, 100)]
)
def test_a_copied_part_is_refused_and_nothing_is_lost(job, name, batch_rows):
    job(batch_rows)
    copy = job.out / name
    shutil.copy2(parts(job)[0], copy)
    with pytest.raises(OutputError, match=name):
        job(batch_rows)
    assert json.loads(Path(job.out, "_pcm/report.json").read_text())["state"] in (
        "failed",
        "finished",  # where it is refused before anything is begun
    )
    copy.unlink()
    assert job(batch_rows).report.units == 0 and is_whole(job)


def test_a_copy_in_the_place_of_a_part_that_is_gone(job):
    """Whether or not the log tells of what was there."""
    job()
    *_, last = parts(job)
    shutil.copy(parts(job)[0], last)
    for step in ("noted", "not noted"):
        with pytest.raises(OutputError, match=rf"{last.name}.* is a copy, or was renamed"):
            job()
        if step == "noted":
            shutil.rmtree(job.out / "_pcm" / "log")
    last.unlink()
    assert job().report.rows == N_ROWS and is_whole(job)


def test_two_parts_that_have_changed_places(job):
    job()
    first, second = parts(job)[:2]
    spare = first.with_suffix(".spare")
    first.rename(spare), second.rename(first), spare.rename(second)
    with pytest.raises(OutputError, match="is a copy, or was renamed"):
        job()


def test_parts_of_a_shorter_input_do_not_fit(job):
    extent = Extent(Ranges([(0, 50), (100, 150)]), 2, keeps_rows=True)
    assert extent.fault((100, 150), 50) is None
    assert "does not have (100 rows in all)" in extent.fault((40, 110), 70)
    assert "has 49 rows, for 50 rows" in extent.fault((0, 50), 49)
    assert "cut by rows" in extent.fault(1, 50)
    by_partition = Extent(None, 2, keeps_rows=False)
    assert by_partition.fault(1, 7) is None and by_partition.fault((0, 0), 0) is None
    assert "beyond the 2 partitions" in by_partition.fault(2, 7)
    assert "cut by partitions" in by_partition.fault((0, 50), 50)


def test_a_part_that_somebody_removes_meanwhile_is_computed_again(job):
    MEANWHILE[199] = lambda: [path.unlink() for path in parts(job)[:1]]
    run = job()
    assert run.report.rows == N_ROWS and run.report.state == "finished" and is_whole(job)


def test_parts_that_are_removed_for_ever_end_the_run(job):
    MEANWHILE.update(dict.fromkeys(range(N_ROWS), lambda: [p.unlink() for p in parts(job)]))
    with pytest.raises(OutputError, match=r"gone again whenever.*what removes them"):
        job()
    MEANWHILE.clear()
    assert job().report.rows == N_ROWS and is_whole(job)


@pytest.mark.parametrize("name", [range_name(200, 210), "a copy.parquet"])
def test_a_file_that_comes_in_meanwhile_fails_the_run(job, name):
    MEANWHILE[199] = lambda: shutil.copy(job.out / range_name(0, 0), job.out / name)
    with pytest.raises(OutputError, match=name):
        job()
    report = json.loads(Path(job.out, "_pcm/report.json").read_text())
    assert report["state"] == "failed" and name in report["error"]
    MEANWHILE.clear()
    (job.out / name).unlink()
    assert job().report.units == 0 and is_whole(job)
