"""Locks whose files are removed while others wait for them."""

from __future__ import annotations

import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from dask_pcm.ladder.files.locks import is_held, locked
from tests.support.patience import patient

AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB


def test_who_waited_for_a_file_that_was_removed_takes_its_successor(tmp_path):
    path, has_it = tmp_path / "lock", threading.Event()

    def wait():
        with locked(path, fcntl.LOCK_EX):
            has_it.set()

    waiting = threading.Thread(target=wait)
    with locked(path, fcntl.LOCK_EX):
        waiting.start()
        assert not has_it.wait(0.1)
        path.unlink()
        successor = locked(path, fcntl.LOCK_EX)
        successor.__enter__()
    assert not has_it.wait(0.2)
    successor.__exit__(None, None, None)
    assert has_it.wait(patient(10))
    waiting.join()


def test_never_two_hold_it_however_often_it_is_removed(tmp_path):
    path, inside, together = tmp_path / "lock", [], []

    def work(number):
        for turn in range(100):
            how = AT_ONCE if (number + turn) % 3 == 0 else fcntl.LOCK_EX
            with suppress(BlockingIOError), locked(path, how):
                inside.append(number)
                together.append(len(inside))
                inside.remove(number)
                path.unlink()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert set(together) == {1}


def test_whether_it_is_held(tmp_path):
    path = tmp_path / "lock"
    with locked(path, fcntl.LOCK_EX):
        assert is_held(path)
        with pytest.raises(BlockingIOError), locked(path, AT_ONCE):
            raise AssertionError
    with locked(path, fcntl.LOCK_SH):
        assert not is_held(path)
    with pytest.raises(FileNotFoundError):
        is_held(tmp_path / "none")
