"""How well an engine's steps are filled, and what a process death costs it.

Nothing here is measured in seconds of a device, so a small random model on a CPU will do. "Steps"
counts forwards; "capacity" plays a device that runs out of memory at a number of tokens that it
does not tell; "pieces", "prefixes" and "kill" are two real workers.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster, WorkerPlugin

import dask_pcm as pcm
from benchmarks.table import Rows, parser
from dask_pcm.factcheck import LABELS, PROMPT, demo_model, generate
from dask_pcm.inference.engine import holdings
from dask_pcm.inference.engine.capacity import Capacity
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.pages import KVShape, PagePool
from dask_pcm.inference.engine.rows import Generated
from tests.support import models as tiny

PARTS = ("steps", "capacity", "pieces", "prefixes", "kill")
#: Rows of the drill of pieces, and how many a piece has.
N_ROWS, PIECES = 1500, (1, 7, 200, 750)
#: Evidence of the drill of prefixes.
N_EVIDENCE = 200
#: Seconds of a call, and of a row in it.
CALL_S, ROW_S = 0.040, 0.005


# -- steps ---------------------------------------------------------------------------------------


def lengths_of(rng: random.Random, n_rows: int) -> list[int]:
    """New tokens of rows: lognormal, of 60 in the mean and 512 at most."""
    return [min(512, max(1, int(rng.lognormvariate(3.75, 0.8)))) for _ in range(n_rows)]


def n_steps(model: Any, lengths: Sequence[int], places: int) -> int:
    """Steps in which an engine with as many places continues rows by as many tokens."""
    holdings._MOST_RUNNING = places
    pool = PagePool(20_000, KVShape(1, 2, 8, 8), model.dtype, "cpu")
    engine = Engine(model, pool, Capacity(8192, most=8192), tiny.N_TOKENS)
    for k, n in enumerate(lengths):
        engine.add([Generated([5, 6], lambda _: None, n_prompt=2, n_max=n, number=k)])
    while engine.n_rows:
        engine.step()
    return engine.n_steps


def steps(table: Rows) -> None:
    """Rows in a queue, and the same drained at each call of 256."""
    from dask_pcm.inference.engine.attention import switch

    model = tiny.llama(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2
    )
    switch(model)
    lengths = lengths_of(random.Random(0), 2048)
    for places, least in ((64, 1.8), (256, 4.0)):
        queue = n_steps(model, lengths, places)
        ideal = max(max(lengths), -(-sum(lengths) // places))
        table.add(f"steps of {places} places over an ideal packing", queue / ideal, "<= 1.15")
        parts = [lengths[at : at + 256] for at in range(0, len(lengths), 256)]
        drained = sum(n_steps(model, part, places) for part in parts)
        table.add("… drained at each call of 256 rows, over ours", drained / queue, f">= {least}")


# -- capacity ------------------------------------------------------------------------------------


class Device:
    """Computes steps in simulated time, as far as a·tokens + b·Σ length² is within its memory."""

    def __init__(self, per_token: float, per_square: float, memory: float) -> None:
        self._per_token, self._per_square, self._memory = per_token, per_square, memory

    def fits(self, rows: Sequence[int]) -> bool:
        used = self._per_token * sum(rows) + self._per_square * sum(n * n for n in rows)
        return used <= self._memory

    def seconds(self, rows: Sequence[int]) -> float:
        """A launch, and time for tokens: full devices take no longer per token."""
        return 0.004 + max(sum(rows), 512) * 2e-6


def played(device: Device, rows: Iterator[int], tokens: Callable[[], int], **told: Any) -> Any:
    """Batches on a device: rate from the 50th on, and the share of failed batches of all."""
    n_done, n_failed, n_tokens, spent_s = 0, 0, 0, 0.0
    following = next(rows)
    while n_done < 1500:
        batch: list[int] = []
        while not batch or sum(batch) + following <= tokens():
            batch.append(following)
            following = next(rows)
        todo = [batch]
        while todo:
            part = todo.pop()
            seconds = device.seconds(part)
            if n_done >= 50:
                spent_s += seconds
            if not device.fits(part) and len(part) > 1:
                n_failed += 1
                told["fail"](sum(part))
                todo += [part[: len(part) // 2], part[len(part) // 2 :]]
                continue
            told["observe"](sum(part), seconds)
            n_done += 1
            n_tokens += sum(part) if n_done >= 50 else 0
    return n_tokens / spent_s, n_failed / (n_done + n_failed)


def lognormal_rows(seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield min(512, max(3, int(rng.lognormvariate(3.75, 0.8))))


def capacity(table: Rows) -> None:
    """Several devices; what is found by trying, over the best fixed size."""
    nothing = lambda *given: None  # noqa: E731
    worst, most_failed = float("inf"), 0.0
    for memory in (4_000.0, 20_000.0, 90_000.0):
        for per_square in (0.0, 0.002, 0.01):
            device = Device(1.0, per_square, memory)
            found = Capacity(512, most=65_536)
            ours, failed = played(
                device,
                lognormal_rows(1),
                lambda found=found: found.tokens,  # type: ignore[misc] # of this round
                fail=found.fail,
                observe=found.observe,
            )
            best = max(
                played(
                    device,
                    lognormal_rows(1),
                    lambda size=size: size,  # type: ignore[misc] # of this round
                    fail=nothing,
                    observe=nothing,
                )[0]
                for size in (2**k for k in range(8, 17))
            )
            worst, most_failed = min(worst, ours / best), max(most_failed, failed)
    name = "nine devices with memory for a·tokens + b·Σ length²: rate over the best of nine sizes"
    table.add(f"{name}, the worst", worst, ">= 0.9")
    table.add("… failed batches, the most", most_failed, "<= 0.01")


# -- pieces --------------------------------------------------------------------------------------


def load() -> str:
    return "model"


def slowly(frame: pd.DataFrame, model: str) -> pd.DataFrame:
    """A call takes 40 ms, and 5 ms for each row."""
    time.sleep(CALL_S + ROW_S * len(frame))
    return frame[["id"]]


def nothing(frame: pd.DataFrame) -> pd.DataFrame:
    """What Dask itself needs for pieces."""
    return frame[["id"]]


class Steps(WorkerPlugin):  # type: ignore[misc] # Dask has no types
    """Notes the tokens of each step."""

    name = "steps"

    def __init__(self, log: str) -> None:
        self._log = log

    def setup(self, worker: Any) -> None:
        log, run = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), Engine._run

        def noting(engine: Engine, parts: Any) -> None:
            run(engine, parts)
            os.write(log, b"%d\n" % sum(part.n_tokens for part in parts))

        Engine._run = noting  # type: ignore[method-assign,assignment]


def pieces(table: Rows) -> None:
    """Frames of 1,500 rows in pieces of several sizes, by both doors."""
    with tempfile.TemporaryDirectory() as name, _cluster(2) as client:
        folder, log = Path(name), Path(name, "steps")
        client.register_plugin(Steps(str(log)))
        pcm.install(client)
        claims = generate(N_ROWS, seed=1)
        context = pcm.Context(load)
        for door in ("write_parquet", "compute"):
            walls: list[float] = []
            means: dict[int, float] = {}
            for size in (PIECES[-1], *PIECES):  # the first one loads
                whole = dd.from_pandas(claims, chunksize=size, sort=False)
                if door == "write_parquet":
                    whole = pcm.read_parquet(_written(claims, folder, size))
                waits = pcm.map_partitions(
                    slowly, whole, context=context, meta=whole._meta[["id"]], batch_rows=64
                )
                begun = time.monotonic()
                _through(door, waits, folder / f"{door}-{size}-{len(walls)}")
                walls.append(time.monotonic() - begun)
                log.write_text("")
                answers = pcm.classify(whole, demo_model(), prompt=PROMPT, choices=LABELS)
                _through(door, answers, folder / f"{door}-{size}-{len(walls)}-answers")
                tokens = [int(line) for line in log.read_text().split()]
                means[size] = sum(tokens) / len(tokens)
            name = f"{N_ROWS:,} rows, {door}: a call of 40 ms + 5 ms a row, worst over best piece"
            table.add(name, max(walls[1:]) / min(walls[1:]), "<= 1.15")
            full = means[PIECES[-1]]
            table.add("… classify, pieces of 7: tokens a step over those of 750", means[7] / full)
        pieces = dd.from_pandas(claims, chunksize=1, sort=False)
        plain = pieces.map_partitions(nothing, meta=pieces._meta[["id"]])
        begun = time.monotonic()
        _through("compute", plain, folder)
        name = "… pieces of 1, over plain Dask's time with a function that does nothing"
        table.add(name, walls[1 + PIECES.index(1)] / (time.monotonic() - begun))


def prefixes(table: Rows) -> None:
    """Claims that share evidence, 20 each, with which the prompt begins."""
    rng, words = random.Random(5), "a the of in city river born film year team album".split()
    evidence = [" ".join(rng.choices(words, k=60)) + f" {k}" for k in range(N_EVIDENCE)]
    claims = generate(20 * N_EVIDENCE, seed=2)
    claims["evidence"] = [evidence[k // 20] for k in range(len(claims))]
    found: dict[tuple[str, int], int] = {}
    for n_workers in (1, 2):
        with tempfile.TemporaryDirectory() as name, _cluster(n_workers) as client:
            folder, log = Path(name), Path(name, "steps")
            client.register_plugin(Steps(str(log)))
            pcm.install(client)
            for order in ("in order", "shuffled"):
                rows = claims if order == "in order" else claims.sample(frac=1, random_state=1)
                rows.to_parquet(folder / f"{order}.parquet", index=False)
                log.write_text("")
                whole = pcm.read_parquet(folder / f"{order}.parquet")
                answers = pcm.classify(whole, demo_model(), prompt=PROMPT, choices=LABELS)
                _through("write_parquet", answers, folder / order)
                found[order, n_workers] = sum(map(int, log.read_text().split()))
    name = f"{len(claims):,} claims, 20 to an evidence, in order: tokens of two workers over one's"
    table.add(name, found["in order", 2] / found["in order", 1], "<= 1.05")
    table.add("… shuffled: tokens over those in order, one worker",
              found["shuffled", 1] / found["in order", 1])  # fmt: skip
    table.add("… of two workers over one's, shuffled", found["shuffled", 2] / found["shuffled", 1])


def _written(claims: pd.DataFrame, folder: Path, size: int) -> str:
    """A folder of files of as many rows."""
    target = folder / f"in-{size}"
    if not target.exists():
        target.mkdir()
        for at in range(0, len(claims), size):
            claims.iloc[at : at + size].to_parquet(target / f"{at:06d}.parquet", index=False)
    return str(target)


def _through(door: str, frame: dd.DataFrame, out: Path) -> None:
    if door == "compute":
        frame.compute()
    else:
        pcm.write_parquet(frame, out, progress=False)


def _cluster(n_workers: int) -> Client:
    cluster = LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=":0")
    client = Client(cluster)
    client._own_cluster = cluster
    return client


# -- kill ----------------------------------------------------------------------------------------


class Tokens(WorkerPlugin):  # type: ignore[misc] # Dask has no types
    """Tokens take half a millisecond each, and are counted by process."""

    name = "tokens"

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def setup(self, worker: Any) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        log, append = os.open(f"{self._folder}/{os.getpid()}", flags), Generated.append

        def counting(row: Generated, token: int) -> bool:
            time.sleep(0.0005)
            os.write(log, b".")
            return append(row, token)

        Generated.append = counting  # type: ignore[method-assign,assignment]


def kill(table: Rows) -> None:
    """SIGKILL of a worker amid rows of 1,000 tokens."""
    from dask_pcm.runs.units.flight import DRAFT_S

    with tempfile.TemporaryDirectory() as name:
        folder, counts = Path(name), Path(name, "counts")
        counts.mkdir()

        def counted() -> dict[int, int]:
            return {int(one.name): one.stat().st_size for one in counts.iterdir()}

        model = tiny.llama(max_position_embeddings=2048)
        model.generation_config.eos_token_id = model.config.eos_token_id = None
        llm = pcm.LLM(tiny.saved(folder / "model", model), device="cpu")
        rows = pd.DataFrame({"id": range(32), "topic": [f"the moon {k}" for k in range(32)]})
        rows.to_parquet(folder / "in.parquet")
        ddf = pcm.read_parquet(folder / "in.parquet", rows_per_piece=8)
        texts = pcm.generate(ddf, llm, prompt="{topic}", max_tokens=1000, batch_rows=4)
        with _cluster(2) as client:
            client.register_plugin(Tokens(str(counts)))
            pcm.install(client)
            run = pcm.write_parquet(texts, folder / "out", wait=False, progress=False)
            while max(counted().values(), default=0) < 5000:
                time.sleep(0.05)
            begun, before = time.monotonic(), counted()
            time.sleep(3)
            rates = {pid: n - before.get(pid, 0) for pid, n in counted().items()}
            busier = max(rates, key=lambda pid: rates[pid])
            rate = rates[busier] / (time.monotonic() - begun)
            os.kill(busier, signal.SIGKILL)
            run.wait(600)
            again = sum(counted().values()) - run_tokens(folder / "out")
        table.add("SIGKILL amid rows of 1,000 tokens: tokens computed again", again)
        name = "… over those of an interval of the journal on a worker"
        table.add(name, again / (rate * DRAFT_S), "<= 1")


def run_tokens(out: Path) -> int:
    """Tokens in an output; a token that ends a row is computed and not part of its text."""
    found = pd.read_parquet(out)
    return int(found.n_tokens.sum() + (found.finish_reason == "stop").sum())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = options.parse_args()
    table = Rows()
    for part in args.only:
        globals()[part](table)
    table.write(args.json)


if __name__ == "__main__":
    main()
