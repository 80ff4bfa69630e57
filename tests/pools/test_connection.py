"""The folders of clusters: made for this user alone, and not left behind."""

from __future__ import annotations

import subprocess
import sys

from dask_pcm.pools.connection import Connection

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
