"""Runs from a store to a store."""

from __future__ import annotations

import pytest

import dask_pcm as pcm
from dask_pcm.errors import (
    OutputError,
)
from tests.support.jobs import LLM, META, found_in, load, verify, write


class TestObjectStore:
    @pytest.fixture
    def s3_client(self, object_store):
        """Workers that know the store: they take its address from the environment."""
        from distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            yield client

    @pytest.mark.parametrize("has_locks", [False, True])
    def test_from_a_store_to_a_store(self, s3_client, bucket, claims, tmp_path, noted, has_locks):
        import s3fs

        fs = s3fs.S3FileSystem()
        fs.put(claims(), f"{bucket}/claims", recursive=True)
        locks = {"lock_folder": tmp_path / "locks"} if has_locks else {}
        out = f"{bucket}/verdicts"

        def job(name="model"):
            read = pcm.read_parquet(f"{bucket}/claims")
            context = pcm.Context(load, name)
            return pcm.map_partitions(noted, read, context=context, meta=META, batch_rows=8)

        noted.fail([7])
        run = write(job(), out, **locks)
        assert (run.report.rows, run.report.rows_failed) == (200, 1)
        how = f"lock files in {tmp_path / 'locks'}" if has_locks else "conditional put"
        assert run.report.committed_by == how
        assert found_in(out).id.tolist() == list(range(200))
        noted.ids()
        assert write(job(), out, **locks).report.units == 0
        fs.rm(sorted(fs.glob(f"{bucket}/verdicts/part-*.parquet"))[2])
        again = write(job(), out, **locks)
        assert len(noted.ids()) == 200 - again.report.rows_resumed > 0
        noted.fail([])
        assert write(job(), out, retry_failed=True, **locks).report.rows_failed == 0
        assert pcm.attach(out).status == "finished"
        with pytest.raises(OutputError, match="of another job"):
            write(job("other"), out, **locks)
        assert write(job("other"), out, overwrite=True, **locks).report.rows == 200
        assert found_in(out).verdict[0] == "otherclaim 0"
        left = [path.rpartition("/")[2] for path in fs.ls(f"{bucket}/verdicts/_pcm")]
        kept = [name for name in left if not name.startswith("lock-")]
        assert sorted(kept) == ["log", "manifest.json", "report.json"] and len(left) <= 4

    def test_an_output_within_its_input_is_refused(self, s3_client, bucket, claims):
        import s3fs

        s3fs.S3FileSystem().put(claims(), f"{bucket}/claims", recursive=True)
        read = pcm.read_parquet(f"{bucket}/claims")
        verdicts = pcm.map_partitions(verify, read, context=LLM, meta=META, batch_rows=8)
        with pytest.raises(OutputError, match="overlap"):
            write(verdicts, f"{bucket}/claims")
