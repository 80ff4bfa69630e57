"""A user's script that is interrupted, with all that its process has started: see the test.

Says in lines what it does, and what came of it at the end, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import dask
from distributed import Client, LocalCluster

import dask_pcm as pcm


def load():
    return "model"


def slow(frame, model):
    time.sleep(0.01 * len(frame))
    return frame[["id"]]


def say(**facts):
    print(json.dumps(facts), flush=True)


def wait_to_be_interrupted(what):
    try:
        say(waits=what)
        time.sleep(120)
    except KeyboardInterrupt:
        say(interrupted=what)


def main(given, out, is_preloaded):
    dask.config.set({"pcm.worker.imports": ["json"]})
    preload = ["dask_pcm.preload"] if is_preloaded else []
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", preload_nanny=preload
        ) as cluster,
        Client(cluster) as client,
    ):
        pids = client.run(os.getpid)
        if is_preloaded:
            wait_to_be_interrupted("before install")
        pcm.install(client)
        made = pcm.map_partitions(
            slow,
            pcm.read_parquet(given),
            context=pcm.Context(load),
            meta={"id": "i8"},
            batch_rows=5,
        )
        try:
            say(waits="run")
            pcm.write_parquet(made, out, progress=False)
        except KeyboardInterrupt:
            say(interrupted="run")
        is_alive = client.run(os.getpid) == pids
        if is_preloaded:  # what starts workers lives, too
            os.kill(next(iter(pids.values())), signal.SIGKILL)
        report = pcm.write_parquet(made, out, progress=False).report
        say(is_alive=is_alive, rows=report.rows, rows_resumed=report.rows_resumed)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "preloaded")
