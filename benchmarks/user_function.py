"""A model and functions as users write them, in a module beside their script."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.work import BATCH_ROWS, BATCH_S, LOAD_S, N_FILES, ROWS_PER_FILE

#: The answers of the model, by the length of a claim.
VERDICTS = ("SUPPORTED", "REFUTED", "NOT ENOUGH INFO")
META = {"id": "i8", "verdict": "str"}


class WaitingModel:
    """Takes 3 s to load, and 40 ms x texts / 32 for a call, in which Python's lock is free.

    Each call appends a line to `log`: process, begin and end, texts, and the CPU seconds of the
    process and of the thread at its begin and end.
    """

    def __init__(self, log: str, load_s: float = LOAD_S) -> None:
        time.sleep(load_s)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, texts: list[str]) -> list[str]:
        begin, cpu = time.monotonic(), time.process_time()
        time.sleep(BATCH_S * len(texts) / BATCH_ROWS)
        end = time.monotonic()
        line = f"{os.getpid()} {begin:.6f} {end:.6f} {len(texts)} {cpu:.6f}\n"
        os.write(self._log, line.encode())
        return [VERDICTS[len(text) % 3] for text in texts]


def assigned(df: pd.DataFrame, model: WaitingModel) -> pd.DataFrame:
    """The function of most notebooks."""
    return df[["id"]].assign(verdict=model(df["claim"].tolist()))


def made(df: pd.DataFrame, model: WaitingModel) -> pd.DataFrame:
    """A new frame, without the index."""
    return pd.DataFrame({"id": df["id"].to_numpy(), "verdict": model(list(df["claim"]))})


def copied(df: pd.DataFrame, model: WaitingModel) -> pd.DataFrame:
    """All input columns, and one more."""
    out = df.copy()
    out["verdict"] = model(df["claim"].tolist())
    return out


FUNCTIONS = {
    "assigned": (assigned, META),
    "made": (made, META),
    "copied": (copied, {"id": "i8", "claim": "str", "verdict": "str"}),
}


def write_claims(folder: Path) -> None:
    """Claims of 30 to 300 characters."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(N_FILES):
        ids = np.arange(number * ROWS_PER_FILE, (number + 1) * ROWS_PER_FILE)
        claims = ["".join(map(chr, rng.integers(97, 123, rng.integers(30, 301)))) for _ in ids]
        pq.write_table(
            pa.table({"id": ids, "claim": claims}), folder / f"claims-{number:03d}.parquet"
        )


def read_calls(log: Path) -> pd.DataFrame:
    """The calls of a model's log: pid, begin, end (s), texts, cpu (s of the process)."""
    names = ["pid", "begin", "end", "texts", "cpu"]
    return pd.read_csv(log, sep=" ", names=names)


def gaps_ms(calls: pd.DataFrame) -> np.ndarray:
    """Milliseconds between two calls in a row of a process, for all processes."""
    found = []
    for _, own in calls.groupby("pid"):
        own = own.sort_values("begin")
        found.append((own["begin"].to_numpy()[1:] - own["end"].to_numpy()[:-1]) * 1e3)
    return np.concatenate(found)


def cpu_ms(calls: pd.DataFrame, n_left_out: int = 10) -> float:
    """CPU milliseconds of a process from one call to the next; the first calls are left out."""
    spent = n = 0.0
    for _, own in calls.groupby("pid"):
        own = own.sort_values("begin")[n_left_out:]
        spent += own["cpu"].iloc[-1] - own["cpu"].iloc[0]
        n += len(own) - 1
    return spent / n * 1e3
