"""The contract of an output is tested in a folder and in object stores."""

from __future__ import annotations

import pytest

from dask_pcm.ledger.output import Output
from dask_pcm.ledger.storage.folder import Folder
from dask_pcm.ledger.storage.objects import Objects
from tests.support.outputs import at_work


@pytest.fixture(params=["folder", "conditional put", "lock files", "files by URL"])
def output(request, tmp_path):
    """An output at which a run is at work."""
    if request.param == "folder":
        made = Output(Folder(str(tmp_path / "out"), "first"))
    elif request.param == "files by URL":  # as over SFTP: names are those of files
        url = f"local://{tmp_path}/store/out"
        made = Output(Objects.at(url, str(tmp_path / "locks"))).as_run("first")
    else:
        bucket = request.getfixturevalue("bucket")
        locks = str(tmp_path / "locks") if request.param == "lock files" else None
        made = Output(Objects.at(f"{bucket}/out", locks)).as_run("first")
    with at_work(made):
        yield made
