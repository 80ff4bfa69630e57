"""An output at which a run is at work, and a small part for it."""

from __future__ import annotations

import contextlib

import pyarrow as pa

from dask_pcm.ledger.output import Output
from dask_pcm.ledger.parts import range_name

TABLE = pa.table({"x": [1, 2]})


OTHER = pa.table({"x": [9]})


NAME = range_name(0, 2)


NOTE = {"rows": 2, "failed": 0}


@contextlib.contextmanager
def at_work(output: Output, **says):
    with contextlib.ExitStack() as stack:
        with output.storage.fence.takeover_lock():
            stack.enter_context(output.storage.fence.open_run({"host": "here", **says}))
        yield output


def values(output, name=NAME):
    return output.read_table(name)["x"].to_pylist()
