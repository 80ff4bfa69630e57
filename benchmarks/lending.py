"""Memory that workers of a host lend each other: how soon it is back, and what a death leaves.

"reclaim": an engine whose pages are in a neighbour's memory, which wants it back at random moments.
"kills": processes that lend and borrow, killed with SIGKILL at random moments. "copies": pages to
memory of another allocation on a device and back, over those of the host; with --device cuda, and
with two linked devices the same between them, and a context that is restored from there.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import statistics
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.responsive import (
    QUESTION,
    Asked,
    engine_of,
    model,
    play,
    prompts,
    quantile,
)
from benchmarks.table import Rows, parser
from dask_pcm.inference.engine.rows import Generated
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.engine.slabs import Slab
from dask_pcm.inference.engine.timeslice import SLICE_TOKENS
from dask_pcm.ladder.lending import wire
from dask_pcm.ladder.objects.host import Host, LocalKeeper
from dask_pcm.ladder.objects.shelf import Shelf
from dask_pcm.ladder.store import Store

PARTS = ("reclaim", "kills", "copies")
MIB = 1 << 20
N_RECLAIMS, N_KILLS = 100, 200
#: Rows of a borrower, and its own pages: most of the rows wait off its device.
N_ROWS, N_OUT, N_PAGES = 8, 60, 16
#: A process that says nothing for so long hangs.
HANGS_S = 60.0


class Lender:
    """A worker with memory to spare: of a device, whose part this host plays, and of the host."""

    def __init__(self, cluster: str, device_mib: int = 64, host_mib: int = 64) -> None:
        self.shelf = Shelf(host_mib * MIB)
        host = Host(LocalKeeper(self.shelf))
        self.store = Store(host=host, budget=lambda: device_mib * MIB, is_mapped=False)
        self.lending = self.store.lend(lambda: "cpu", lambda: {"cpu": "cpu"})
        self.lending.open(cluster, f"lender {os.getpid()}")


class Borrower:
    """A worker whose engine has memory for few of its rows; the others are at its neighbours."""

    def __init__(self, cluster: str, one: Any, rung: str) -> None:
        self.store = Store(budget=lambda: 0, is_mapped=False)
        self.lending = self.store.lend(devices=lambda: {"cpu": "cpu"})
        self.lending.open(cluster, f"borrower {os.getpid()}")
        self.steps: list[float] = []
        self.engine = engine_of(one, N_PAGES, may_recompute=False, most_bytes=0)
        step, evacuate = self.engine.step, self.engine.evacuate
        #: Seconds of each evacuation.
        self.copies: list[float] = []

        def timed(call: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
            def call_timed() -> None:
                begun = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - begun)

            return call_timed

        self.engine.step = timed(step, self.steps)  # type: ignore[method-assign]
        self.engine.evacuate = timed(evacuate, self.copies)  # type: ignore[method-assign]
        self.serving = Serving(lambda: self.engine, 0, 100)
        self.serving.lend(lambda _, n_bytes: self.lending.borrow(rung, n_bytes))
        self.serving.start()

    def compute(self, rows: list[Asked]) -> Any:
        """Begin to compute rows, as questions; returns their futures."""
        return [
            self.serving.ask(
                Generated(
                    list(row.prompt),
                    lambda _: None,
                    n_prompt=len(row.prompt),
                    n_max=row.n_out,
                    owner=QUESTION,
                )
            )
            for row in rows
        ]


def small() -> Any:
    return model(num_hidden_layers=2, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)


def rows_of(seed: int) -> list[Asked]:
    return [Asked(prompt, N_OUT) for prompt in prompts(N_ROWS, (20, 60), seed)]


# -- reclaim -------------------------------------------------------------------------------------


def reclaim(table: Rows) -> None:
    """Ask for the memory back at random moments, while the borrower computes."""
    one, rng = small(), random.Random(0)
    for rung, what in (("neighbour", "another device"), ("host", "the host")):
        cluster = uuid.uuid4().hex
        lender, borrower = Lender(cluster), Borrower(cluster, one, rung)
        borrower.engine.paging.slabs.most_pages = 10_000  # where pages go that have to move
        lent_first(borrower)
        waited: list[float] = []
        longest: list[float] = []
        n_moved = 0
        leases = lender.lending.leases
        while len(waited) < N_RECLAIMS:
            futures = borrower.compute(rows_of(len(waited)))
            while not all(future.done() for future in futures):
                time.sleep(rng.uniform(0.01, 0.05))
                if not leases.lent_bytes():
                    continue
                n_steps, n_copies = len(borrower.steps), len(borrower.copies)
                before = borrower.engine.paging.n_moved
                begun = time.perf_counter()
                if leases.reclaim():
                    waited.append(time.perf_counter() - begun)
                    around = borrower.steps[max(0, n_steps - 1) :]
                    copies = borrower.copies[n_copies:]
                    longest.append(max(around, default=0.0) + sum(copies))
                    n_moved += borrower.engine.paging.n_moved - before
            for future in futures:
                future.result()
        step_s = statistics.median(borrower.steps)
        table.add(f"memory of {what}: reclaims", len(waited))
        table.add("… pages that moved on, for each", n_moved / len(waited))
        table.add("… seconds until it is back, p50", quantile(waited, 0.5))
        table.add("… p99", quantile(waited, 0.99))
        over = [mine / (SLICE_TOKENS * step_s) for mine in waited]
        table.add(f"… over a slice of {SLICE_TOKENS} steps, p99", quantile(over, 0.99), "<= 1")
        over = [mine / most for mine, most in zip(waited, longest, strict=True)]
        table.add("… over the step that was begun and the copy, p50", quantile(over, 0.5))
        borrower.serving.close()
        for worker in (borrower, lender):
            worker.store.validate()
            worker.store.close()


def lent_first(borrower: Borrower) -> None:
    """Have pages go to memory of neighbours, of any rung, before that of the host."""
    slabs = borrower.engine.paging.slabs
    made = slabs._made

    def made_or_borrowed() -> Slab | None:
        return slabs._borrow("device", 64) or made()

    slabs._made = made_or_borrowed  # type: ignore[method-assign]


# -- kills ---------------------------------------------------------------------------------------


def lend(cluster: str, talk: Connection, seed: int) -> None:
    """A process that lends, and wants its memory back now and then."""
    lender, rng = Lender(cluster), random.Random(seed)
    talk.send("ready")
    while not talk.poll(rng.uniform(0.0, 0.2)):
        lender.lending.leases.reclaim()
    # What is left once the borrower is gone.
    end = time.monotonic() + 10
    leases = lender.lending.leases
    while leases.lent_bytes() and time.monotonic() < end:
        time.sleep(0.01)
    lender.store.validate()
    kept = sum(file.n_bytes for file in lender.shelf._kept.values())
    talk.send(leases.lent_bytes() + kept)


def borrow(cluster: str, talk: Connection, one: Any, seed: int, rung: str) -> None:
    """A process that computes rows with memory that it borrows."""
    borrower = Borrower(cluster, one, rung)
    if rung == "neighbour":
        borrower.engine.paging.slabs.most_pages = 10_000
        lent_first(borrower)
    futures = borrower.compute(rows_of(seed))
    while not borrower.lending.borrowed_bytes and not all(future.done() for future in futures):
        time.sleep(0.001)
    talk.send("borrowed")
    tokens = [future.result()[0] for future in futures]
    end = time.monotonic() + 10
    while borrower.lending.borrowed_bytes and time.monotonic() < end:
        time.sleep(0.01)
    borrower.store.validate()
    talk.send((tokens, borrower.lending.borrowed_bytes, borrower.engine.paging.slabs.n_lent))


def kills(table: Rows, n_kills: int = N_KILLS) -> None:
    """Kill the lender, the borrower or both at a random moment."""
    one = small()
    # Forked, so that each begins with a model at once; one thread, so that nothing is lost by it.
    processes = multiprocessing.get_context("fork")
    shared = _shared_bytes()
    n_wrong = n_leaked = n_hanging = n_lent = n_moments = 0
    for seed in range(n_kills):
        rng = random.Random(seed)
        cluster, who = uuid.uuid4().hex, rng.choice(["lender", "borrower", "both"])
        rung = rng.choice(["neighbour", "host"])
        expected = [play(engine_of(one, 400), [row]).rows[0].tokens for row in rows_of(seed)]
        pipes = [processes.Pipe() for _ in range(2)]
        lender = processes.Process(target=lend, args=(cluster, pipes[0][1], seed))
        borrower = processes.Process(target=borrow, args=(cluster, pipes[1][1], one, seed, rung))
        lender.start()
        n_hanging += _heard(pipes[0][0]) != "ready"
        borrower.start()
        n_hanging += _heard(pipes[1][0]) != "borrowed"
        time.sleep(rng.uniform(0.0, 0.6))
        for process in (lender, borrower):
            if who in ("both", "lender" if process is lender else "borrower"):
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
        n_moments += 1
        if who == "lender":
            found = _heard(pipes[1][0])
            if found is None:
                n_hanging += 1
            else:
                n_wrong += sum(a != b for a, b in zip(found[0], expected, strict=True))
                n_leaked += found[1]
                n_lent += bool(found[2])
        if who == "borrower":
            pipes[0][0].send("the borrower is dead")
            left = _heard(pipes[0][0])
            n_hanging += left is None
            n_leaked += left or 0
        for process in (lender, borrower):
            process.join(HANGS_S)
            if process.is_alive():
                n_hanging += 1
                process.kill()
        n_leaked += len(wire.lenders(cluster))
        for pipe in pipes:
            for end in pipe:
                end.close()
    table.add("processes killed at random moments: lender, borrower or both", n_moments)
    table.add("… borrowers whose lender was killed and that had pages there", n_lent)
    table.add("… rows with other tokens than alone", n_wrong, "== 0")
    table.add("… bytes that are lent or borrowed in the end", n_leaked, "== 0")
    table.add("… shared memory of the host, MiB more than before", (_shared_bytes() - shared) / MIB)
    table.add("… processes that hang", n_hanging, "== 0")


def _heard(pipe: Connection) -> Any:
    """What a process says; None if it says nothing."""
    try:
        return pipe.recv() if pipe.poll(HANGS_S) else None
    except EOFError:
        return None


def _shared_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        (found,) = (line for line in lines if line.startswith("Shmem:"))
    return 1024 * int(found.split()[1])


# -- copies --------------------------------------------------------------------------------------


def copies(table: Rows, device: str) -> None:
    """Pages that leave the device and come back, by where they go."""
    one = small().to(device)
    wait: Callable[[], None] = torch.cuda.synchronize if device != "cpu" else lambda: None
    n_devices = torch.cuda.device_count()
    places = {"the host": None, "another allocation on this device": device}
    if device != "cpu" and n_devices > 1:
        places["another device"] = "cuda:1"
    seconds: dict[str, float] = {}
    for where, there in places.items():
        engine = engine_of(one, 512, may_recompute=False, most_bytes=None if there is None else 0)
        if there is not None:
            engine.paging.lend(functools.partial(_allocated, there), lambda: None)
        (prompt,) = prompts(1, (2000, 2001), 0)
        row = Generated(prompt, lambda _: None, n_prompt=len(prompt), n_max=20, owner=QUESTION)
        engine.add([row])
        while len(row.tokens) == row.n_prompt:
            engine.step()
        taken: list[float] = []
        for _ in range(20):
            engine.paging.forget(row)
            wait()
            begun = time.perf_counter()
            assert engine.paging.out(row, is_wanted=True)
            engine.paging.back(row, [], engine._pool.take(len(row.copies)))
            wait()
            taken.append(time.perf_counter() - begun)
        seconds[where] = statistics.median(taken)
        n_mib = len(row.pages) * engine._pool.kv[0].nbytes / MIB
        table.add(f"{n_mib:.1f} MiB of pages to {where} and back, ms", 1e3 * seconds[where])
    names = list(seconds)
    for where in names[1:]:
        bar = "<= 0.5" if where == "another device" else ""
        table.add(f"… {where} over {names[0]}", seconds[where] / seconds[names[0]], bar)


def _allocated(device: str, _: str, n_bytes: int) -> _Allocated:
    return _Allocated(n_bytes, device)


class _Allocated:
    """Memory of a device, as a lender gives it."""

    is_own = is_wanted_back = False

    def __init__(self, n_bytes: int, device: str) -> None:
        self._memory = torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def memory(self) -> Any:
        return self._memory

    def on_wanted(self, call: Callable[[], None]) -> None:
        pass

    def close(self) -> None:
        self._memory = None


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--device", default="cpu")
    options.add_argument("--kills", type=int, default=N_KILLS)
    args = options.parse_args()
    torch.set_num_threads(1)
    table = Rows()
    parts: dict[str, Callable[[], None]] = {
        "reclaim": lambda: reclaim(table),
        "kills": lambda: kills(table, args.kills),
        "copies": lambda: copies(table, args.device),
    }
    for part in args.only:
        parts[part]()
    table.write(args.json)


if __name__ == "__main__":
    main()
