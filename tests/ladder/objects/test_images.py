"""Images in memory files: what outlives a process, and what frees it."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import mmap
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dask_pcm.ladder.objects.freeze import freeze
from dask_pcm.ladder.objects.host import LEAST_BYTES, Host, LocalKeeper
from dask_pcm.ladder.objects.images import Image
from dask_pcm.ladder.objects.shelf import Shelf
from tests.support.patience import patient, until


def model(n=256, seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(n, n), torch.nn.Linear(n, n))
    module[1].weight = module[0].weight
    return module


def keeper(n_bytes=1 << 30):
    """A keeper in this process."""
    return LocalKeeper(Shelf(n_bytes))


@pytest.mark.parametrize("is_mapped", [True, False])
def test_an_object_comes_back_from_its_image(is_mapped):
    value = {"model": model(), "array": np.arange(100_000)}
    image = Image.write(freeze(value))
    found, storages = image.thaw(is_mapped)
    image.close()
    rows = torch.randn(3, 256)
    assert torch.equal(value["model"](rows), found["model"](rows))
    assert found["model"][1].weight is found["model"][0].weight
    assert np.array_equal(value["array"], found["array"])
    assert [storage.resizable() for storage in storages] == [not is_mapped] * 3


def test_what_a_process_writes_to_it_is_its_own():
    host = Host(keeper())
    image = host.put("a", "a", freeze({"model": model(), "array": np.arange(100_000)}))
    one, _ = image.thaw(is_mapped=True)
    with torch.no_grad():
        one["model"][0].weight.zero_()
    one["array"][:] = 0
    two, _ = host.find("a").thaw(is_mapped=True)
    assert two["model"][0].weight.any()
    assert two["array"].any()


def test_an_image_cannot_be_changed_or_reached_by_others():
    image = Image.write(freeze(model()))
    for change in (
        lambda: os.pwrite(image.fd, b"x", 0),
        lambda: os.ftruncate(image.fd, 10),
        lambda: mmap.mmap(image.fd, 4096),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EPERM
    assert os.readlink(f"/proc/self/fd/{image.fd}").startswith("/memfd:dask_pcm")


def test_mapped_there_is_one_copy_of_it():
    """Two objects of one image: what they take besides, they take together."""

    def own_bytes():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        found = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
        return 1024 * (found["Private_Clean:"] + found["Private_Dirty:"])

    host = Host(keeper())
    image = host.put("a", "a", freeze(model(2048)))
    one, _ = image.thaw(is_mapped=True)
    rows = torch.ones(1, 2048)
    expected = one(rows)
    before = own_bytes()
    two, _ = host.find("a").thaw(is_mapped=True)
    assert torch.equal(two(rows), expected)
    assert own_bytes() - before < image.n_bytes / 4


def test_what_is_small_or_has_no_keeper_gets_none():
    apart = freeze(model())
    assert Host(keeper()).put("a", "a model", apart) is not None
    assert Host().put("a", "a model", apart) is None
    small = freeze(torch.nn.Linear(4, 4))
    assert small.n_bytes < LEAST_BYTES
    assert Host(keeper()).put("a", "a model", small) is None


@pytest.mark.parametrize(("n_bytes", "says"), [(0, "no room"), (1 << 30, "not here")])
def test_where_it_cannot_be_the_log_says_that_the_disk_serves(n_bytes, says, caplog, monkeypatch):
    if n_bytes:  # a kernel, or a container, without memory files

        def refuse(*args):
            raise OSError(errno.ENOSYS, "not here")

        monkeypatch.setattr(os, "memfd_create", refuse)
    with caplog.at_level(logging.WARNING):
        assert Host(keeper(n_bytes)).put("a", "a model", freeze(model())) is None
    assert "'a model'" in caplog.text and says in caplog.text and "disk" in caplog.text


def test_where_nobody_answers_the_log_blames_no_setting(caplog):
    class Drain(LocalKeeper):
        def keep(self, *args, **says):
            return None

    assert Host(Drain(Shelf(1 << 30))).put("a", "a model", freeze(model())) is None
    assert "no room" not in caplog.text and not caplog.records


def test_whoever_was_least_lately_used_makes_room():
    apart = freeze(model())
    size = Image.write(apart).n_bytes
    shelf = keeper(int(2.5 * size))
    host = Host(shelf)
    host.put("a", "a", apart)
    host.put("b", "b", apart)
    assert Host(shelf).find("a") is not None
    host.put("c", "c", apart)
    assert [Host(shelf).find(name) is not None for name in "abc"] == [True, False, True]
    host.drop("a")
    assert Host(shelf).find("a") is None


def test_a_file_that_is_another_contexts_is_not_taken(caplog):
    """The number of a descriptor may have been given to another file in between."""
    shelf = keeper()
    host = Host(shelf)
    host.put("a", "a", freeze(model()))
    monkey = Host(shelf)
    with pytest.raises(ValueError, match="of 'a', not of 'b'"):
        Image(os.open(shelf.find("a"), os.O_RDONLY), "b")
    kept = shelf._shelf._kept
    kept["b"] = kept["a"]
    assert monkey.find("b") is None
    assert monkey.find("a") is not None
    del kept["b"]
    n_open = len(os.listdir("/proc/self/fd"))
    assert not shelf.keep("c", shelf.find("a"), 17, True, False)  # who asked has closed it since
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_an_image_that_another_process_still_writes_is_not_found():
    """The keeper has it from before its first byte; its size is what it will be."""
    shelf, seen = keeper(), []

    class Watching(LocalKeeper):
        def keep(self, *args, **says):
            is_kept = super().keep(*args, **says)
            assert self.find("a") is not None
            seen.append(Host(shelf).find("a"))
            return is_kept

    host = Host(Watching(shelf._shelf))
    assert host.put("a", "a", freeze(model())) is not None
    assert seen == [None] and Host(shelf).find("a") is not None


def memory_files():
    """Descriptors of images; whatever else this process has open may close at any moment."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += [name] * ("memfd:dask_pcm" in os.readlink(f"/proc/self/fd/{name}"))
    return found


def test_shelves_do_not_leak_files():
    gc.collect()  # of other tests
    apart = freeze(model())
    before = memory_files()
    shelf = keeper()
    host = Host(shelf)
    for name in "aab":
        host.put(name, name, apart)
    Host(shelf).find("b")
    assert len(memory_files()) > len(before)
    del shelf, host
    assert memory_files() == before


def n_open():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few_files():
    """As of a process that may have 80 files open besides those that it has."""
    n_files, at_most = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 80, at_most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, at_most))


def test_what_is_mapped_needs_no_file():
    image = Image.write(freeze({"model": model(), "array": np.arange(100_000)}))
    before = len(memory_files())
    value, _ = image.thaw(is_mapped=True)
    assert len(memory_files()) == before - 1
    assert value["array"][-1] == 99_999
    maps = Path("/proc/self/maps")
    assert "memfd:dask_pcm" in maps.read_text()
    del value, _
    gc.collect()
    assert "memfd:dask_pcm" not in maps.read_text()


@pytest.mark.parametrize("is_mapped", [True, False])
def test_however_many_contexts_files_are_left_for_others(few_files, is_mapped, caplog):
    """Those that have no image live in their process alone."""
    shelf = keeper()
    host, lives = Host(shelf), []
    large = host.put("large", "large", freeze(model()))
    for number in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        apart = freeze(np.full(1 << 14, number))
        image = host.put(f"{number}", f"{number}", apart)
        lives.append(image.thaw(is_mapped)[0] if image is not None else None)
        with Path(os.devnull).open():
            pass
    assert [a[0] for a in lives if a is not None] == [
        n for n, a in enumerate(lives) if a is not None
    ]
    assert n_open() < resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 20
    # The smallest make room for others.
    assert large is not None and shelf.find("large") is not None
    assert all(a is not None for a in lives) == is_mapped
    assert ("Too many open files" in caplog.text) != is_mapped


def test_where_the_keeper_has_no_file_left_there_is_no_room(few_files, caplog):
    shelf = keeper()
    image = Image.write(freeze(model()))
    path, taken = f"/proc/self/fd/{image.fd}", []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    try:
        assert not shelf.keep("a", path, image.n_bytes, True, False)
        assert Host(shelf).put("a", "a", freeze(model())) is None
    finally:
        for fd in taken:
            os.close(fd)
    assert shelf.keep("a", path, image.n_bytes, True, False)


KEEPER = """
import os, sys, time
from dask_pcm.ladder.objects.shelf import Shelf
shelf = Shelf(1 << 30)
path, n_bytes = sys.stdin.readline().split()
shelf.keep("it", path, int(n_bytes))
print(shelf.find("it"), flush=True)
time.sleep(1000)
"""
WORKER = """
import os, sys, time, torch
from dask_pcm.ladder.objects.images import Image
from dask_pcm.ladder.objects.freeze import freeze
torch.manual_seed(0)
image = Image.write(freeze({"weight": torch.randn(64 << 20)}))
print(f"/proc/{os.getpid()}/fd/{image.fd}", image.n_bytes, flush=True)
time.sleep(1000)
"""


def shmem_bytes():
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return 1024 * int(line.split()[1])
    raise AssertionError


def test_it_outlives_its_process_but_not_its_keeper():
    """256 MiB in real processes, both killed; what is left of it is the kernel's to say."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", KEEPER], **options) as keeper,
        subprocess.Popen([sys.executable, "-c", WORKER], **options) as worker,
    ):
        try:
            made = worker.stdout.readline()
            keeper.stdin.write(made)
            keeper.stdin.flush()
            path = keeper.stdout.readline().strip()
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            image = Image(os.open(path, os.O_RDONLY))
            found, storages = image.thaw(is_mapped=True)
            torch.manual_seed(0)
            assert torch.equal(found["weight"], torch.randn(64 << 20))
            del found, storages
            image.close()
            before = shmem_bytes()
        finally:
            worker.kill()
            keeper.kill()
        keeper.wait()
        until(lambda: before - shmem_bytes() >= 200 << 20)


def test_a_small_dev_shm_does_not_matter(tmp_path):
    """As in a container: 64 MB of shared memory, an image of 256 MiB."""
    python = f"\"{sys.executable}\" -c '{WORKER.replace('time.sleep(1000)', '')}'"
    script = f"mount -t tmpfs -o size=64m none /dev/shm && {python}"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(60))
    if "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/proc/")
