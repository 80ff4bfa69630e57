"""The two doors: a run through its window, plain work beside the gate, head, tiny files,
wide rows, kills.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client, LocalCluster, wait

import dask_pcm as pcm
from benchmarks.table import Rows, median, parser

META = {"id": "i8", "answer": "i8"}
MIB = 1 << 20


def load(value: Any = None) -> Any:
    return value


def answer(frame: pd.DataFrame, live: Any) -> pd.DataFrame:
    return pd.DataFrame({"id": frame["id"], "answer": 1}, index=frame.index)


class Peak:
    """The most memory of a process while it is watched, in bytes."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._is_over = threading.Event()
        self.before = self.most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        with suppress(psutil.Error):
            while not self._is_over.wait(0.01):
                self.most = max(self.most, self._process.memory_info().rss)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._is_over.set()
        self._thread.join()


@contextmanager
def separate_cluster(n_workers: int = 2) -> Iterator[tuple[Client, int]]:
    """Scheduler and workers in processes of their own; the client, and the scheduler's id."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    base = [sys.executable, "-m"]
    commands = [
        ["distributed.cli.dask_scheduler", "--host=127.0.0.1", f"--port={port}", "--no-dashboard"]
    ]
    worker = ["distributed.cli.dask_worker", address, "--nthreads=1", "--no-dashboard"]
    commands += [[*worker, "--no-nanny", "--memory-limit=0"]] * n_workers
    processes = [subprocess.Popen([*base, *command], **quiet) for command in commands]
    try:
        with Client(address, timeout=60) as client:
            client.wait_for_workers(n_workers, timeout=60)
            pcm.install(client)
            yield client, processes[0].pid
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def watch_loop(dask_scheduler: Any = None) -> None:
    """Note the longest time for which the scheduler's loop did not come round."""
    import asyncio
    import time

    async def watch() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.002)
            lag = time.perf_counter() - start - 0.002
            dask_scheduler.longest_stall = max(dask_scheduler.longest_stall, lag)

    dask_scheduler.longest_stall = 0.0
    dask_scheduler.stall_watch = asyncio.ensure_future(watch())


def stall(dask_scheduler: Any = None) -> float:
    dask_scheduler.stall_watch.cancel()
    return dask_scheduler.longest_stall


def window(rows: Rows, scratch: Path, limit_s: float) -> None:
    """A run of a million trivial units against one of ten thousand, each stopped in time."""
    found = {}
    for n_rows in (10_000, 1_000_000):
        path = scratch / f"trivial-{n_rows}.parquet"
        pq.write_table(pa.table({"id": range(n_rows)}), path, row_group_size=10_000)
        with (
            separate_cluster() as (client, scheduler),
            dask.config.set({"pcm.run.max-unit-rows": 1}),
        ):
            verdicts = pcm.map_partitions(
                answer, pcm.read_parquet(path), context=pcm.Context(load), meta=META, batch_rows=1
            )
            client.run_on_scheduler(watch_loop)
            with Peak(scheduler) as peak:
                out = scratch / f"out-{n_rows}"
                run = pcm.write_parquet(verdicts, out, wait=False, client=client)
                with suppress(TimeoutError):
                    run.wait(limit_s)
                n_units = run.report.units
                longest_s = client.run_on_scheduler(stall)
                if run.status == "running":
                    run.cancel()
                with suppress(pcm.PCMError):
                    run.wait()
            found[n_rows] = (peak, longest_s, n_units)
    (small, *_), (large, longest_s, n_units) = found[10_000], found[1_000_000]
    rows.add("units done in the run of 1,000,000 until it was stopped", n_units)
    rows.add(
        "run of 1,000,000 units over one of 10,000: scheduler memory",
        large.most / small.most,
        "<= 1.2",
    )
    rows.add("… growth of the scheduler over idle, MiB", (large.most - large.before) / MIB)
    rows.add("… longest stall of the scheduler's loop, ms", longest_s * 1e3, "<= 100")


def waits(number: int, seconds: float, context: object = None) -> int:
    time.sleep(seconds)
    return number


def trivial(number: int) -> int:
    return number


@contextmanager
def cluster(n_workers: int = 2) -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, dashboard_address=":0", memory_limit=0
        ) as local,
        Client(local) as client,
    ):
        yield client


def beside(rows: Rows) -> None:
    """Plain tasks while the gate has more to do than it can, and while it has nothing."""

    def timed(client: Client) -> float:
        start = time.monotonic()
        futures = client.map(trivial, range(3_000), pure=False)
        client.gather(futures)
        seconds = time.monotonic() - start
        client.cancel(futures)
        return seconds

    ratios: dict[float, list[float]] = {0.25: [], 0.004: []}
    with cluster() as client:
        timed(client)
        plain_before = timed(client)
        pcm.install(client)
        context = pcm.Context(load, "beside")
        for _ in range(5):
            for seconds, found in ratios.items():
                without = timed(client)
                parked = client.map(
                    waits, range(8_000), seconds=seconds, context=context, pure=False
                )
                wait(parked, return_when="FIRST_COMPLETED")
                found.append(without / timed(client))
                assert not parked[-1].done()
                client.cancel(parked, force=True)
                while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
                    time.sleep(0.1)
        rows.add(
            "plain tasks/s beside a saturated gate, over without", median(ratios[0.25]), ">= 0.9"
        )
        rows.add("… with context tasks of 4 ms", median(ratios[0.004]))
        rows.add("plain tasks/s with the toolkit idle, over without it", plain_before / without)


def head(rows: Rows, scratch: Path) -> None:
    """Rows that the function is given for ``head(5)``."""
    path, log = scratch / "head.parquet", scratch / "head.log"
    pq.write_table(pa.table({"id": range(5_000)}), path)

    def noted(frame: pd.DataFrame, live: Any) -> pd.DataFrame:
        with open(log, "a") as file:
            file.write(f"{len(frame)}\n")
        return answer(frame, live)

    with cluster() as client:
        pcm.install(client)
        verdicts = pcm.map_partitions(
            noted, pcm.read_parquet(path), context=pcm.Context(load), meta=META, batch_rows=32
        )
        assert len(verdicts.head(5)) == 5
    rows.add("head(5) of a map by 32 rows: rows inferred", sum(map(int, log.open())), "<= 32")


def tiny(rows: Rows, scratch: Path) -> None:
    """100,000 files of one row: listed, run, and run again."""
    n_files, folder, out = 100_000, scratch / "tiny", scratch / "tiny-out"
    folder.mkdir()
    for number in range(n_files):
        pq.write_table(pa.table({"id": [number]}), folder / f"{number:06d}.parquet")
    with cluster() as client:
        pcm.install(client)
        start = time.monotonic()
        frame = pcm.read_parquet(folder)
        rows.add("100,000 files of one row: seconds to list them", time.monotonic() - start)
        verdicts = pcm.map_partitions(
            answer, frame, context=pcm.Context(load), meta=META, batch_rows=32
        )
        report = pcm.write_parquet(verdicts, out, progress=False).report
        rows.add("… seconds to run", report.total_s)
        again = pcm.write_parquet(verdicts, out, progress=False).report
        rows.add("… rows computed when it is run again", again.rows - again.rows_resumed, "== 0")
    found = pd.read_parquet(out)["id"]
    rows.add("… rows lost", n_files - found.nunique(), "== 0")
    rows.add("… rows in the output twice", len(found) - found.nunique(), "== 0")


def wide(rows: Rows, scratch: Path, n_rows: int) -> None:
    """Rows of 1 MB in one file and one row group, through one worker of two lanes."""
    path = scratch / "wide.parquet"
    schema = pa.schema([("id", pa.int64()), ("blob", pa.binary())])
    # Pages of some megabytes, as writers of large values make them: a page is the least that can
    # be read. The row group is the whole file.
    blobs = [np.random.bytes(10**6) for _ in range(64)]
    with pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_batch_size=4
    ) as writer:
        tables = (
            pa.record_batch([pa.array(range(at, at + 64)), pa.array(blobs)], schema=schema)
            for at in range(0, n_rows, 64)
        )
        writer.write(pa.Table.from_batches(tables), row_group_size=n_rows)

    def length(frame: pd.DataFrame, live: Any) -> pd.DataFrame:
        return pd.DataFrame({"id": frame["id"], "answer": frame["blob"].map(len)})

    def job(folder: Path) -> Any:
        claims = pcm.read_parquet(folder)
        return pcm.map_partitions(
            length, claims, context=pcm.Context(load), meta=META, batch_rows=32
        )

    small = scratch / "small.parquet"
    pq.write_table(pa.table({"id": [1], "blob": [b"x"]}), small)
    unit_bytes = pcm.config.Config.read().unit_bytes
    with cluster(1) as client:
        pcm.write_parquet(job(small), scratch / "small-out", progress=False)
        (pid,) = client.run(os.getpid).values()
        with Peak(pid) as peak:
            report = pcm.write_parquet(job(path), scratch / "wide-out", progress=False).report
    assert report.rows == n_rows and report.rows_failed == 0
    size = path.stat().st_size / unit_bytes
    rows.add("rows of 1 MB in one file: its size, over the bytes of a unit", size)
    growth = (peak.most - peak.before) / unit_bytes
    rows.add("… growth of a worker's RSS over idle, over the bytes of a unit", growth, "<= 3")
    path.unlink()


N_KILL_ROWS = 2_000


def killed_run(number: int, scratch: Path) -> tuple[int, int, int]:
    """One run with kills at random; rows lost, rows in the output twice, and kills."""
    chance = random.Random(number)
    folder, log, out = (scratch / f"{name}-{number}" for name in ("in", "log", "out"))
    folder.mkdir()
    for at in range(0, N_KILL_ROWS, 200):
        table = pa.table({"id": range(at, at + 200)})
        pq.write_table(table, folder / f"{at:05d}.parquet")
    log.write_text("")
    n_kills = chance.randint(1, 3)
    for kill in range(n_kills + 1):
        driver = drive(folder, log, out)
        if kill == n_kills:
            break
        before = log.stat().st_size
        wanted = chance.randint(1, 15)  # batches after which it strikes
        while driver.poll() is None and log.read_bytes()[before:].count(b"\n") < wanted:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        if driver.poll() is None:
            strike(driver, chance)
        driver.wait()
        if driver.returncode == 0:
            break
    if driver.wait() != 0:
        raise RuntimeError(f"run {number} did not end well: see {out}")
    found = pd.read_parquet(out)["id"]
    return N_KILL_ROWS - found.nunique(), len(found) - found.nunique(), n_kills


def strike(driver: subprocess.Popen[bytes], chance: random.Random) -> None:
    """SIGKILL a worker, the driver (with the scheduler in it), or both."""
    children = psutil.Process(driver.pid).children(recursive=True)
    workers = [p for p in children if "spawn_main" in " ".join(p.cmdline()) and not p.children()]
    what = chance.choice(["worker", "driver", "both"])
    with suppress(psutil.NoSuchProcess):
        if what in ("worker", "both") and workers:
            chance.choice(workers).kill()
        if what == "worker":
            return
        if what == "both":
            os.killpg(driver.pid, signal.SIGKILL)
        else:
            os.kill(driver.pid, signal.SIGKILL)


def drive(folder: Path, log: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.doors", "--drive", *map(str, (folder, log, out))]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def noted(frame: pd.DataFrame, log: str) -> pd.DataFrame:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{len(frame)}\n".encode())
    os.close(descriptor)
    time.sleep(0.05)
    return answer(frame, None)


def kills(rows: Rows, scratch: Path, n_runs: int) -> None:
    """Random SIGKILLs, then the same run again until it is through; two runs side by side."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: killed_run(number, scratch), range(n_runs)))
    rows.add(f"random SIGKILLs, runs of {N_KILL_ROWS:,} rows", n_runs)
    rows.add("… kills", sum(n for _, _, n in found))
    rows.add("… rows lost", sum(lost for lost, _, _ in found), "== 0")
    rows.add("… rows in the output twice", sum(twice for _, twice, _ in found), "== 0")


def main() -> None:
    options = parser(__doc__)
    parts: dict[str, Callable[[Rows, Path], None]] = {
        "window": lambda rows, scratch: window(rows, scratch, args.limit),
        "beside": lambda rows, scratch: beside(rows),
        "head": head,
        "tiny": tiny,
        "wide": lambda rows, scratch: wide(rows, scratch, args.wide_rows),
        "kills": lambda rows, scratch: kills(rows, scratch, args.runs),
    }
    options.add_argument("--only", choices=parts)
    options.add_argument(
        "--limit", type=float, default=60.0, help="seconds for a run of the window"
    )
    options.add_argument("--wide-rows", type=int, default=4096)
    options.add_argument("--runs", type=int, default=50)
    options.add_argument("--drive", nargs=3, metavar=("INPUT", "LOG", "OUTPUT"))
    args = options.parse_args()
    if args.drive:
        folder, log, out = args.drive
        with cluster() as client:
            verdicts = pcm.map_partitions(
                noted,
                pcm.read_parquet(folder),
                context=pcm.Context(load, log),
                meta=META,
                batch_rows=20,
            )
            pcm.write_parquet(verdicts, out, client=client, progress=False)
        return
    rows = Rows()
    with tempfile.TemporaryDirectory(prefix="pcm-bench-") as made:
        for name, measure in parts.items():
            if args.only in (None, name):
                measure(rows, Path(made))
    rows.write(args.json)


if __name__ == "__main__":
    main()
