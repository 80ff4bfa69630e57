"""Devices that cannot be used, in real loads."""

from __future__ import annotations

import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.errors import DeviceUnusableError, LoadError
from dask_pcm.scheduling.learned import failures

LOADS: list[float] = []


def load_on_device(name):
    import tests.plugins.scheduler.test_quarantine as shared

    shared.LOADS.append(name)
    raise DeviceUnusableError("the driver 470 is too old for CUDA 13")


def use(frame, live):
    return frame


@pytest.mark.timeout(300)
def test_a_device_that_fails_beside_a_warm_context_ends_the_run(claims, tmp_path, monkeypatch):
    monkeypatch.setattr(failures, "_FIRST_S", 0.5)
    LOADS.clear()
    given = pcm.read_parquet(claims(n_files=2))
    options = {"meta": {"id": "i8", "claim": "str"}, "batch_rows": 10}
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        warm = pcm.map_partitions(use, given, context=pcm.Context(str, "warm"), **options)
        assert len(warm.compute()) == 100
        broken = pcm.map_partitions(use, given, context=pcm.Context(load_on_device, 1), **options)
        with pytest.raises(LoadError, match="each was tried 3 times") as told:
            pcm.write_parquet(broken, tmp_path / "out", progress=False)
        assert "the driver 470 is too old" in str(told.value)
        assert LOADS == [1, 1, 1]
