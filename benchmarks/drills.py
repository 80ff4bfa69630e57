"""Drills on a real Slurm of four nodes: jobs that are preempted, killed, cancelled and held back.

Slurm runs on this machine (``tests/support/slurm.py``), as root, with jobs in control groups. The
job is the main job's: 20,000 rows, a load of 3 s, 40 ms for 32 rows. Each drill has a cluster of
its own; the batch system is asked every second. A table with more than two runnable processes a
core is void.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import pandas as pd
from distributed import Client

import dask_pcm as pcm
from benchmarks.table import Rows, parser
from benchmarks.work import BATCH_ROWS, LOAD_S, META, N_ROWS, infer_wait, load_wait, write_input
from tests.support import slurm

_PATIENCE_S = 180.0


def said(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def queue(states: str = "PD,R", what: str = "%i") -> set[str]:
    return set(said("squeue", "--noheader", "--array", f"--states={states}", f"--format={what}"))


def seconds_until(is_so: Callable[[], Any]) -> float:
    """Seconds that something takes; NaN if it takes too long."""
    begun = time.monotonic()
    while not is_so():
        if time.monotonic() - begun > _PATIENCE_S:
            return float("nan")
        time.sleep(0.02)
    return time.monotonic() - begun


def workers(client: Client) -> set[str]:
    return {str(w["name"]) for w in client.scheduler_info(n_workers=-1)["workers"].values()}


@contextmanager
def cluster(**pools: pcm.Pool) -> Iterator[tuple[pcm.PoolCluster, Client]]:
    with pcm.PoolCluster(pools) as pool_cluster, Client(pool_cluster) as client:
        yield pool_cluster, client


def pool(**options: Any) -> pcm.Pool:
    return pcm.Pool(queue="opportunistic", memory="600 MiB", **options)


def begin(client: Client, folder: Path, scratch: Path, name: str) -> tuple[pcm.Run, Path]:
    """Start the job, with an output and an event log of this name; the run and the log."""
    log = scratch / f"{name}.log"
    answers = pcm.map_partitions(
        infer_wait,
        pcm.read_parquet(folder),
        context=pcm.Context(load_wait, str(log)),
        meta=META,
        batch_rows=BATCH_ROWS,
    )
    run = pcm.write_parquet(answers, scratch / name, client=client, progress=False, wait=False)
    return run, log


def n_computed(log: Path) -> Counter[int]:
    """How often each row was computed, by what the function itself has noted."""
    lines = log.read_text().splitlines()
    return Counter(int(i) for line in lines for i in line.split()[-1].split(","))


def owner(node: str, seconds: int) -> str:
    """A job of the owners, which preempts what is on a node; its id."""
    options = ["-p", "owners", f"--nodelist={node}", "--exclusive", "--mem=100", "-o/dev/null"]
    return said("sbatch", "--parsable", *options, "--wrap", f"sleep {seconds}")[0]


def preempted(rows: Rows, folder: Path, scratch: Path) -> None:
    """Every worker is preempted once during the job."""
    with cluster(any=pool(gpus_per_job=1)) as (pools, client):
        pools.scale(3)  # each on a node of its own
        client.wait_for_workers(3, timeout=_PATIENCE_S)
        run, log = begin(client, folder, scratch, "preempted")
        seconds_until(lambda: run.progress.done > 2000)
        first = queue("R")
        waits = []
        for one in sorted(first):
            before = queue()
            (node,) = said("squeue", "--noheader", "--array", f"--jobs={one}", "--format=%N")
            theirs = owner(node, 20)
            waits.append(seconds_until(lambda: queue() - before - {theirs}))  # noqa: B023
            seconds_until(lambda: one not in queue("R"))  # noqa: B023
            said("scancel", theirs)
        run.wait()
    found = pd.read_parquet(scratch / "preempted").id
    computed = n_computed(log)
    rows.add("every worker preempted once: rows lost", N_ROWS - found.nunique(), "== 0")
    rows.add("… rows in the output twice", len(found) - found.nunique(), "== 0")
    rows.add("… rows computed twice, by an outside count", computed.total() - N_ROWS, "== 0")
    rows.add("… by the report", run.report.rows_recomputed, "== 0")
    rows.add("… preemption asked for → replacement queued, s, the longest", max(waits), "<= 1.5")


def lost(rows: Rows, folder: Path, scratch: Path) -> None:
    """The process of a job is killed without a word."""
    with cluster(any=pool()) as (pools, client):
        pools.scale(2)
        client.wait_for_workers(2, timeout=_PATIENCE_S)
        run, log = begin(client, folder, scratch, "lost")
        seconds_until(lambda: run.progress.done > 2000)
        before = queue()
        # Nanny and worker at once, as a node that is lost: a signal by Slurm would be a notice.
        nanny, worker = next(iter(client.run(lambda: (os.getppid(), os.getpid())).values()))
        os.kill(nanny, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        rows.add(
            "a job killed without notice → replacement queued, s",
            seconds_until(lambda: queue() - before),
            "<= 3",
        )
        begins = seconds_until(lambda: len(workers(client)) == 2)
        loads = seconds_until(lambda: run.progress.n_warm == 2)
        rows.add("… replacement registered, s after it was queued", begins)
        rows.add("… and warm, s after that (its load takes 3)", loads, f"<= {LOAD_S + 3}")
        run.wait()
    found = pd.read_parquet(scratch / "lost").id
    twice = n_computed(log).total() - N_ROWS
    rows.add("… rows lost; in the output twice", N_ROWS - found.nunique() + len(found) - N_ROWS)
    rows.add("… rows computed twice, by an outside count", twice, f"<= {2 * BATCH_ROWS}")
    rows.add(
        "… by the report, off the outside count by", run.report.rows_recomputed - twice, "== 0"
    )


def pending(rows: Rows, folder: Path, scratch: Path) -> None:
    """A pending job is cancelled outside; and a run is cancelled while there is no worker."""
    theirs = owner("h100n1", 600)
    seconds_until(lambda: theirs in queue("R"))
    with cluster(h100=pool(gpus_per_job=1, gpu_type="h100")) as (pools, client):
        pools.scale(1)
        seconds_until(lambda: queue("PD"))
        (waiting,) = queue("PD")
        said("scancel", waiting)
        rows.add(
            "a pending job cancelled outside → replaced, s (asked every 1 s)",
            seconds_until(lambda: queue("PD") - {waiting}),
            "<= 6",
        )
        run, _ = begin(client, folder, scratch, "pending")
        waits = seconds_until(
            lambda: "pending in" in run.progress.lack or "1 pending" in run.progress.lack
        )
        rows.add("… a run says which jobs it waits for, after s", waits)
        begun = time.monotonic()
        run.cancel()
        seconds_until(lambda: run.progress.state == "cancelled")
        rows.add("cancel while there is no worker, s", time.monotonic() - begun, "<= 5")
    said("scancel", theirs)


def adaptive(rows: Rows, folder: Path, scratch: Path) -> None:
    """``adapt`` on a run of 20,000 rows."""
    with cluster(any=pool(idle_timeout="3s")) as (pools, client):
        pools.adapt(maximum={"any": 4}, target_duration="1s")
        begun = time.monotonic()
        run, _ = begin(client, folder, scratch, "adaptive")
        most = 0
        while run.progress.state not in ("finished", "failed"):
            most = max(most, len(workers(client)))
            time.sleep(0.1)
        rows.add("adapt(0, 4) on a run of 20,000 rows: workers", most, ">= 4")
        rows.add("… s", time.monotonic() - begun)
        rows.add(
            "… jobs gone after the run, s (idle timeout 3 s)", seconds_until(lambda: not queue())
        )


DRILLS = {"preempted": preempted, "lost": lost, "pending": pending, "adaptive": adaptive}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=DRILLS, default=list(DRILLS))
    args = options.parse_args()
    if why := slurm.missing():
        print(f"not measured: there is no Slurm here ({why})")
        return
    os.environ.setdefault("DASK_PCM__WORKER__IMPORTS", "[]")
    rows = Rows()
    with (
        tempfile.TemporaryDirectory(prefix="pcm-drills-") as made,
        slurm.running(Path(made, "slurm")) as conf,
        dask.config.set({"pcm.pools.poll-interval": "1s", "pcm.worker.imports": []}),
    ):
        os.environ |= {"SLURM_CONF": str(conf), "DASK_PCM_HOME": str(Path(made, "home"))}
        scratch = Path(made)
        write_input(scratch / "claims")
        for name in args.only:
            DRILLS[name](rows, scratch / "claims", scratch)
        rows.add(
            "processes that could run, per core, at the end",
            os.getloadavg()[0] / (os.cpu_count() or 1),
        )
    rows.write(args.json)


if __name__ == "__main__":
    main()
