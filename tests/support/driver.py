"""A run in a process of its own, for tests that kill.

``python -m tests.support.driver INPUT LOG OUTPUT [OPTION...]``

Its cluster has two worker processes; each batch notes its rows in the log before it is computed.
While there is a file ``LOG.broken``, every tenth row fails.
"""

from __future__ import annotations

import os
import sys
import time

import pandas as pd
from distributed import Client, LocalCluster

import dask_pcm as pcm

BATCH_ROWS = 10


def load(log):
    return log


def compute(frame, log):
    line = f"{os.getpid()} {','.join(map(str, frame['id']))}\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)
    if not os.path.exists(f"{log}.broken"):
        time.sleep(0.02)
    elif (frame["id"] % 10 == 3).any():
        raise ValueError("a broken row")
    return pd.DataFrame({"id": frame["id"], "twice": frame["id"] * 2})


def main(folder, log, out, *options):
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        verdicts = pcm.map_partitions(
            compute,
            pcm.read_parquet(folder),
            context=pcm.Context(load, log),
            meta={"id": "i8", "twice": "i8"},
            batch_rows=BATCH_ROWS,
        )
        given = dict.fromkeys(options, True)
        pcm.write_parquet(verdicts, out, client=client, progress=False, **given)


if __name__ == "__main__":
    main(*sys.argv[1:])
