"""A model that fits on no worker's devices is refused where the user calls; others fit a pool."""

from __future__ import annotations

import os

import pytest
from distributed import Client

import dask_pcm as pcm
from dask_pcm.errors import DeviceMemoryError, LoadError
from tests.support.jobs import found_in
from tests.support.patience import patient, until

# Pretended devices: the workers compute on the CPU, and keep to the budget all the same.
ON_CPU = ["export DASK_PCM__WORKER__ACCELERATOR=cpu"]


def pool(memory, **options):
    return pcm.Pool(batch="local", gpus_per_job=1, device_memory=memory, prologue=ON_CPU, **options)


@pytest.fixture
def needing(claims):
    """A frame of forty rows by a context that takes so much on a device."""
    read = pcm.read_parquet(claims(n_files=1, n_rows=40))

    def where(frame, model):
        return frame[["id"]].assign(pool=os.environ["DASK_PCM__WORKER__POOL"])

    def needing(device_memory):
        return pcm.map_partitions(
            where,
            read,
            context=pcm.Context(dict, [("a", 1)], device_memory=device_memory, name="model"),
            meta={"id": "i8", "pool": "str"},
            batch_rows=4,
        )

    return needing


NUMBERS = (
    "'model' needs 85,899,345,920 bytes .* pool 'a10' 21,600,000,000, pool 'h100' 72,000,000,000"
)


def test_it_is_refused_before_anything_starts(cluster, needing, tmp_path):
    one = cluster({"a10": pool("24 GB"), "h100": pool("80 GB")})
    one.adapt(target_duration="1s")
    with Client(one) as client:
        with pytest.raises(DeviceMemoryError, match=NUMBERS) as raised:
            pcm.write_parquet(needing("80 GiB"), tmp_path / "out", client=client, progress=False)
        assert "gpus_per_worker" in str(raised.value)
        with pytest.raises(LoadError, match=NUMBERS):
            needing("80 GiB").head()
        assert not any(fleet.jobs for fleet in one._fleets.values())
        assert not list(tmp_path.glob("out/*.parquet"))
    with (
        pcm.connect(one.connection_file) as client,  # another process has no pools to look at
        pytest.raises(DeviceMemoryError, match=NUMBERS),
    ):
        pcm.write_parquet(needing("80 GiB"), tmp_path / "out", client=client, progress=False)


def test_it_goes_to_the_pool_that_it_fits(cluster, needing, tmp_path):
    pools = {"a10": pool("24 GB"), "h100": pool("80 GB", max_jobs=1)}
    one = cluster(pools)
    one.scale({"a10": 1})
    with Client(one) as client:
        client.wait_for_workers(1, timeout=patient(60))
        one.adapt(minimum={"a10": 1}, maximum=2, target_duration="1s")
        pcm.write_parquet(needing("40 GiB"), tmp_path / "out", client=client, progress=False)
        assert set(found_in(tmp_path / "out").pool) == {"h100"}
        # What is done stays done where nothing is large enough any more.
        until(lambda: len(one._fleets["a10"].jobs) == 1)
        pcm.write_parquet(needing("80 GiB"), tmp_path / "out", client=client, progress=False)
