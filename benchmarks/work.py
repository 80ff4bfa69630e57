"""The work of the main-job benchmark: what workers and bare processes both do."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

N_FILES, ROWS_PER_FILE, BATCH_ROWS = 100, 200, 32
N_ROWS = N_FILES * ROWS_PER_FILE
N_BATCHES = N_ROWS / BATCH_ROWS
LOAD_S, BATCH_S = 3.0, 0.040


META = {"id": "i8", "answer": "f8"}
N_TOKENS = 48


def write_input(folder: Path, n_files: int = N_FILES) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(n_files):
        ids = np.arange(number * ROWS_PER_FILE, (number + 1) * ROWS_PER_FILE)
        claims = ["".join(map(chr, rng.integers(97, 123, N_TOKENS))) for _ in ids]
        table = pa.table({"id": ids, "claim": claims})
        pq.write_table(table, folder / f"claims-{number:03d}.parquet")


def note(log: str, ids: Any) -> None:
    """Append the rows of a batch to an event log: one write for each batch."""
    line = f"{os.getpid()} {time.time():.3f} {time.process_time():.4f} "
    line += ",".join(map(str, ids)) + "\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def load_wait(log: str, load_s: float = LOAD_S) -> Any:
    """A context whose load is a wait, as on a GPU."""
    time.sleep(load_s)
    return log


def infer_wait(frame: pd.DataFrame, log: str) -> pd.DataFrame:
    """A batch that waits in proportion to its rows."""
    note(log, frame["id"])
    time.sleep(BATCH_S * len(frame) / BATCH_ROWS)
    return pd.DataFrame({"id": frame["id"], "answer": frame["id"] * 0.5})


def load_llama(log: str) -> Any:
    """A random Llama of about 7 million parameters, on one thread."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    return log, LlamaForCausalLM(config).eval()


def infer_llama(frame: pd.DataFrame, loaded: Any) -> pd.DataFrame:
    import torch

    log, model = loaded
    note(log, frame["id"])
    ids = torch.tensor([[ord(c) for c in claim] for claim in frame["claim"]])
    with torch.inference_mode():
        answer = model(input_ids=ids, use_cache=False).logits[:, -1].amax(1)
    return pd.DataFrame({"id": frame["id"], "answer": answer.double().numpy()}, index=frame.index)


KINDS = {"wait": (load_wait, infer_wait), "llama": (load_llama, infer_llama)}


def read_log(path: Path) -> pd.DataFrame:
    """Events as a frame: pid, at (wall), cpu (of the process), rows."""
    events = []
    text = path.read_text() if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():  # the last may still be written
        pid, at, cpu, rows = line.split(" ")
        events.append((int(pid), float(at), float(cpu), [int(row) for row in rows.split(",")]))
    return pd.DataFrame(events, columns=["pid", "at", "cpu", "rows"])


def rows_twice(events: pd.DataFrame) -> int:
    """Rows that were computed again: how often all were computed, less once each."""
    rows = [row for batch in events["rows"] for row in batch]
    return len(rows) - len(set(rows))


def cpu_per_batch(events: pd.DataFrame) -> float:
    """CPU seconds of the whole process from one batch to the next; the first ten are left out."""
    spent = [(g["cpu"].iloc[-1] - g["cpu"].iloc[10], len(g) - 11) for _, g in events.groupby("pid")]
    return sum(s for s, _ in spent) / sum(n for _, n in spent)
