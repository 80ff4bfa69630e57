"""The clock of a call, in processes that it may end."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
import ctypes, os, sys, threading
from dask_pcm.plugins.worker import deadline
from dask_pcm.plugins.worker.deadline import in_time, ruled, stopped
deadline._may_end = lambda: True  # as in a worker that has a nanny
told = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def wait(seconds): threading.Event().wait(seconds)
"""
ENDED = {
    "a call that waits": "with in_time(0.3): wait(60)",
    "with Python's lock held": "with in_time(0.3): ctypes.PyDLL(None).sleep(60)",
    "as the rule on the thread says": "with ruled(0.3, told), in_time(None): wait(60)",
    "of two calls, the one that ends first": """
        def other():
            with in_time(30): wait(60)
        threading.Thread(target=other, daemon=True).start()
        with ruled(0.3, told), in_time(None): wait(60)
    """,
    "once it goes on": """
        with ruled(0.5, told), in_time(None):
            with stopped(): wait(1.0)
            wait(60)
    """,
}
LEFT = {
    "a call that ends in time": "with in_time(0.5): pass\nwait(1.0)",
    "one that raises in time": """
        try:
            with in_time(0.5): raise KeyError
        except KeyError:
            wait(1.0)
    """,
    "no limit": "with in_time(None): wait(0.1)",
    "one that waits for others": """
        with in_time(0.5):
            with stopped(): wait(1.0)
    """,
    "a rule that is over": "with ruled(0.5, told): pass\nwith in_time(None): wait(1.0)",
}


FORKING = """
import json
for number, code in enumerate(json.loads(sys.argv[2])):
    if os.fork() == 0:
        exec(code)
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.wait()[1]), os.fstat(told).st_size, flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """For each call, the code with which its process ended, and how much the file was told."""
    codes = {name: textwrap.dedent(code) for name, code in {**ENDED, **LEFT}.items()}
    log = tmp_path_factory.mktemp("deadline") / "log"
    command = [sys.executable, "-c", PREAMBLE + FORKING, log, json.dumps(list(codes.values()))]
    done = subprocess.run(command, capture_output=True, timeout=100, text=True)
    assert "Error" not in done.stderr, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    return dict(zip(codes, found, strict=True)), log.read_text()


@pytest.mark.parametrize("name", ENDED)
def test_it_ends_the_process(outcomes, name):
    assert outcomes[0][name][0] == 1


@pytest.mark.parametrize("name", LEFT)
def test_it_leaves_alone(outcomes, name):
    assert outcomes[0][name][0] == 7


def test_it_says_where_it_was(outcomes):
    found, said = outcomes
    assert said.startswith("Timeout (") and said.count("Timeout (") == 3
    assert said.count(" in wait") >= 3
    assert found["a call that waits"][1] == 0 < found["as the rule on the thread says"][1]
