"""SIGINT to all processes of a group, as from Ctrl-C in a terminal and a notebook's stop button."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dask_pcm.plugins.interrupts import Ignored, Interrupts, uninterrupted
from tests.support.patience import until
from tests.support.signals import heed_interrupts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("how", ["plain", "preloaded"])
def test_workers_outlive_an_interrupt_and_the_same_call_is_resumed(claims, tmp_path, how):
    """The client is interrupted; its workers, what starts them and what they run are not."""
    command = [sys.executable, "-m", "tests.support.interrupted", claims(), str(tmp_path / "out")]
    with subprocess.Popen(
        [*command, how],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    ) as script:
        killer = threading.Timer(150, os.killpg, (script.pid, signal.SIGKILL))
        killer.start()
        assert script.stdout is not None
        interrupted, facts = [], {}
        for line in script.stdout:
            facts = json.loads(line)
            if facts.get("waits") == "run":
                wait_for_parts(tmp_path / "out")
            if "waits" in facts:
                os.killpg(script.pid, signal.SIGINT)
            interrupted += [facts["interrupted"]] if "interrupted" in facts else []
        assert script.wait() == 0
        killer.cancel()
    assert interrupted == (["before install"] if how == "preloaded" else []) + ["run"]
    assert facts["is_alive"] and facts["rows"] == 200
    assert 0 < facts["rows_resumed"] < 200


def wait_for_parts(folder):
    # One is empty: it has the schema.
    until(lambda: len(list(folder.glob("*.parquet"))) > 1, 60, "parts are there")


def mask():
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_what_a_thread_of_nannies_starts_is_not_interrupted():
    one, other = object(), object()

    def of_nannies():
        mine = Interrupts()
        mine.block(one)
        mine.block(other)
        mine.unblock(one)
        mine.unblock(one)
        is_blocked = signal.SIGINT in mask()
        mine.unblock(other)
        return is_blocked, signal.SIGINT in mask()

    assert in_thread(of_nannies) == (True, False)


def test_the_main_thread_is_the_users():
    mine = Interrupts()
    mine.block(mine)
    assert signal.SIGINT not in mask()
    with uninterrupted():
        assert signal.SIGINT in mask()
    assert signal.SIGINT not in mask()


def test_a_thread_that_had_it_blocked_keeps_it_so():
    def of_user():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        mine = Interrupts()
        mine.block(mine)
        mine.unblock(mine)
        return signal.SIGINT in mask()

    assert in_thread(of_user)


def test_a_worker_gets_its_former_handler_back():
    before = signal.getsignal(signal.SIGINT)
    try:
        ignored = Ignored()
        ignored.begin()
        ignored.begin()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        ignored.end()
        assert signal.getsignal(signal.SIGINT) is before
        ignored.begin()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # somebody else's, since
        ignored.end()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
