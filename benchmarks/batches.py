"""What lies between two batches: a user's function by us, by plain Dask and by bare processes.

20,000 claims in 100 files of 200, two workers, a model that takes 3 s to load and waits 40 ms for
32 claims. Each system runs in a process tree of its own, in turn, several times; a round with more
than two runnable processes a core is void. "Plain Dask" loads the model in a worker plugin, and has
a task for each file that calls the function in a loop. "Bare" are two processes without Dask.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.dataframe  # noqa: F401 # as every notebook has; bare processes have done their imports
import pandas as pd
import psutil
from distributed import Client, LocalCluster, Worker, WorkerPlugin, get_worker

import dask_pcm as pcm
from benchmarks.bare import race
from benchmarks.table import Rows, median, parser
from benchmarks.user_function import (
    FUNCTIONS,
    WaitingModel,
    cpu_ms,
    gaps_ms,
    read_calls,
    write_claims,
)
from benchmarks.work import BATCH_ROWS, BATCH_S, N_BATCHES, N_ROWS

SYSTEMS = ("ours", "dask", "bare")


def tree_cpu_s() -> float:
    """CPU seconds of this process and all that it has started."""
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in tree)


class Holder(WorkerPlugin):  # type: ignore[misc] # untyped
    """Loads the model when the worker starts, as Dask's documentation shows it."""

    name = "holder"

    def __init__(self, log: str) -> None:
        self._log = log

    def setup(self, worker: Worker) -> None:
        self.model = WaitingModel(self._log)


def by_files(file: str, function: str, out: str) -> int:
    """The task of plain Dask."""
    model = get_worker().plugins["holder"].model
    return whole_file(file, function, model, out)


def whole_file(file: str, function: str, model: Any, out: str) -> int:
    """Read a file, call the function by batches, write the answers."""
    func, _ = FUNCTIONS[function]
    frame = pd.read_parquet(file)
    starts = range(0, len(frame), BATCH_ROWS)
    parts = [func(frame.iloc[at : at + BATCH_ROWS], model) for at in starts]
    pd.concat(parts).to_parquet(Path(out) / Path(file).name, index=False)
    return len(frame)


def ours(function: str, folder: Path, log: Path, out: Path) -> dict[str, float]:
    func, meta = FUNCTIONS[function]
    with _cluster() as client:
        pcm.install(client)

        def once(name: str) -> float:
            start = time.monotonic()
            claims = pcm.read_parquet(folder)
            context = pcm.Context(WaitingModel, str(log))
            answers = pcm.map_partitions(
                func, claims, context=context, meta=meta, batch_rows=BATCH_ROWS
            )
            pcm.write_parquet(answers, out / name, progress=False)
            return time.monotonic() - start

        found = {"wall_s": once("first"), "cpu_s": tree_cpu_s()}
        n_calls = len(read_calls(log))
        return {**found, "second_s": once("second"), "calls": n_calls}


def plain_dask(function: str, folder: Path, log: Path, out: Path) -> dict[str, float]:
    files = sorted(map(str, folder.glob("*.parquet")))
    with _cluster() as client:
        start = time.monotonic()
        client.register_plugin(Holder(str(log)))
        client.gather(client.map(by_files, files, function=function, out=str(out)))
        return {"wall_s": time.monotonic() - start, "cpu_s": tree_cpu_s()}


@contextmanager
def _cluster() -> Iterator[Client]:
    """Two workers of one thread, ready."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=":0"
        ) as local,
        Client(local) as client,
    ):
        client.wait_for_workers(2)
        yield client


def bare(function: str, folder: Path, log: Path, out: Path) -> dict[str, float]:
    files = sorted(map(str, folder.glob("*.parquet")))
    command = ["benchmarks.batches", "--work", function, str(log), str(out)]
    wall_s = race([[*command, *files[n::2]] for n in range(2)])
    return {"wall_s": wall_s, "cpu_s": sum(psutil.Process().cpu_times()[:4])}


def work(function: str, log: str, out: str, *files: str) -> None:
    """A bare process."""
    print("ready", flush=True)
    sys.stdin.readline()
    model = WaitingModel(log)
    for file in files:
        whole_file(file, function, model, out)


def alone_ms(function: str, folder: Path, scratch: Path) -> float:
    """CPU milliseconds of the function itself for a batch, the model's own included."""
    func, _ = FUNCTIONS[function]
    model = WaitingModel(str(scratch / "alone"), 0.0)
    frame = pd.read_parquet(min(folder.glob("*.parquet")))[: BATCH_ROWS * 6]
    batches = [frame.iloc[at : at + BATCH_ROWS] for at in range(0, len(frame), BATCH_ROWS)]
    spent = []
    for _ in range(5):
        start = time.process_time()
        for batch in batches:
            func(batch, model)
        spent.append((time.process_time() - start) / len(batches) * 1e3)
    return median(spent)


def drive(system: str, function: str, folder: Path, scratch: Path) -> dict[str, float]:
    """Run one system in a process tree of its own."""
    command = [sys.executable, "-m", "benchmarks.batches", "--drive", system, function]
    made = subprocess.run(
        [*command, str(folder), str(scratch)], stdout=subprocess.PIPE, check=True, timeout=300
    )
    found: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
    n_rows = sum(len(pd.read_parquet(part)) for part in scratch.glob("out/**/part-*.parquet"))
    if system == "ours" and n_rows != 2 * N_ROWS:
        raise RuntimeError(f"{n_rows} rows in two outputs of {N_ROWS}")
    return found


def _drive_here(system: str, function: str, folder: Path, scratch: Path) -> None:
    log, out = scratch / "calls", scratch / "out"
    out.mkdir(parents=True)
    found = {"ours": ours, "dask": plain_dask, "bare": bare}[system](function, folder, log, out)
    calls = read_calls(log)
    first = calls.head(int(found.get("calls", len(calls))))
    gaps = gaps_ms(first)
    found |= {
        "gap_ms": float(pd.Series(gaps).median()),
        "gaps_s": float(gaps[gaps < BATCH_S * 1e3].sum() / 1e3),
        "batch_cpu_ms": cpu_ms(first),
        "calls": len(first),
    }
    print(json.dumps(found))


def compare(rows: Rows, function: str, folder: Path, n_repeats: int, systems: list[str]) -> None:
    """All systems by turns."""
    found: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    n_void = 0
    while min(map(len, found.values())) < n_repeats:
        with tempfile.TemporaryDirectory(prefix="pcm-bench-") as made:
            alone = alone_ms(function, folder, Path(made))
            turn = {s: drive(s, function, folder, Path(made, s)) for s in systems}
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        print({"load": round(load, 2), "alone_ms": round(alone, 2), **turn}, file=sys.stderr)
        if load > 2 and n_void < n_repeats:
            n_void += 1
            continue
        for system, one in turn.items():
            found[system].append({**one, "alone_ms": alone})

    def of(system: str, key: str) -> list[float]:
        return [one[key] for one in found[system]]

    mine = found["ours"]
    for system in systems:
        rows.add(
            f"{function}: between two calls on a worker, p50, ms: {system}",
            median(of(system, "gap_ms")),
            "<= 1.0" if system == "ours" else "",
        )
        rows.add(
            f"{function}: … their sum on both workers, s: {system}", median(of(system, "gaps_s"))
        )
        own = [one["batch_cpu_ms"] - one["alone_ms"] for one in found[system]]
        rows.add(
            f"{function}: CPU a batch in a worker without the function's own, ms: {system}",
            median(own),
            "<= 1.5" if system == "ours" else "",
        )
    for other, bar in (("dask", "<= 0.98"), ("bare", "<= 1.02")):
        if other in systems:
            ratios = [a["wall_s"] / b["wall_s"] for a, b in zip(mine, found[other], strict=True)]
            rows.add(f"{function}: wall over {other}", median(ratios), bar)
    if "dask" in systems:
        ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(mine, found["dask"], strict=True)]
        rows.add(f"{function}: CPU of the whole tree over plain Dask's", median(ratios), "<= 1.2")
        rows.add(f"{function}: … s, ours", median(of("ours", "cpu_s")))
    ideal_s = N_BATCHES * BATCH_S / 2
    rows.add(
        f"{function}: a second job in the same cluster over its ideal",
        median([one["second_s"] / ideal_s for one in mine]),
        "<= 1.04",
    )
    rows.add(
        f"{function}: calls (625 if batches are filled across files)", median(of("ours", "calls"))
    )
    rows.add(f"{function}: rounds that were void", n_void)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options.add_argument("--drive", nargs=4, metavar=("SYSTEM", "FUNCTION", "INPUT", "SCRATCH"))
    options.add_argument("--work", nargs="+", help="a bare process")
    args = options.parse_args()
    if args.work:
        return work(*args.work)
    if args.drive:
        system, function, folder, scratch = args.drive
        return _drive_here(system, function, Path(folder), Path(scratch))
    rows = Rows()
    with tempfile.TemporaryDirectory(prefix="pcm-bench-") as made:
        folder = Path(made, "claims")
        write_claims(folder)
        for function in args.functions:
            compare(rows, function, folder, args.repeats, args.systems)
    rows.write(args.json)
    return None


if __name__ == "__main__":
    main()
