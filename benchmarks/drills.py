"""Drills on a real Slurm: jobs that are preempted, killed, cancelled and held back.

Slurm runs on this machine (``tests/support/slurm.py``), as root, with jobs in control groups. The
job is the main job's: 20,000 rows, a load of 3 s, 40 ms for 32 rows. Each drill has a cluster of
its own; the batch system is asked every second. ``--systems jobqueue`` runs plain dask-jobqueue
through the drills that it has something to do in. A drill with more than two runnable processes a
core is void.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pandas as pd
import psutil

from benchmarks.on_slurm import (
    MAX_RUNNABLE,
    PATIENCE_S,
    SYSTEMS,
    Job,
    Load,
    OurJob,
    cluster,
    count,
    n_computed,
    node_of,
    owner,
    pool,
    queue,
    said,
    seconds_until,
    workers,
)
from benchmarks.table import Rows, parser
from benchmarks.work import (
    BATCH_ROWS,
    BATCH_S,
    LOAD_S,
    N_BATCHES,
    N_FILES,
    N_ROWS,
    ROWS_PER_FILE,
    infer_wait,
    load_wait,
    note,
    write_input,
)
from tests.support import slurm

ROOT = Path(__file__).parent.parent
#: Mean life of a worker in the drill of continuous preemption, and how long the owners stay.
LIFE_S, STAY_S = 30.0, 2
#: … and seconds of a batch there, besides those of the main job.
LONG_S = 0.3
#: What workers import as they start: what the job needs, which has no model of torch.
IMPORTS = ["dask.dataframe"]
#: Seconds of a batch of 32 rows on three devices.
SPEEDS_S = {"h100": 0.3, "a10": 0.6, "titanx": 1.2}


def preempted(rows: Rows, folder: Path, scratch: Path, system: str) -> None:
    """Every worker is preempted once during the job."""
    who = "" if system == "ours" else f": {system}"
    with SYSTEMS[system](3) as (client, begin):  # each on a node of its own
        client.wait_for_workers(3, timeout=PATIENCE_S)
        job = begin(client, folder, scratch, f"preempted-{system}")
        seconds_until(lambda: job.n_done() > 2000)
        waits = []
        for one in sorted(queue("R")):
            if not (node := node_of(one)):  # it has been given back meanwhile
                continue
            before = queue()
            theirs = owner(node, 20)
            waits.append(seconds_until(lambda: queue() - before - {theirs}))  # noqa: B023
            seconds_until(lambda: one not in queue("R"))  # noqa: B023
            said("scancel", theirs)
        job.wait()
    rows.add(
        f"every worker preempted once: asked for → replacement queued, s, the longest{who}",
        max(waits, default=float("nan")),
        "" if who else "<= 1.5",
    )
    twice = count(rows, job, N_ROWS, "== 0", who)
    if isinstance(job, OurJob):
        rows.add("… by the report, off it by", job.run.report.rows_recomputed - twice, "== 0")


def lost(rows: Rows, folder: Path, scratch: Path, system: str) -> None:
    """The process of a job is killed without a word."""
    who = "" if system == "ours" else f": {system}"
    with SYSTEMS[system](2) as (client, begin):
        client.wait_for_workers(2, timeout=PATIENCE_S)
        job = begin(client, folder, scratch, f"lost-{system}")
        seconds_until(lambda: job.n_done() > 2000)
        before, there = queue(), workers(client)
        # Nanny and worker at once, as a node that is lost: a signal by Slurm would be a notice.
        for pid in next(iter(client.run(_up_to_nanny).values())):
            os.kill(pid, signal.SIGKILL)
        rows.add(
            f"a job killed without notice → replacement queued, s{who}",
            seconds_until(lambda: queue() - before),
            "" if who else "<= 3",
        )
        begins = seconds_until(lambda: workers(client) - there)
        rows.add(f"… replacement registered, s after it was queued{who}", begins)
        if isinstance(job, OurJob):
            loads = seconds_until(lambda: job.run.progress.n_warm == 2)
            rows.add("… and warm, s after that (its load takes 3)", loads, f"<= {LOAD_S + 3}")
        job.wait()
    twice = count(rows, job, N_ROWS, f"<= {2 * BATCH_ROWS}", who)
    if isinstance(job, OurJob):
        rows.add("… by the report, off it by", job.run.report.rows_recomputed - twice, "== 0")


def _up_to_nanny() -> list[int]:
    """This worker's process, and those that it descends from up to its nanny, which is first."""
    found = [os.getpid()]
    for process in psutil.Process().parents():  # a fork server may be between them
        found.insert(0, process.pid)
        if "dask_worker" in " ".join(process.cmdline()):
            break
    return found


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
        run = OurJob(client, folder, scratch, "pending").run
        waits = seconds_until(lambda: "1 pending" in run.progress.lack)
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
        run = OurJob(client, folder, scratch, "adaptive").run
        most = 0
        while run.progress.state not in ("finished", "failed"):
            most = max(most, len(workers(client)))
            time.sleep(0.1)
        rows.add("adapt(0, 4) on a run of 20,000 rows: workers", most, ">= 4")
        rows.add("… s", time.monotonic() - begun)
        rows.add(
            "… jobs gone after the run, s (idle timeout 3 s)", seconds_until(lambda: not queue())
        )


def owners(rows: Rows, folder: Path, scratch: Path) -> None:
    """The owners take all nodes for 30 s; a notice comes 10 s before."""
    folder = folder.with_name("long")
    if not folder.exists():
        write_input(folder, n_files=4 * N_FILES)
    with cluster(any=pool(gpus_per_job=1)) as (pools, client):
        pools.scale(3)
        client.wait_for_workers(3, timeout=PATIENCE_S)
        job = OurJob(client, folder, scratch, "owners")
        seconds_until(lambda: job.n_done() > 2000)
        before, theirs = queue(), [owner(node, 600) for node in slurm.NODES]
        seconds_until(lambda: set(theirs) <= queue("R"))
        taken = time.monotonic()
        seconds_until(lambda: job.run.progress.lack)
        told = job.run.progress.lack
        rows.add("owners take all nodes: said what is waited for, s", time.monotonic() - taken)
        print("  ", told)
        time.sleep(max(0.0, 30 - (time.monotonic() - taken)))
        n_before = len(n_computed(job.log))
        said("scancel", *theirs)
        seconds_until(lambda: queue("R") - before - set(theirs))
        begun = time.monotonic()
        registers = seconds_until(lambda: workers(client))
        seconds_until(lambda: len(n_computed(job.log)) > n_before)
        works = time.monotonic() - begun
        rows.add("… first job starts → its worker registered, s", registers)
        rows.add(
            "… → first rows, s after registration and a load of 3 s",
            works - registers - LOAD_S,
            "<= 3",
        )
        job.wait()
    twice = count(rows, job, 4 * N_ROWS, "== 0", "")
    rows.add("… by the report, off it by", job.run.report.rows_recomputed - twice, "== 0")


def _wait_by_device(frame: pd.DataFrame, log: str) -> pd.DataFrame:
    """A batch that takes as long as this device needs."""
    note(log, frame["id"])
    time.sleep(float(os.environ["DRILL_BATCH_S"]) * len(frame) / BATCH_ROWS)
    return pd.DataFrame({"id": frame["id"], "answer": frame["id"] * 0.5})


def speeds(rows: Rows, folder: Path, scratch: Path) -> None:
    """Three pools of different speeds; the bound is of a plain loop."""
    frame = pd.read_parquet(min(folder.glob("*.parquet")))[:BATCH_ROWS]
    per_s = 0.0
    for batch_s in SPEEDS_S.values():
        os.environ["DRILL_BATCH_S"] = str(batch_s)
        begun = time.monotonic()
        for _ in range(5):
            _wait_by_device(frame, str(scratch / "alone.log"))
        per_s += 5 / (time.monotonic() - begun)
    bound_s = LOAD_S + N_BATCHES / per_s
    made = {
        kind: pool(gpus_per_job=1, gpu_type=kind, prologue=(f"export DRILL_BATCH_S={batch_s}",))
        for kind, batch_s in SPEEDS_S.items()
    }
    with cluster(**made) as (pools, client):
        pools.scale(dict.fromkeys(made, 1))
        client.wait_for_workers(3, timeout=PATIENCE_S)
        begun = time.monotonic()
        job = OurJob(client, folder, scratch, "speeds", infer=_wait_by_device)
        job.wait()
        rows.add(
            "three pools of 0.3, 0.6 and 1.2 s a batch: finish over the bound",
            (time.monotonic() - begun) / bound_s,
            "<= 1.15",
        )
    count(rows, job, N_ROWS, "== 0", "")


def _infer_long(frame: pd.DataFrame, log: str) -> pd.DataFrame:
    """A batch of a larger model."""
    note(log, frame["id"])
    time.sleep(LONG_S * len(frame) / BATCH_ROWS)
    return pd.DataFrame({"id": frame["id"], "answer": frame["id"] * 0.5})


def churn(
    rows: Rows, folder: Path, scratch: Path, system: str, minutes: float, batch_s: float
) -> None:
    """Continuous preemption: workers live 30 s in the mean, and the owners leave at once.

    What could be done is each worker's life from registration and load to its end, at `batch_s`
    seconds for 32 rows.
    """
    infer = infer_wait if batch_s == BATCH_S else _infer_long
    who = "" if system == "ours" else f": {system}"
    chance, due, lives = random.Random(0), dict[str, float](), dict[str, list[float]]()
    folder = folder.with_name(f"many-{batch_s}")
    if not folder.exists():
        write_input(folder, n_files=int(minutes * 60 * 3 * BATCH_ROWS / batch_s / ROWS_PER_FILE))
    with SYSTEMS[system](3) as (client, begin):
        client.wait_for_workers(3, timeout=PATIENCE_S)
        job: Job = begin(client, folder, scratch, f"churn-{system}", infer=infer)
        begun = time.monotonic()
        theirs: set[str] = set()
        while (now := time.monotonic()) < begun + minutes * 60:
            for worker in workers(client):
                lives.setdefault(worker, [now, now])[1] = now
            for one in queue("R") - theirs:
                if one not in due:
                    due[one] = now + chance.expovariate(1 / LIFE_S)
                elif now > due[one] and (node := node_of(one)):
                    due[one] = float("inf")
                    theirs.add(owner(node, STAY_S))
            time.sleep(0.2)
        could = sum(max(0.0, end - max(start, begun) - LOAD_S) for start, end in lives.values())
        n_done, computed = job.n_done(), n_computed(job.log)
        if isinstance(job, OurJob):  # what is journalled is safe, too
            n_done = len(computed) - 2 * BATCH_ROWS * len(workers(client))
        job.cancel()
    print(f"   {len(theirs)} preemptions, {len(lives)} workers, {could:.0f} s of work possible")
    rows.add(
        f"continuous preemption, {batch_s:g} s a batch: rows done over possible{who}",
        n_done / (could * BATCH_ROWS / batch_s),
        "" if who else ">= 0.9",
    )
    rows.add(f"… preemptions{who}", len(theirs))
    rows.add(f"… rows computed twice{who}", computed.total() - len(computed), "" if who else "== 0")


def _load_noted(log: str) -> Any:
    """The context of the main job; each load is noted."""
    note(f"{log}.loads", [0])
    return load_wait(log)


def notebook(folder: str, scratch: str) -> None:
    """What a notebook runs, in a process of its own."""
    with cluster(any=pool(gpus_per_job=1)) as (pools, client):
        pools.scale(2)
        OurJob(client, Path(folder), Path(scratch), "kernel", load=_load_noted).wait()


def kernel(rows: Rows, folder: Path, scratch: Path) -> None:
    """The notebook's kernel is killed."""
    command = [sys.executable, "-m", "benchmarks.drills", "--notebook", str(folder), str(scratch)]
    log = scratch / "kernel.log"

    def loads() -> int:
        return len(Path(f"{log}.loads").read_text().splitlines())

    with subprocess.Popen(command, cwd=ROOT) as process:
        seconds_until(lambda: log.exists() and len(n_computed(log)) > 4000)
        n_loads, theirs = loads(), psutil.Process(process.pid).children(recursive=True)
        process.kill()
        gone = seconds_until(lambda: not queue())
    rows.add("notebook's kernel killed: jobs gone, s", gone, "<= 90")
    rows.add("… loads meanwhile", loads() - n_loads, "== 0")
    rows.add(
        "… processes of its left on the machine", len(psutil.wait_procs(theirs, 30)[1]), "== 0"
    )
    n_before = len(n_computed(log))
    subprocess.run(command, cwd=ROOT, check=True, timeout=2 * PATIENCE_S)
    found = pd.read_parquet(scratch / "kernel").id
    computed = n_computed(log)
    rows.add("… run again: rows lost", N_ROWS - found.nunique(), "== 0")
    rows.add("… in the output twice", len(found) - found.nunique(), "== 0")
    rows.add(
        f"… computed twice, of {n_before:,}", computed.total() - N_ROWS, f"<= {4 * BATCH_ROWS}"
    )


#: Drills for any system, and for ours.
COMPARED: dict[str, Callable[..., None]] = {
    "preempted": preempted,
    "lost": lost,
    "churn": functools.partial(churn, batch_s=LONG_S),
    "churn-short": functools.partial(churn, batch_s=BATCH_S),
}
DRILLS: dict[str, Callable[..., None]] = {
    "pending": pending,
    "adaptive": adaptive,
    "owners": owners,
    "speeds": speeds,
    "kernel": kernel,
}


def drilled(name: str, rows: Rows, drill: Callable[..., None], made: str) -> None:
    """Run a drill; once more if it was void."""
    for is_last in (False, True):
        found, load = Rows(), Load()
        try:
            drill(found, scratch=Path(tempfile.mkdtemp(dir=made)))
        finally:
            runnable = load.close()
        found.add(f"… runnable processes a core ({name})", runnable, f"<= {MAX_RUNNABLE}")
        if runnable <= MAX_RUNNABLE or is_last:
            rows.extend(found.all)
            return
        print(f"{name}: void, once more")


def main() -> None:
    options = parser(__doc__)
    names = [*COMPARED, *DRILLS]
    options.add_argument("--only", nargs="+", choices=names, default=names)
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options.add_argument("--minutes", type=float, default=10.0, help="of continuous preemption")
    options.add_argument("--notebook", nargs=2, metavar=("INPUT", "SCRATCH"))
    args = options.parse_args()
    if args.notebook:
        return notebook(*args.notebook)
    if why := slurm.missing():
        print(f"not measured: there is no Slurm here ({why})")
        return None
    os.environ["DASK_PCM__POOLS__POLL_INTERVAL"] = "1s"
    os.environ["DASK_PCM__WORKER__IMPORTS"] = repr(IMPORTS)
    os.environ["PYTHONPATH"] = str(ROOT)
    rows = Rows()
    with (
        tempfile.TemporaryDirectory(prefix="pcm-drills-") as made,
        slurm.running(Path(made, "slurm")) as conf,
        dask.config.set({"pcm.pools.poll-interval": "1s", "pcm.worker.imports": IMPORTS}),
    ):
        os.environ |= {"SLURM_CONF": str(conf), "DASK_PCM_HOME": str(Path(made, "home"))}
        folder = Path(made, "claims")
        write_input(folder)
        for name in args.only:
            drill = functools.partial(COMPARED.get(name) or DRILLS[name], folder=folder)
            if name.startswith("churn"):
                drill = functools.partial(drill, minutes=args.minutes)
            for system in args.systems if name in COMPARED else ["ours"]:
                if name in COMPARED:
                    drill = functools.partial(drill, system=system)
                drilled(f"{name}, {system}", rows, drill, made)
    rows.write(args.json)
    return None


if __name__ == "__main__":
    main()
