"""From where files lie to where their loader reads them."""

from __future__ import annotations

import os
from pathlib import Path

import dask
import fsspec
import pytest

import dask_pcm as pcm
from dask_pcm.config import Config
from dask_pcm.context.bundles import bundle_of
from dask_pcm.errors import DiskError, LoadError, StageError
from dask_pcm.ladder.files import staging as staging_module
from dask_pcm.ladder.files.cache import FileCache
from dask_pcm.ladder.files.staging import Staging, is_in_place
from dask_pcm.ladder.store import Store

CHUNK = 256 << 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))


@pytest.fixture
def staged(tmp_path):
    """Staging into a cache of the test's own, wherever a file lies."""
    with dask.config.set(
        {"pcm.ladder.disk.path": str(tmp_path / "disk"), "pcm.ladder.stage": "always"}
    ):
        yield Staging(Config.read())


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(os.urandom(5 * CHUNK + 3))
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_on_a_disk_of_this_host_it_is_used_where_it_is(model, tmp_path):
    bundle = bundle_of(model)
    with dask.config.set({"pcm.ladder.disk.path": str(tmp_path / "disk")}):
        with Staging().placed([bundle]) as places:
            (path,) = places.values()
            assert contents(path) == contents(model)
            assert Path(path, "weights.bin").samefile(model / "weights.bin")
        (model / "stranger").write_text("no part of the recipe")
        with Staging().placed([bundle]) as places:
            assert "stranger" not in contents(places[bundle.digest])
        (model / "stranger").unlink()
        weights = bundle_of(model / "weights.bin")
        assert is_in_place(weights)
        with Staging().placed([weights]) as places:
            assert places == {weights.digest: str(model / "weights.bin")}
        assert FileCache(tmp_path / "disk").used_bytes() == 0
        os.utime(model / "weights.bin", (1, 1))  # no longer what was digested: looked at closely
        with Staging().placed([bundle]) as places:
            assert places[bundle.digest].startswith(str(tmp_path / "disk"))
            assert contents(places[bundle.digest]) == contents(model)


def test_without_a_cache_what_is_local_is_read_all_the_same(model, caplog):
    with dask.config.set({"pcm.ladder.disk.path": "/proc/nowhere"}):
        with Staging().placed([bundle_of(model)]) as places:
            assert list(places.values()) == [str(model)]
        assert "cannot be made" in caplog.text
        with dask.config.set({"pcm.ladder.stage": "always"}), pytest.raises(DiskError):
            Staging().placed([bundle_of(model)]).__enter__()


def test_a_relative_path_of_the_cache(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        dask.config.set({"pcm.ladder.disk.path": "cache", "pcm.ladder.stage": "always"}),
        Staging().placed([bundle_of(model)]) as places,
    ):
        assert contents(places[bundle_of(model).digest]) == contents(model)


def test_what_a_loader_writes_stays_with_it(model, staged):
    """Neither what it puts in the place of a file, nor what it writes into one."""
    bundle = bundle_of(model)
    with staged.placed([bundle]) as places:
        config = Path(places[bundle.digest], "config.json")
        config.unlink()
        config.write_text("evil")
        Path(places[bundle.digest], "more").write_text("evil")
    with staged.placed([bundle]) as places:
        assert contents(places[bundle.digest]) == contents(model)
        blob = Path(places[bundle.digest], "weights.bin").resolve()
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.write(b"evil")
    with staged.placed([bundle]) as places:
        assert contents(places[bundle.digest]) == contents(model)


def test_removed_beside_a_live_context_it_is_staged_again(model, staged):
    bundle = bundle_of(model)
    with staged.placed([bundle]) as places:
        for path in Path(places[bundle.digest]).iterdir():
            path.resolve().unlink()
        with staged.placed([bundle]) as again:
            assert contents(again[bundle.digest]) == contents(model)


def test_what_is_larger_than_the_cache_costs_nothing_else_its_place(model, tmp_path):
    settings = {"pcm.ladder.disk.path": str(tmp_path / "disk"), "pcm.ladder.stage": "always"}
    (tmp_path / "small").write_bytes(b"x" * CHUNK)
    (tmp_path / "large").mkdir()
    for number in range(4):
        (tmp_path / "large" / f"{number}.bin").write_bytes(os.urandom(CHUNK))
    with dask.config.set({**settings, "pcm.ladder.disk.quota": 3 * CHUNK}):
        staging, small = Staging(), bundle_of(tmp_path / "small")
        with staging.placed([small]):
            pass
        with pytest.raises(DiskError, match=r"1,048,576 bytes, more than the quota of 786,432"):
            staging.placed([bundle_of(tmp_path / "large")]).__enter__()
        assert staging.disk.has(small.files[0].blob)


def test_from_a_network_filesystem_it_is_staged(model, staged, monkeypatch):
    monkeypatch.setattr(staging_module, "is_node_local", lambda path: "disk" in str(path))
    with Staging(staged._config).placed([bundle_of(model)]) as places:
        (path,) = places.values()
        assert contents(path) == contents(model) and path != str(model)


def test_a_cache_on_a_network_filesystem_is_this_processs_own(model, staged, monkeypatch, caplog):
    monkeypatch.setattr(staging_module, "is_node_local", lambda path: False)
    with staged.placed([bundle_of(model)]) as places:
        (path,) = places.values()
        assert f"-{os.getpid()}/" in path and contents(path) == contents(model)
    assert "on a network filesystem" in caplog.text


def test_from_an_object_store(model, staged, bucket):
    fsspec.filesystem("s3").put(str(model), f"{bucket}/model", recursive=True)
    bundle = bundle_of(f"{bucket}/model")
    with staged.placed([bundle]) as places:
        assert contents(places[bundle.digest]) == contents(model)
    fsspec.filesystem("s3").rm(f"{bucket}/model", recursive=True)
    with staged.placed([bundle]) as places:  # kept
        assert contents(places[bundle.digest]) == contents(model)


def test_what_is_gone_or_is_not_what_it_was(model, staged):
    bundle = bundle_of(model)
    (model / "weights.bin").write_bytes(os.urandom(5 * CHUNK + 3))
    with pytest.raises(
        StageError, match=r"weights.bin' is not what it was .* Make the Context again"
    ):
        staged.placed([bundle]).__enter__()
    (model / "weights.bin").write_bytes(b"short")
    with pytest.raises(StageError, match="is not what it was"):
        staged.placed([bundle]).__enter__()
    (model / "weights.bin").unlink()
    with pytest.raises(StageError, match=r"cannot be read on this worker.*No such file"):
        staged.placed([bundle]).__enter__()


def load(folder, weights=None):
    return contents(folder), weights


def test_the_loader_gets_the_staged_path_and_keeps_its_files(model, staged):
    context = pcm.Context(
        load, model, weights=model / "weights.bin", files=[model, model / "weights.bin"]
    )
    store = Store(staging=staged)
    with store.acquire([context.ref]) as (live,):
        found, weights = live
        assert found == contents(model) and weights.startswith(str(staged.disk.root))
    digests = [file.blob.digest for bundle in context.ref.bundles for file in bundle.files]
    assert not any(staged.disk.evict(digest) for digest in digests)  # the live object may read them
    assert store.evict(context.digest)
    assert all(staged.disk.evict(digest) for digest in digests)


def test_a_load_that_fails_lets_go_of_its_files(model, staged):
    def failing(path):
        raise RuntimeError("no")

    context = pcm.Context(failing, str(model), files=[model])
    store = Store(staging=staged)
    with pytest.raises(LoadError, match="RuntimeError: no"):
        store.load(context.ref)
    assert all(staged.disk.evict(file.blob.digest) for file in context.ref.bundles[0].files)


def test_on_a_cluster_each_host_reads_the_store_once(model, tmp_path, bucket, object_store):
    """Two worker processes of one host, a model in an object store, a killed worker."""
    import s3fs
    from distributed import Client, LocalCluster

    s3fs.S3FileSystem().put(str(model), f"{bucket}/model", recursive=True)
    context = pcm.Context(load, f"{bucket}/model", files=f"{bucket}/model")

    def use(i, model):
        with pcm.acquire(model) as (found, _):
            return {name: len(data) for name, data in found.items()}

    with (
        dask.config.set({"pcm.ladder.disk.path": str(tmp_path / "disk")}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        sizes = {"weights.bin": 5 * CHUNK + 3, "config.json": 2}
        assert client.gather(client.map(use, range(8), model=context)) == [sizes] * 8
        s3fs.S3FileSystem().rm(f"{bucket}/model", recursive=True)
        client.restart()  # new processes find it on the disk rung
        assert client.gather(client.map(use, range(8), model=context, pure=False)) == [sizes] * 8
    assert len(list((tmp_path / "disk" / "blobs").glob("*.note"))) == 2
