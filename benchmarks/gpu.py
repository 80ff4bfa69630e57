"""All that needs a device, in one table: tests/gpu, the ladder, the main job, and the engine.

Takes the Python that runs it, with the torch (2.8 or newer) and transformers (5.0 or newer) that
are there. Each part is a process of its own with a limit on its time; a part that fails is a row
of the table and makes the exit code 1. Without a device: "not measured", and exit code 0.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.table import Row, Rows, parser

#: Seconds that each part may take.
PARTS = {
    "tests": 180,
    "weights": 120,
    "alternating": 60,
    "main job": 210,
    "inference": 240,
    "generation": 420,
    "lending": 60,
    "long context": 60,
}
#: Rows of the main job; layers of the larger model (25 MiB each).
N_ROWS, N_LAYERS = 20_000, 40


def device_name() -> str | None:
    """The device that torch can use, with its memory; None if there is none."""
    import torch

    if not torch.accelerator.is_available():
        return None
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return str(torch.accelerator.current_accelerator())


def missing() -> list[str]:
    """What a run here would lack."""
    needed = ("torch", "transformers", "dask", "distributed", "pandas", "pyarrow", "blake3")
    found = {one.metadata["Name"].lower() for one in importlib.metadata.distributions()}
    return [name for name in (*needed, "pytest") if name not in found]


def versions() -> str:
    names = ("torch", "transformers", "dask", "pandas", "pyarrow")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Python {sys.version.split()[0]}, {found}"


def commands(device: str, gib: int) -> dict[str, list[str]]:
    ladder = ["-m", "benchmarks.ladder", "--device", device, "--gib", str(gib), "--only"]
    inference = ["-m", "benchmarks.inference", "--device", device, "--repeats", "1", "--only"]
    return {
        "tests": ["-m", "pytest", "-q", "tests/gpu", "--durations=0"],
        "weights": [*ladder, "weights"],
        "alternating": [*ladder, "alternating"],
        "main job": ["-m", "benchmarks.gpu", "--device", device, "--main-job"],
        "inference": [*inference, "scoring", "prefix", "choices", "embedding"],
        "generation": [*inference, "generation"],
        "lending": ["-m", "benchmarks.lending", "--device", device, "--only", "copies"],
        "long context": ["-m", "benchmarks.long_context", "--device", device],
    }


def run_part(name: str, command: Sequence[str], device: str) -> list[Row]:
    """Rows of one part, and one that says whether it ended well."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch, "rows.json")
        full = [sys.executable, *command]
        full += [] if name == "tests" else ["--json", str(found)]
        print(f"\n-- {name}: {' '.join(full)}", flush=True)
        start = time.monotonic()
        code = _limited(full, PARTS[name])
        rows = json.loads(found.read_text()) if found.exists() else []
        took_s = time.monotonic() - start
    said = [Row(f"{name}: {row['measure']}", row["value"], row["bar"], row["ok"]) for row in rows]
    return [*said, Row(f"{name}: exit code (after {took_s:.0f} s)", code, "== 0", code == 0)]


def _limited(command: Sequence[str], limit_s: float) -> int:
    """Run a command; what it has started ends with it."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return 124


# -- the main job ----------------------------------------------------------------------------------


def main_job(rows: Rows, device: str, n_rows: int, n_layers: int) -> None:
    """Claims through a run on one worker, over the same in this process; then with a kill."""
    import pandas as pd

    import dask_pcm as pcm
    from benchmarks import rungs
    from dask_pcm.factcheck.demo import MODEL_PATH, accuracy, write_claims

    with tempfile.TemporaryDirectory() as made, _worker() as client:
        scratch = Path(made)
        write_claims(scratch / "claims", n_rows)
        run_s, bare_s, report = _both(MODEL_PATH, scratch, "demo", device)
        rows.add("demo model (0.2M): wall of a run over the same in one process", run_s / bare_s)
        rows.add("… accuracy", accuracy(scratch / "demo-1"), ">= 0.9")
        rows.add("… context loads of two runs", report.context_loads, "== 1")
        rows.add("… rows/s of the run", n_rows / run_s)
        where = {place.partition("/")[0] for place in report.ran_on}
        rows.add(f"… ran on {device}", float(all(place.startswith(device) for place in where)))
        big = scratch / "llama"
        rungs.llama(big, n_layers)
        _tokenizer_of(MODEL_PATH, big)
        run_s, bare_s, _ = _both(big, scratch, "llama", device)
        size = sum(file.stat().st_size for file in big.glob("*.safetensors")) / 2**30
        rows.add(f"Llama of {size:.2g} GiB: wall of a run over the same in one process",
                 run_s / bare_s, "<= 1.1")  # fmt: skip
        rows.add("… rows/s of the run", n_rows / run_s)
        killed = _killed_run(client, big, scratch, device)
        found = pd.read_parquet(scratch / "killed")["id"]
        rows.add("worker killed in the midst: rows lost", n_rows - found.nunique(), "== 0")
        rows.add("… rows in the output twice", len(found) - found.nunique(), "== 0")
        rows.add("… rows computed twice", killed.rows_recomputed)
        pcm.uninstall(client)


def _both(model: Path, scratch: Path, name: str, device: str) -> tuple[float, float, Any]:
    """Seconds of a warm run, and of Dask's threadless scheduler in this process, warm as well."""
    import dask

    import dask_pcm as pcm

    reports = []
    for number in range(2):  # the first one loads
        start = time.perf_counter()
        out = scratch / f"{name}-{number}"
        reports.append(pcm.write_parquet(_job(model, scratch, device), out, progress=False).report)
        run_s = time.perf_counter() - start
    with dask.config.set(scheduler="sync"):
        for _ in range(2):
            start = time.perf_counter()
            _job(model, scratch, device).compute()
            bare_s = time.perf_counter() - start
    reports[-1].context_loads += reports[0].context_loads
    return run_s, bare_s, reports[-1]


def _job(model: Path, scratch: Path, device: str):  # type: ignore[no-untyped-def]
    import dask_pcm as pcm
    from dask_pcm.factcheck import LABELS, PROMPT

    claims = pcm.read_parquet(scratch / "claims")
    return pcm.classify(claims, pcm.LLM(model, device=device), prompt=PROMPT, choices=LABELS)


def _killed_run(client, model: Path, scratch: Path, device: str):  # type: ignore[no-untyped-def]
    """A run whose worker process is killed once a quarter of the rows is there."""
    import dask_pcm as pcm

    run = pcm.write_parquet(
        _job(model, scratch, device), scratch / "killed", wait=False, progress=False
    )
    while run.progress.done < run.progress.total / 4 and run.status in ("starting", "running"):
        time.sleep(0.01)
    (pid,) = client.run(os.getpid).values()
    os.kill(pid, signal.SIGKILL)
    return run.wait()


def _tokenizer_of(model: Path, target: Path) -> None:
    for file in model.glob("*token*"):
        (target / file.name).write_bytes(file.read_bytes())


@contextmanager
def _worker() -> Iterator[object]:
    """One worker process that has the device."""
    from distributed import Client, LocalCluster

    import dask_pcm as pcm

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=":0", memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        yield client


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--device", help="such as cuda; by default, what torch finds")
    options.add_argument("--gib", type=int, default=16, help="size of the checkpoint of weights")
    options.add_argument("--rows", type=int, default=N_ROWS, help="claims of the main job")
    options.add_argument("--layers", type=int, default=N_LAYERS, help="of the larger model")
    options.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    options.add_argument("--main-job", action="store_true", help="that part only")
    args = options.parse_args()
    if lacking := missing():
        what = ", ".join(lacking)
        print(f"Not measured: {what} missing for {sys.executable}. Install them there.")
        return 0 if "torch" in lacking else 1
    name = device_name()
    if name is None and args.device is None:
        print("Not measured: torch finds no device here.")
        return 0
    device = args.device or "cuda"
    rows = Rows()
    if args.main_job:
        main_job(rows, device, args.rows, args.layers)
        rows.write(args.json)
        return 0
    given = commands(device, args.gib)
    for part in args.only:
        rows.extend(run_part(part, given[part], device))
    print(f"\n{name or device}; {versions()}")
    rows.write(args.json)
    return rows.n_missed > 0


if __name__ == "__main__":
    sys.exit(main())
