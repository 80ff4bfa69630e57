"""The same work without Dask: two processes that share the files evenly.

Run as ``python -m benchmarks.bare KIND FILES LOG OUT``, where KIND is wait or llama. A process
does its imports, says "ready", waits for a line on standard input, and works.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.work import BATCH_ROWS, KINDS


def work(kind: str, files: list[str], log: str, out: Path) -> None:
    """Load, and for each file read, infer, write, sync."""
    load, infer = KINDS[kind]
    live = load(log)
    for file in files:
        frame = pd.read_parquet(file)
        starts = range(0, len(frame), BATCH_ROWS)
        parts = [infer(frame.iloc[at : at + BATCH_ROWS], live) for at in starts]
        with (out / Path(file).name).open("wb") as sink:
            pq.write_table(pa.Table.from_pandas(pd.concat(parts), preserve_index=False), sink)
            sink.flush()
            os.fsync(sink.fileno())


def measure(kind: str, folder: Path, log: Path, out: Path, n_processes: int = 2) -> float:
    """Wall seconds from "go" to the last file."""
    out.mkdir(parents=True)
    files = sorted(map(str, folder.glob("*.parquet")))
    command = ["benchmarks.bare", kind, str(log), str(out)]
    return race([[*command, *files[n::n_processes]] for n in range(n_processes)])


def race(commands: Iterable[Sequence[str]]) -> float:
    """Start modules with arguments; wall seconds from "go" to the end of the last process.

    Each has done its imports when it says "ready" on a line, and then waits for one.

    Raises
    ------
    RuntimeError
        A process failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        for command in commands
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    start = time.monotonic()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError("a bare process failed")
    return time.monotonic() - start


if __name__ == "__main__":
    kind, log, out, *files = sys.argv[1:]
    if kind == "llama":
        import transformers  # noqa: F401  its imports are not what is measured
    print("ready", flush=True)
    sys.stdin.readline()
    work(kind, files, log, Path(out))
