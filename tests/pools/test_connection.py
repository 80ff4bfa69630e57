"""The folders of clusters: made for this user alone, and not left behind."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import dask
import pytest

from dask_pcm.errors import PoolError
from dask_pcm.pools.connection import Connection, connect

MAKES = """\
from dask_pcm.pools.connection import Connection
print(Connection.make('a b', None).folder)
"""


def test_the_folder_of_a_cluster_that_was_killed_goes_with_the_next(home):
    command = [sys.executable, "-c", f"{MAKES}input()"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        others = other.stdout.readline().strip()
        mine = Connection.make("mine", None)
        there = {str(folder) for folder in (home / "clusters").iterdir()}
        assert there == {others, str(mine.folder)}  # it still works
        other.kill()
    elsewhere = home / "clusters" / "cluster-abc-999999999@another-host"
    elsewhere.mkdir()
    last = Connection.make("last", None)
    left = {folder.name for folder in (home / "clusters").iterdir()}
    assert left == {mine.folder.name, last.folder.name, elsewhere.name}


def test_that_a_cluster_was_killed_is_said_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    file = tmp_path / "connection.json"
    file.write_text(json.dumps({"address": address, "tls": {}}))
    # Longer than the test may take: only the refusal can end it.
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1h"}),
        pytest.raises(PoolError, match=f"does not answer at {address}: its process has ended"),
    ):
        connect(file)
