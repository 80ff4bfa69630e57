"""The disk rung: real files, real locks, real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dask_pcm.context.bundles import bundle_of
from dask_pcm.errors import DiskError, InputError
from dask_pcm.ladder.files import cache as disk_module
from dask_pcm.ladder.files import partial as filling_module
from dask_pcm.ladder.files.cache import FileCache, is_node_local
from dask_pcm.ladder.files.partial import verified_chunks
from tests.support.patience import patient

CHUNK = 256 << 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))


@pytest.fixture
def disk(tmp_path):
    return FileCache(tmp_path / "disk")


@pytest.fixture
def made(tmp_path):
    """Make a folder of random files of so many bytes; its bundle."""

    def make(name, *sizes):
        (tmp_path / name).mkdir()
        for number, n_bytes in enumerate(sizes):
            (tmp_path / name / f"{number}.bin").write_bytes(os.urandom(n_bytes))
        return bundle_of(tmp_path / name)

    return make


def source(file):
    return Path(file.url).read_bytes()


def fill(disk, bundle):
    for file in bundle.files:
        with disk.filling(file.blob) as filling:
            for chunk in filling.missing if filling else ():
                assert filling.write(chunk, source(file)[slice(*file.blob.span(chunk))])


def note(disk, bundle):
    return disk.root / "blobs" / f"{bundle.files[0].blob.digest}.note"


def read_all(path):
    return {p.name: p.read_bytes() for p in Path(path).iterdir()}


def test_what_is_staged_is_there_for_this_user_alone(disk, made):
    bundle = made("model", 3 * CHUNK + 1, 10, 0)
    fill(disk, bundle)
    with disk.using(bundle) as path:
        assert read_all(path) == {file.name: source(file) for file in bundle.files}
    for path in [disk.root, *disk.root.rglob("*")]:
        assert path.is_symlink() or path.lstat().st_mode & 0o077 == 0, path
    single = bundle_of(bundle.files[0].url)
    with disk.using(single) as path:  # the same content, by another name
        assert Path(path).name == "0.bin" and Path(path).read_bytes() == source(single.files[0])


def test_a_wrong_chunk_is_not_taken(disk, made):
    (file,) = made("model", 2 * CHUNK).files
    with disk.filling(file.blob) as filling:
        right = source(file)[:CHUNK]
        assert not filling.write(0, right[:-1] + bytes([right[-1] ^ 1]))
        assert not filling.write(0, right[:-1]) and not filling.write(1, right)
        assert filling.missing == [0, 1]
    assert not disk.has(file.blob)


def test_half_written_it_is_gone_on_with_and_verified(disk, made):
    (file,) = made("model", 8 * CHUNK).files
    with disk.filling(file.blob) as filling:
        for chunk in (1, 2, 5):
            filling.write(chunk, source(file)[slice(*file.blob.span(chunk))])
    (part,) = disk.root.rglob("*.part")
    with part.open("r+b") as damaged:
        damaged.seek(2 * CHUNK + 7)
        damaged.write(b"\0\0\0")
    with disk.filling(file.blob) as filling:
        assert filling.missing == [0, 2, 3, 4, 6, 7]
    assert not disk.has(file.blob)


STAGES = """
import os, sys, time
from dask_pcm.context.bundles import bundle_of
from dask_pcm.ladder.files.cache import FileCache
bundle, disk = bundle_of(sys.argv[1]), FileCache(sys.argv[2])
file = bundle.files[0]
with disk.filling(file.blob) as filling:
    print("complete" if filling is None else f"missing {len(filling.missing)}", flush=True)
    for chunk in filling.missing if filling else ():
        start, stop = file.blob.span(chunk)
        with open(file.url, "rb") as stream:
            stream.seek(start)
            filling.write(chunk, stream.read(stop - start))
        if len(sys.argv) > 3 and chunk == 3:
            print("half", flush=True)
            time.sleep(60)
"""


def staging(bundle, disk, *options):
    command = [sys.executable, "-c", STAGES, bundle.given, str(disk.root), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_stages_and_the_other_waits(disk, made):
    bundle = made("model", 8 * CHUNK)
    processes = [staging(bundle, disk) for _ in range(2)]
    said = sorted(process.communicate(timeout=patient(60))[0].strip() for process in processes)
    assert said == ["complete", "missing 8"]


def test_killed_in_the_midst_another_process_goes_on(disk, made):
    bundle = made("model", 8 * CHUNK)
    killed = staging(bundle, disk, "slow")
    assert killed.stdout.readline() == "missing 8\n" and killed.stdout.readline() == "half\n"
    waiting = staging(bundle, disk)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert waiting.communicate(timeout=patient(60))[0].strip() == "missing 4"
    with disk.using(bundle) as path:
        assert read_all(path) == {"0.bin": source(bundle.files[0])}


def test_threads_of_one_process_stage_once(disk, made):
    bundle = made("model", 4 * CHUNK)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fill(disk, bundle), range(4)))
    assert disk.has(bundle.files[0].blob)


def test_a_tree_that_somebody_was_given_is_there_at_every_moment(disk, made, tmp_path):
    """However many ask for it for the first time at the same moment."""
    missed = []
    with ThreadPoolExecutor(8) as pool:
        for number in range(30):
            bundle = made(f"model-{number}", 10, 20)
            fill(disk, bundle)
            together = threading.Barrier(8)

            def use(_, bundle=bundle, together=together):
                together.wait(patient(10))
                with disk.using(bundle) as path:
                    for _ in range(50):
                        if not Path(path, "1.bin").exists():
                            missed.append(path)

            list(pool.map(use, range(8)))
    assert not missed


class TestRoom:
    def test_least_worth_goes_first_and_what_is_used_stays(self, tmp_path, made):
        disk = FileCache(tmp_path / "disk", quota_bytes=4 * CHUNK + 100_000)
        bundles = [made(f"model-{number}", CHUNK) for number in range(4)]
        for age, bundle in enumerate(reversed(bundles)):
            fill(disk, bundle)
            os.utime(note(disk, bundle), (time.time() - 3600 * age,) * 2)
        with disk.using(bundles[0]):  # the oldest
            os.utime(note(disk, bundles[0]), (1, 1))
            fill(disk, made("model-4", CHUNK))
            assert [disk.has(b.files[0].blob) for b in bundles] == [True, False, True, True]
        fill(disk, made("model-5", 2 * CHUNK))
        assert [disk.has(b.files[0].blob) for b in bundles] == [False, False, False, True]
        assert disk.used_bytes() <= 4 * CHUNK + 100_000

    def test_what_took_long_to_stage_is_worth_more(self, tmp_path, made):
        disk = FileCache(tmp_path / "disk", quota_bytes=2 * CHUNK + 100_000)
        slow, fast = made("slow", CHUNK), made("fast", CHUNK)
        for bundle, seconds in ((slow, 60.0), (fast, 0.1)):
            fill(disk, bundle)
            path = note(disk, bundle)
            path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": seconds}))
        os.utime(note(disk, slow), (time.time() - 60,) * 2)
        fill(disk, made("new", CHUNK))
        assert disk.has(slow.files[0].blob) and not disk.has(fast.files[0].blob)

    def test_what_is_being_staged_has_its_room(self, tmp_path, made):
        """By this process or another; a process that is killed leaves the room to others."""
        disk = FileCache(tmp_path / "disk", quota_bytes=15 * CHUNK)
        one, two = made("one", 10 * CHUNK), made("two", 10 * CHUNK)
        with disk.filling(one.files[0].blob) as filling:
            assert disk.used_bytes() == 10 * CHUNK
            filling.write(0, source(one.files[0])[:CHUNK])
            assert disk.used_bytes() == 10 * CHUNK
            with pytest.raises(DiskError, match="in use or being staged"):
                fill(disk, two)
        other = staging(one, disk, "slow")
        assert "missing" in other.stdout.readline() and other.stdout.readline() == "half\n"
        with pytest.raises(DiskError, match="in use or being staged"):
            fill(disk, two)
        os.kill(other.pid, signal.SIGKILL)
        other.communicate()
        fill(disk, two)
        assert not disk.has(one.files[0].blob)
        fill(disk, one)
        assert not disk.has(two.files[0].blob)
        assert disk.used_bytes() < 11 * CHUNK

    def test_however_many_stage_at_once_the_quota_is_kept(self, tmp_path, made):
        bundles = [made(f"model-{number}", 4 * CHUNK) for number in range(8)]
        quota, most = 9 * CHUNK, []

        def stage(bundle):
            disk = FileCache(tmp_path / "disk", quota_bytes=quota)  # as of a process of its own
            for _ in range(5):
                with contextlib.suppress(DiskError):
                    fill(disk, bundle)
                n_bytes = 0
                for path in disk.root.glob("blobs/*.part"):
                    with contextlib.suppress(FileNotFoundError):  # complete, or evicted
                        n_bytes += 512 * path.stat().st_blocks
                most.append(n_bytes)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(stage, bundles))
        assert max(most) <= quota
        assert FileCache(tmp_path / "disk", quota).used_bytes() <= quota

    def test_what_is_evicted_leaves_nothing(self, disk, made):
        bundles = [made("model", CHUNK, 10), made("other", 2 * CHUNK)]
        for bundle in bundles:
            fill(disk, bundle)
            with disk.using(bundle):
                pass
        with disk.using(bundles[1]) as path:
            for file in (*bundles[0].files, *bundles[1].files):
                assert disk.evict(file.blob.digest) == (file in bundles[0].files)
            with pytest.raises(FileNotFoundError):  # it has looked for it
                disk.using(bundles[0]).__enter__()
            FileCache(disk.root)
            assert read_all(path) == {"0.bin": source(bundles[1].files[0])}
            assert [tree.name for tree in (disk.root / "trees").iterdir()] == [bundles[1].digest]
            assert {p.stem for p in (disk.root / "blobs").iterdir()} == {
                bundles[1].digest,
                bundles[1].files[0].blob.digest,
            }
        disk.evict(bundles[1].files[0].blob.digest)
        FileCache(disk.root)
        assert not list((disk.root / "blobs").iterdir()) + list((disk.root / "trees").iterdir())

    def test_whoever_stages_uses_or_evicts_meets_no_half_of_it(self, disk, made):
        bundle = made("model", CHUNK, 10)

        def use(number):
            for _ in range(30):
                if number == 0:
                    for file in bundle.files:
                        disk.evict(file.blob.digest)
                    FileCache(disk.root)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    fill(disk, bundle)
                    with disk.using(bundle) as path:
                        assert read_all(path) == {f.name: source(f) for f in bundle.files}

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))

    def test_no_room_at_all(self, tmp_path, made):
        disk = FileCache(tmp_path / "disk", quota_bytes=CHUNK)
        large = made("large", 3 * CHUNK).files[0].blob
        with pytest.raises(DiskError, match=r"no room for 786,432 bytes.*quota of 262,144"):
            disk.filling(large).__enter__()

    def test_used_by_another_process_it_is_not_evicted(self, disk, made):
        bundle = made("model", CHUNK)
        fill(disk, bundle)
        code = (
            "import sys; from dask_pcm.context.bundles import bundle_of;"
            " from dask_pcm.ladder.files.cache import FileCache\n"
            "with FileCache(sys.argv[2]).using(bundle_of(sys.argv[1])): print('in use',"
            " flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, bundle.given, str(disk.root)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as user:
            assert user.stdout.readline() == "in use\n"
            assert not disk.evict(bundle.files[0].blob.digest)
            user.kill()
        assert disk.evict(bundle.files[0].blob.digest) and not disk.has(bundle.files[0].blob)
        with pytest.raises(FileNotFoundError):
            disk.using(bundle).__enter__()

    def test_a_full_disk_is_said_and_leaves_what_there_is(self, tmp_path, made):
        (tmp_path / "small").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "small"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no filesystem can be mounted here")
        try:
            disk = FileCache(tmp_path / "small" / "disk")
            with pytest.raises(DiskError, match="no room for 2,097,152 bytes"):
                fill(disk, made("large", 8 * CHUNK))
            bundle = made("fits", 2 * CHUNK)
            with disk.filling(bundle.files[0].blob) as filling:
                (tmp_path / "small" / "other").write_bytes(b"x" * (900 << 10))
                with pytest.raises(DiskError, match="No space left on device"):
                    for chunk in filling.missing:
                        data = source(bundle.files[0])[slice(*filling.blob.span(chunk))]
                        filling.write(chunk, data)
            (tmp_path / "small" / "other").unlink()
            fill(disk, bundle)
            assert disk.has(bundle.files[0].blob)
        finally:
            subprocess.run(["umount", tmp_path / "small"], check=True)


class TestCare:
    def test_left_half_done_and_not_taken_up_it_is_removed(self, disk, made, monkeypatch):
        (file,) = made("model", 2 * CHUNK).files
        with disk.filling(file.blob) as filling:
            filling.write(0, source(file)[:CHUNK])
        (part,) = disk.root.rglob("*.part")
        FileCache(disk.root)
        assert part.exists()
        os.utime(part, (1, 1))
        with disk.filling(file.blob):  # somebody is at it
            os.utime(part, (1, 1))
            FileCache(disk.root)
            assert part.exists()
        os.utime(part, (1, 1))
        FileCache(disk.root)
        assert not part.exists()

    def test_from_an_earlier_boot_it_is_verified(self, disk, made, monkeypatch):
        bundle = made("model", 2 * CHUNK)
        fill(disk, bundle)
        place = disk.root / "blobs" / bundle.files[0].blob.digest
        monkeypatch.setattr(filling_module, "_boot", lambda: "the next one")
        with disk.using(bundle):
            assert json.loads(note(disk, bundle).read_text())["state"][2] == "the next one"
        monkeypatch.setattr(filling_module, "_boot", lambda: "and the next")
        place.chmod(0o600)
        with place.open("r+b") as file:  # as a crash of the machine leaves it
            file.write(b"\0" * 4096)
        with pytest.raises(FileNotFoundError):
            disk.using(bundle).__enter__()
        fill(disk, bundle)
        with disk.using(bundle) as path:
            assert read_all(path) == {"0.bin": source(bundle.files[0])}

    def test_a_cache_of_somebody_else_or_open_to_others(self, tmp_path):
        theirs = tmp_path / "theirs"
        theirs.mkdir(mode=0o700)
        os.chown(theirs, 65534, 65534)
        with pytest.raises(DiskError, match=r"not a folder of yours .* belongs to user 65534"):
            FileCache(theirs)
        (tmp_path / "open").mkdir(mode=0o777)
        (tmp_path / "open").chmod(0o777)
        with pytest.raises(DiskError, match=r"open to others \(mode 777\): chmod 700"):
            FileCache(tmp_path / "open")
        (tmp_path / "link").symlink_to(tmp_path / "open")
        with pytest.raises(DiskError, match="not a folder of yours"):
            FileCache(tmp_path / "link")
        with pytest.raises(DiskError, match="cannot be made"):
            FileCache("/proc/nowhere/disk")

    def test_a_name_that_leads_out_makes_no_tree(self, disk, made):
        import dataclasses

        bundle = made("model", 10)
        fill(disk, bundle)
        evil = dataclasses.replace(bundle.files[0], name="../../evil")
        with pytest.raises(InputError, match="leads out"):
            disk.using(dataclasses.replace(bundle, files=(evil,), digest="e" * 32)).__enter__()


def test_chunks_of_a_file_that_is_too_short(made, tmp_path):
    (file,) = made("model", 3 * CHUNK).files
    short = tmp_path / "short"
    short.write_bytes(source(file)[: 2 * CHUNK + 5])
    with short.open("rb") as stream:
        assert verified_chunks(stream.fileno(), file.blob) == {0, 1}


def test_where_locks_hold(tmp_path, monkeypatch):
    assert is_node_local(tmp_path) and is_node_local("/proc/nowhere")
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nfs:/home /home nfs4 rw 0 0\nx /home/a\\040b xfs rw 0 0\n"
    )
    real_open = open
    monkeypatch.setattr(disk_module, "open", lambda path, *args: real_open(mounts), raising=False)
    assert is_node_local("/scratch/x") and not is_node_local("/home/me/cache")
    assert is_node_local("/home/a b/cache") and is_node_local("/homes")


def test_only_digests_are_joined_to_a_path(tmp_path):
    disk, secret = FileCache(tmp_path / "disk"), tmp_path / "secret"
    secret.write_bytes(b"secret")
    linked = "0" * 32
    (disk.root / "blobs" / linked).symlink_to(secret)
    for name in (str(secret), "../../secret", "", ".", f"{linked}.lock", linked[:-1] + "/"):
        with pytest.raises(DiskError, match="is no digest"), disk.opened(name, 0):
            pass
    with pytest.raises(OSError), disk.opened(linked, 0):
        pass
