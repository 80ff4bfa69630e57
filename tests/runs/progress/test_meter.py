from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest

from dask_pcm.runs.progress.meter import line
from dask_pcm.runs.progress.progress import Progress

NOW = Progress("running", 4_500, 10_000, "rows", 123, 1_100.0, 2, 4, 5)


@pytest.mark.parametrize("width", range(1, 120))
def test_fields_are_left_out_and_never_cut(width):
    text = line(NOW, width)
    assert len(text) <= width
    whole = ("4,500/10,000 rows", "45%", "123 failed", "1,100/s", "ETA 5 s", "2/4 warm", "5 loads")
    for field in re.sub("[━─]+ ?", "", text).split(", "):
        assert field in (*whole, "")


def test_there_is_one_eta_and_none_where_nothing_goes_on():
    assert line(NOW).count("ETA") == 1
    paused = Progress("paused", 4_500, 10_000, failed=123, per_s=1_100.0)
    assert line(paused).startswith("paused, 4,500/10,000 rows, 45%, 123 failed")
    for text in (line(paused), line(NOW, note="no workers"), line(Progress("running", 0, 9))):
        assert "ETA" not in text
    assert "/s" not in line(paused) and "warm" not in line(NOW, note="no workers")


@pytest.mark.parametrize(("done", "total"), [(9_999, 10_000), (10_000, 10_000), (0, 0)])
def test_100_per_cent_is_the_end(done, total):
    text = line(Progress("running", done, total, per_s=1.0), 100)
    assert ("100%" in text) is (done == total)
    assert ("─" not in text) is (done == total) and ("ETA" not in text) is (done == total)


SCRIPT = """
from dask_pcm.runs.progress.meter import meter
from dask_pcm.runs.progress.progress import Progress
with meter(True) as shown:
    for done in (0, 4_500, 10_000):
        shown.show(Progress("running", done, 10_000, "rows", 123, 1_100.0, 2, 4, 5))
"""


@pytest.mark.parametrize("columns", [40, 80])
def test_on_a_terminal(columns):
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=slave, env=environment) as shows:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal is gone when the process is
            while chunk := os.read(master, 4096):
                shown += chunk
    os.close(master)
    assert shows.returncode == 0
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "\n", shown.decode())
    lines = [text.strip() for text in re.split(r"[\r\n]+", plain) if text.strip()]
    assert len(lines) >= 3 and all(len(text) <= columns and "…" not in text for text in lines)
    assert all("123 failed" in text for text in lines)
    assert "10,000/10,000 rows" in lines[-1] and "100%" in lines[-1]


def test_a_run_that_has_no_worker_yet_says_so():
    waits = Progress("running", 0, 40)
    assert line(waits) == "0/40 rows, 0%, 0 failed, 0/s, waiting for workers, 0 loads"
    assert "workers" not in line(waits, note="waiting for jobs: h100: 4 pending")
    assert "0/0 warm" in line(Progress("finished", 40, 40))
