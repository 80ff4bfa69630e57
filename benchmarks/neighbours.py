"""Workers of a real cluster that lend each other memory, and are killed at random moments.

Three workers with nannies, whose CPU memory plays the part of devices of 10 MiB. A run generates
texts with engines of few pages, so that rows that make room go to memory that is lent. Beside it
contexts of 4 MiB take turns, and those that leave a device go to one that is lent as well.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import torch
from distributed import Client, LocalCluster, WorkerPlugin

import dask_pcm as pcm
from benchmarks.table import Rows, parser
from dask_pcm.inference import served
from dask_pcm.inference.loading import load_model
from dask_pcm.plugins.worker.plugin import CONTEXTS
from tests.support import models as tiny

MIB = 1 << 20
N_KILLS, N_TEXTS, N_TOKENS = 30, 2_000, 60
#: Numbers of engines' pages, which suffice for a few rows; keys and values of the model below take
#: 8 KiB a page.
POOL_BYTES, HOST_PAGES = 24 * 8192, "64 KiB"
#: A task that takes longer hangs.
HANGS_S = 120.0


class FewPages(WorkerPlugin):  # type: ignore[misc] # its types are not shipped
    """Engines of a worker have few pages."""

    name = "few-pages"

    def setup(self, worker: Any) -> None:
        served._POOL_BYTES = POOL_BYTES


def load(number: int, n_mib: int) -> Any:
    module = torch.nn.Linear(1, n_mib << 18, bias=False)
    torch.nn.init.constant_(module.weight, number)
    return module


def number_of(_: int, context: Any) -> float:
    with pcm.acquire(context) as module:
        time.sleep(0.05)
        return float(module.weight[-1].item())


def store_of(worker: Any) -> Any:
    return worker.plugins[CONTEXTS].contexts.store


def lent(dask_worker: Any) -> tuple[int, int, int]:
    """Bytes that a worker lends and has borrowed, and pages that went to what is lent."""
    store = store_of(dask_worker)
    engines = [one._engine for one in store._borrowing().values()]
    n_pages = sum(one.paging.slabs.n_lent for one in engines if one is not None)
    return store.lending.leases.lent_bytes(), store.lending.borrowed_bytes, n_pages


def checked(dask_worker: Any) -> None:
    store_of(dask_worker).validate()


def chaos(table: Rows, n_kills: int, folder: Path, client: Client) -> None:
    """Texts and contexts that take turns, while workers are killed."""
    rng = random.Random(0)
    model = tiny.saved(folder / "model", tiny.llama())
    texts = [f"row {k}: " + "word " * rng.randint(1, 20) for k in range(N_TEXTS)]
    rows = dd.from_pandas(pd.DataFrame({"id": range(N_TEXTS), "words": texts}), npartitions=4)
    asked = pcm.generate(rows, pcm.LLM(str(model)), prompt="{words}", max_tokens=N_TOKENS)
    run = pcm.write_parquet(asked, str(folder / "out"), client=client, wait=False)
    contexts = [pcm.Context(load, k, 4, name=f"c{k}") for k in range(6)]
    n_answers = n_wrong = n_killed = most_bytes = most_pages = 0
    while n_killed < n_kills or run.status in ("starting", "running"):
        k = rng.randrange(len(contexts))
        future = client.submit(number_of, n_answers, contexts[k], pure=False)
        n_wrong += future.result(HANGS_S) != k
        n_answers += 1
        for _, n_bytes, n_pages in client.run(lent, on_error="ignore").values():
            most_bytes, most_pages = max(most_bytes, n_bytes), max(most_pages, n_pages)
        if n_killed < n_kills and rng.random() < 0.2:
            os.kill(
                rng.choice([*client.run(os.getpid, on_error="ignore").values()]), signal.SIGKILL
            )
            n_killed += 1
    report = run.wait(HANGS_S)
    client.wait_for_workers(3, timeout=HANGS_S)
    found = pd.read_parquet(run.path).sort_values("id")
    expected = load_model(str(model), device="cpu").generate(texts, max_tokens=N_TOKENS)
    table.add("SIGKILLs of one of three workers", n_killed)
    table.add("… texts", len(found))
    table.add("… answers of contexts that take turns", n_answers)
    table.add("… most MiB that a worker has borrowed", most_bytes / MIB)
    table.add("… most pages that an engine has sent to what is lent", most_pages)
    table.add("… context loads of the run", report.context_loads)
    n_other = sum(a != b.text for a, b in zip(found.text, expected, strict=True))
    table.add("… texts that are others than undisturbed, or are missing", n_other, "== 0")
    table.add("… answers that are wrong", n_wrong, "== 0")
    client.run(checked)
    lending = [*client.run(lent).values()]
    n_more = abs(sum(one[0] for one in lending) - sum(one[1] for one in lending))
    table.add("… bytes lent over those borrowed in the end", n_more, "== 0")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=N_KILLS)
    args = options.parse_args()
    table = Rows()
    settings = {"pcm.ladder.device.budget": "10 MiB", "pcm.inference.host-pages": HOST_PAGES}
    with (
        tempfile.TemporaryDirectory() as folder,
        dask.config.set(settings),
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=":0") as workers,
        Client(workers) as client,
    ):
        client.register_plugin(FewPages())
        pcm.install(client)
        chaos(table, args.kills, Path(folder), client)
    table.write(args.json)


if __name__ == "__main__":
    main()
