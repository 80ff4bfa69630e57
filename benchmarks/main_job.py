"""The main job against the same work in bare processes, naive Dask, and dying workers.

20,000 rows in 100 Parquet files of 200, two worker processes, a context that takes 3 s to load,
batches of up to 32 rows that take 40 ms x rows / 32. Every ratio is measured side by side.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster

import dask_pcm as pcm
from benchmarks import bare
from benchmarks.table import Rows, median, parser
from benchmarks.work import (
    BATCH_ROWS,
    BATCH_S,
    KINDS,
    LOAD_S,
    META,
    N_BATCHES,
    N_ROWS,
    cpu_per_batch,
    infer_wait,
    load_wait,
    read_log,
    rows_twice,
    write_input,
)


@contextmanager
def cluster(with_gate: bool = True) -> Iterator[Client]:
    """Two worker processes of one thread, ready."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=0
        ) as local,
        Client(local) as client,
    ):
        if with_gate:
            pcm.install(client)
        yield client


def job(kind: str, folder: Path, log: Path) -> dd.DataFrame:
    load, infer = KINDS[kind]
    context = pcm.Context(load, str(log))
    claims = pcm.read_parquet(str(folder))
    return pcm.map_partitions(infer, claims, context=context, meta=META, batch_rows=BATCH_ROWS)


def ours(kind: str, folder: Path, log: Path, out: Path) -> tuple[float, pcm.Report]:
    """Wall seconds from workers ready to files written."""
    start = time.monotonic()
    run = pcm.write_parquet(job(kind, folder, log), out, progress=False)
    return time.monotonic() - start, run.report


def naive_task(file: str, log: str, out: str) -> int:
    live = load_wait(log)
    frame = pd.read_parquet(file)
    parts = [
        infer_wait(frame.iloc[at : at + BATCH_ROWS], live)
        for at in range(0, len(frame), BATCH_ROWS)
    ]
    pd.concat(parts).to_parquet(Path(out) / Path(file).name)
    return len(frame)


def naive(folder: Path, log: Path, out: Path) -> float:
    """Plain Dask, the model loaded in every task."""
    out.mkdir(parents=True)
    files = sorted(map(str, folder.glob("*.parquet")))
    with cluster(with_gate=False) as client:
        start = time.monotonic()
        client.gather(client.map(naive_task, files, log=str(log), out=str(out)))
        return time.monotonic() - start


def speed(rows: Rows, folder: Path, scratch: Path, n_repeats: int) -> None:
    """Wall, overhead and loads against bare processes, and naive."""
    walls, bares, overheads, loads, second = [], [], [], [], []
    for repeat in range(n_repeats):
        log, out = scratch / f"log-{repeat}", scratch / f"out-{repeat}"
        bares.append(bare.measure("wait", folder, Path(f"{log}-bare"), Path(f"{out}-bare")))
        with cluster():
            wall, report = ours("wait", folder, log, out)
            walls.append(wall)
            loads.append(report.context_loads)
            again = pcm.write_parquet(job("wait", folder, log), f"{out}-again", progress=False)
            second.append(again.report.context_loads)
        spent = N_BATCHES * BATCH_S + 2 * LOAD_S
        overheads.append((2 * wall - spent) / N_BATCHES * 1e3)
    ratios = [a / b for a, b in zip(walls, bares, strict=True)]
    rows.add("wall, workers ready to files written, over bare", median(ratios), "<= 1.02")
    rows.add("wall of bare over the ideal", median(bares) / (LOAD_S + N_BATCHES * BATCH_S / 2))
    rows.add("overhead a batch, ms", median(overheads), "<= 5")
    rows.add("context loads", max(loads), "== 2")
    rows.add("context loads of a second job in the same cluster", max(second), "== 0")
    slow = naive(folder, scratch / "log-naive", scratch / "out-naive")
    rows.add("wall of naive (load per task) over ours", slow / median(walls), ">= 9")


def cpu(rows: Rows, scratch: Path) -> None:
    """CPU seconds a batch of a real model, in a worker and outside Dask."""
    fewer = scratch / "fewer"
    write_input(fewer, n_files=30)
    ratios, walls = [], []
    for repeat in range(3):
        log, out = scratch / f"cpu-{repeat}", scratch / f"cpu-out-{repeat}"
        outside_s = bare.measure("llama", fewer, Path(f"{log}-bare"), Path(f"{out}-bare"))
        with cluster():
            inside_s, _ = ours("llama", fewer, log, out)
        outside = cpu_per_batch(read_log(Path(f"{log}-bare")))
        ratios.append(cpu_per_batch(read_log(log)) / outside)
        walls.append(inside_s / outside_s)
    rows.add("CPU s a batch in a worker over outside Dask (7M Llama)", median(ratios), "<= 1.10")
    rows.add("wall over bare (7M Llama, the driver on the same two cores)", median(walls))


def trivial(number: int, context: object = None) -> int:
    return number


def trivial_tasks(rows: Rows) -> None:
    """10,000 tasks that do nothing, through the gate and past it, in one cluster by turns."""
    context = pcm.Context(load_wait, "", 0.0)
    n_tasks = 10_000

    def timed(client: Client, **options: object) -> float:
        start = time.monotonic()
        futures = client.map(trivial, range(n_tasks), pure=False, **options)
        client.gather(futures)
        seconds = time.monotonic() - start
        client.cancel(futures)
        return seconds

    ratios = []
    with cluster() as client:
        timed(client, context=context)
        for _ in range(3):
            gate = timed(client, context=context)
            plain = timed(client)
            ratios.append(gate / plain)
    rows.add("10,000 trivial tasks, time over plain Dask's", median(ratios), "<= 0.7")


def kill_worker(rows: Rows, folder: Path, scratch: Path) -> None:
    """SIGKILL of the worker that did most, after 300 batches."""
    log, out = scratch / "kill", scratch / "kill-out"
    driver = _driver(folder, log, out)
    events = _wait_for_batches(log, 300, driver)
    os.kill(int(events["pid"].mode()[0]), signal.SIGKILL)
    if driver.wait():
        raise RuntimeError("the run did not survive")
    found = pd.read_parquet(out)["id"]
    rows.add(
        "worker killed after 300 batches: rows computed twice", rows_twice(read_log(log)), "<= 64"
    )
    undisturbed = scratch / "whole"
    if _driver(folder, undisturbed, scratch / "whole-out").wait():
        raise RuntimeError("the run without a kill failed")
    lost_s = _span_s(read_log(log)) - _span_s(read_log(undisturbed))
    rows.add(f"… wall lost, s, where a load takes {LOAD_S:g} s", lost_s, f"<= {LOAD_S + 1:g}")
    rows.add("… rows lost", N_ROWS - found.nunique(), "== 0")
    rows.add("… rows in the output twice", len(found) - found.nunique(), "== 0")


def kill_tree(rows: Rows, folder: Path, scratch: Path) -> None:
    """SIGKILL of driver, scheduler and workers half-way, then the same run again."""
    log, out = scratch / "tree", scratch / "tree-out"
    driver = _driver(folder, log, out)
    _wait_for_batches(log, int(N_BATCHES / 2), driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    if _driver(folder, log, out).wait():
        raise RuntimeError("the second run failed")
    found = pd.read_parquet(out)["id"]
    rows.add("process tree killed half-way: rows lost", N_ROWS - found.nunique(), "== 0")
    rows.add("… rows in the output twice", len(found) - found.nunique(), "== 0")
    rows.add("… rows redone", rows_twice(read_log(log)), "<= 128")


def _span_s(events: pd.DataFrame) -> float:
    """Seconds from the first batch to the end of the last."""
    return float(events["at"].max() - events["at"].min()) + BATCH_S


def _driver(folder: Path, log: Path, out: Path) -> subprocess.Popen[bytes]:
    """A driver with a cluster of its own, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.main_job",
        "--drive",
        str(folder),
        str(log),
        str(out),
    ]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def _wait_for_batches(log: Path, n_batches: int, driver: subprocess.Popen[bytes]) -> pd.DataFrame:
    while len(events := read_log(log)) < n_batches:
        if driver.poll() is not None:
            raise RuntimeError("the driver ended too early")
        time.sleep(0.02)
    return events


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--only", choices=["speed", "cpu", "trivial", "kill"])
    options.add_argument("--drive", nargs=3, metavar=("INPUT", "LOG", "OUTPUT"))
    args = options.parse_args()
    if args.drive:
        folder, log, out = map(Path, args.drive)
        with cluster():
            ours("wait", folder, log, out)
        return
    rows = Rows()
    with tempfile.TemporaryDirectory(prefix="pcm-bench-") as made:
        scratch = Path(made)
        folder = scratch / "claims"
        write_input(folder)
        if args.only in (None, "speed"):
            speed(rows, folder, scratch, args.repeats)
        if args.only in (None, "cpu"):
            cpu(rows, scratch)
        if args.only in (None, "trivial"):
            trivial_tasks(rows)
        if args.only in (None, "kill"):
            kill_worker(rows, folder, scratch)
            kill_tree(rows, folder, scratch)
    rows.write(args.json)


if __name__ == "__main__":
    main()
