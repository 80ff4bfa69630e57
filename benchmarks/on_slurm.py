"""What drills on a real Slurm share: its commands, two systems to be drilled, and an outside count.

"Ours" is ``PoolCluster`` and ``write_parquet``. "Jobqueue" is plain dask-jobqueue, which adapts to
a fixed number of jobs, loads the model in a worker plugin and has a task for each file.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from dask_jobqueue import SLURMCluster
from distributed import Client, Worker, WorkerPlugin, as_completed, get_worker

import dask_pcm as pcm
from benchmarks.table import Rows
from benchmarks.work import BATCH_ROWS, META, infer_wait, load_wait

PATIENCE_S = 180.0
#: A drill with more runnable processes a core than this is void.
MAX_RUNNABLE = 2.0
_MEMORY = "600 MiB"


def said(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def queue(states: str = "PD,R", what: str = "%i") -> set[str]:
    return set(said("squeue", "--noheader", "--array", f"--states={states}", f"--format={what}"))


def node_of(job: str) -> str:
    """The node of a running job; "" if it runs no more."""
    command = ["squeue", "--noheader", "--array", f"--jobs={job}", "--states=R", "--format=%N"]
    found = subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()
    return found[0] if found else ""


def owner(node: str, seconds: int) -> str:
    """A job of the owners, which preempts what is on a node; its id."""
    options = ["-p", "owners", f"--nodelist={node}", "--exclusive", "--mem=100", "-o/dev/null"]
    return said("sbatch", "--parsable", *options, "--wrap", f"sleep {seconds}")[0]


def seconds_until(is_so: Callable[[], Any]) -> float:
    """Seconds that something takes; NaN if it takes too long."""
    begun = time.monotonic()
    while not is_so():
        if time.monotonic() - begun > PATIENCE_S:
            return float("nan")
        time.sleep(0.02)
    return time.monotonic() - begun


def workers(client: Client) -> set[str]:
    """Addresses of the workers: those that come again have others."""
    return set(client.scheduler_info(n_workers=-1)["workers"])


def pool(**options: Any) -> pcm.Pool:
    return pcm.Pool(queue="opportunistic", memory=_MEMORY, **options)


@contextmanager
def cluster(**pools: pcm.Pool) -> Iterator[tuple[pcm.PoolCluster, Client]]:
    with pcm.PoolCluster(pools) as pool_cluster, Client(pool_cluster) as client:
        yield pool_cluster, client


class Job(Protocol):
    """A job that is under way; its function notes every batch in `log`."""

    out: Path
    log: Path

    def n_done(self) -> int:
        """Rows whose results are safe."""

    def wait(self) -> None: ...

    def cancel(self) -> None: ...


class OurJob:
    def __init__(self, client: Client, folder: Path, scratch: Path, name: str, **how: Any) -> None:
        self.out, self.log = scratch / name, scratch / f"{name}.log"
        answers = pcm.map_partitions(
            how.get("infer", infer_wait),
            pcm.read_parquet(folder),
            context=pcm.Context(how.get("load", load_wait), str(self.log)),
            meta=META,
            batch_rows=BATCH_ROWS,
        )
        self.run = pcm.write_parquet(answers, self.out, client=client, progress=False, wait=False)

    def n_done(self) -> int:
        return self.run.progress.done

    def wait(self) -> None:
        self.run.wait()

    def cancel(self) -> None:
        self.run.cancel()


class Loaded(WorkerPlugin):  # type: ignore[misc] # untyped
    """Loads the model when the worker starts, as Dask's documentation shows it."""

    name = "loaded"

    def __init__(self, log: str) -> None:
        self._log = log

    def setup(self, worker: Worker) -> None:
        self.model = load_wait(self._log)


def whole_file(file: str, out: str, infer: Callable[..., pd.DataFrame]) -> int:
    """The task of plain Dask: read a file, call the function by batches, write the answers."""
    model = get_worker().plugins["loaded"].model
    frame = pd.read_parquet(file)
    starts = range(0, len(frame), BATCH_ROWS)
    parts = [infer(frame.iloc[at : at + BATCH_ROWS], model) for at in starts]
    pd.concat(parts).to_parquet(Path(out) / Path(file).name, index=False)
    return len(frame)


class PlainJob:
    def __init__(self, client: Client, folder: Path, scratch: Path, name: str, **how: Any) -> None:
        self.out, self.log = scratch / name, scratch / f"{name}.log"
        self.out.mkdir()
        client.register_plugin(Loaded(str(self.log)))
        files = sorted(map(str, folder.glob("*.parquet")))
        self._futures = client.map(
            whole_file,
            files,
            out=str(self.out),
            infer=how.get("infer", infer_wait),
            pure=False,
        )
        self._n_done = 0
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        found = as_completed(self._futures, with_results=True, raise_errors=False)
        for future, n_rows in found:
            if future.status == "finished":
                self._n_done += n_rows

    def n_done(self) -> int:
        return self._n_done

    def wait(self) -> None:
        for future in self._futures:
            future.exception()

    def cancel(self) -> None:
        for future in self._futures:
            future.cancel()


@contextmanager
def ours(n_jobs: int) -> Iterator[tuple[Client, type[OurJob]]]:
    with cluster(any=pool(gpus_per_job=1)) as (pools, client):
        pools.scale(n_jobs)
        yield client, OurJob


@contextmanager
def jobqueue(n_jobs: int) -> Iterator[tuple[Client, type[PlainJob]]]:
    with (
        SLURMCluster(
            queue="opportunistic",
            cores=1,
            processes=1,
            memory=_MEMORY,
            walltime="01:00:00",
            job_extra_directives=["--gres=gpu:1"],
            log_directory=os.environ["DASK_PCM_HOME"],
            scheduler_options={"dashboard_address": ":0"},
        ) as plain,
        Client(plain) as client,
    ):
        plain.adapt(minimum=n_jobs, maximum=n_jobs, interval="1s")
        yield client, PlainJob


SYSTEMS: dict[str, Callable[[int], Any]] = {"ours": ours, "jobqueue": jobqueue}


def n_computed(log: Path) -> Counter[int]:
    """How often each row was computed, by what the function itself has noted."""
    lines = log.read_text().splitlines()
    return Counter(int(i) for line in lines for i in line.split()[-1].split(","))


def count(rows: Rows, job: Job, n_rows: int, n_twice: str, who: str) -> int:
    """Add what was lost and what was done twice, counted outside; return the latter."""
    found = pd.read_parquet(job.out).id
    twice = n_computed(job.log).total() - n_rows
    rows.add(f"… rows lost{who}", n_rows - found.nunique(), "" if who else "== 0")
    rows.add(f"… in the output twice{who}", len(found) - found.nunique(), "" if who else "== 0")
    rows.add(f"… computed twice, by an outside count{who}", twice, "" if who else n_twice)
    return twice


class Load:
    """Samples how many processes could run, a core, until it is closed."""

    def __init__(self) -> None:
        self._found: list[int] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._is_over.wait(0.25):
            running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
            self._found.append(int(running) - 1)  # this thread

    def close(self) -> float:
        """The mean of the samples."""
        self._is_over.set()
        self._thread.join()
        return sum(self._found) / max(1, len(self._found)) / (os.cpu_count() or 1)
