"""How soon an engine begins with what has just come, and what that costs what was there before.

"burst": short rows that come upon long ones which fill the memory, on the same engine with slices
and with the order of arrival. "clients": two with work all the time. "paging": rows that take turns
and go off the device, or are computed again. "exact": random schedules against each row alone.
"ask": questions to a real worker that a job has in work. Steps count forwards, so they are the same
on any machine; CPU seconds are of one thread, and each ratio is measured within one run, in turn.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from distributed import Client, LocalCluster, WorkerPlugin

from benchmarks.table import Rows, parser
from dask_pcm.inference.engine import step
from dask_pcm.inference.engine.attention import switch
from dask_pcm.inference.engine.capacity import Capacity
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.pages import KVShape, PagePool
from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.rows import Generated
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.engine.timeslice import SLICE_TOKENS, Kind, Owner, TimeSlices, Turns
from tests.support import models as tiny

PARTS = ("burst", "clients", "paging", "exact", "ask")
#: The device: pages of 16 tokens, and tokens of a step.
N_PAGES, BUDGET = 80, 256
#: Long rows, and short ones that come at a step.
N_LONG, LONG_PROMPT, LONG_OUT = 16, (60, 120), 448
N_SHORT, SHORT_PROMPT, SHORT_OUT, SHORT_AT = 40, (20, 40), 16, 40
QUESTION = Owner(Kind.QUESTION, "a")
BATCH = Owner(Kind.BATCH, "a")
VOCABULARY = 4096
N_REPEATS = 5


class Arrival(TimeSlices):
    """First come first served: no overtaking, and the newest rows make room."""

    def n_slices(self, row: Turns) -> int:
        return 0

    def turn(self, row: Turns, now: int) -> tuple[int, int]:
        return 0, row.began_at

    def may_displace(self, row: Turns, other: Turns, now: int) -> bool:
        return False


@dataclass
class Asked:
    """A row of a workload, and when it had its tokens: by steps, and in seconds."""

    prompt: list[int]
    n_out: int
    at_step: int = 0
    owner: Owner = QUESTION
    number: int = 0
    begun: tuple[int, float] = (0, 0.0)
    told: list[tuple[int, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def first(self) -> tuple[int, float]:
        """Steps and seconds to the first token."""
        return self.told[0][0] - self.begun[0], self.told[0][1] - self.begun[1]

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        times = [at for _, at in self.told]
        return [b - a for a, b in itertools.pairwise(times)]


@dataclass
class Played:
    """What a workload took."""

    rows: list[Asked]
    n_steps: int
    wall_s: float
    cpu_s: float
    engine: Engine


def model(**options: Any) -> Any:
    """A small random model whose greedy tokens vary."""
    made = tiny.llama(
        **{
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 688,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            **options,
        }
    )
    for values in made.parameters():
        if values.dim() == 2:
            torch.nn.init.normal_(values, std=0.06)
    switch(made)
    return made


def engine_of(
    one: Any,
    n_pages: int = N_PAGES,
    budget: int = BUDGET,
    slices: TimeSlices | None = None,
    **more: Any,
) -> Engine:
    config = one.config
    dim = config.hidden_size // config.num_attention_heads
    shape = KVShape(config.num_hidden_layers, config.num_key_value_heads, dim, dim)
    pool = PagePool(n_pages, shape, one.dtype, one.device)
    capacity = Capacity(budget, most=budget, least=1)
    return Engine(
        one, pool, capacity, config.vocab_size, slices=slices, paging=Paging(pool, **more)
    )


def prompts(n: int, lengths: tuple[int, int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(*lengths))] for _ in range(n)]


def play(engine: Engine, rows: Sequence[Asked], sampling: Sampling | None = None) -> Played:
    """Compute rows that come at their steps."""
    late = sorted(rows, key=lambda one: one.at_step)
    begun, cpu = time.perf_counter(), time.process_time()
    n_steps = 0
    while late or engine.n_rows:
        while late and (late[0].at_step <= n_steps or not engine.n_rows):
            engine.add([row_of(late.pop(0), engine, sampling)])
        engine.step()
        n_steps += 1
    wall_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    return Played(list(rows), n_steps, wall_s, cpu_s, engine)


def row_of(one: Asked, engine: Engine, sampling: Sampling | None = None) -> Generated:
    """A row of an engine, which notes when it has its tokens."""
    one.begun = engine.n_steps, time.perf_counter()

    def tell(_: int) -> None:
        one.told.append((engine.n_steps, time.perf_counter()))

    def done(found: Any) -> None:
        one.tokens = found

    return Generated(
        list(one.prompt),
        done,
        n_prompt=len(one.prompt),
        n_max=one.n_out,
        owner=one.owner,
        number=one.number,
        on_token=tell,
        sampling=sampling or Sampling(),
    )


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


# -- burst ---------------------------------------------------------------------------------------


def shorts(at_step: int = SHORT_AT) -> list[Asked]:
    return [Asked(one, SHORT_OUT, at_step) for one in prompts(N_SHORT, SHORT_PROMPT, 2)]


def longs(owner: Owner = QUESTION, n_out: int = LONG_OUT) -> list[Asked]:
    return [Asked(one, n_out, owner=owner) for one in prompts(N_LONG, LONG_PROMPT, 1)]


def in_order_of_arrival(one: Any, rows: Sequence[Asked]) -> Played:
    most, step._MOST_MISSES = step._MOST_MISSES, 1
    try:
        return play(engine_of(one, slices=Arrival()), rows)
    finally:
        step._MOST_MISSES = most


def burst(table: Rows) -> None:
    """Short rows upon long ones; both are questions of one client, or the long ones are a batch."""
    one = model()
    idle = [row.first[0] for row in play(engine_of(one), shorts(0)).rows]
    table.add("idle engine: steps to the first token, p50", quantile(idle, 0.5))
    for owner in (QUESTION, BATCH):
        for n_out in (192, LONG_OUT) if owner is QUESTION else (LONG_OUT,):
            _burst(table, one, owner, n_out, idle)


def _burst(table: Rows, one: Any, owner: Owner, n_out: int, idle: Sequence[int]) -> None:
    of = f"longs of {n_out} ({owner.kind.value})"
    is_fixed = n_out == LONG_OUT
    ours: list[Played] = []
    theirs: list[Played] = []
    for _ in range(N_REPEATS if is_fixed and owner is QUESTION else 1):
        ours.append(play(engine_of(one), [*longs(owner, n_out), *shorts()]))
        theirs.append(in_order_of_arrival(one, [*longs(QUESTION, n_out), *shorts()]))
    for row, same in zip(ours[0].rows, theirs[0].rows, strict=True):
        assert row.tokens == same.tokens, "a token differs"
    mine, other = ([row.first for row in played[0].rows[N_LONG:]] for played in (ours, theirs))
    for q, bar in ((0.5, 1.5), (0.99, 1.25)):
        steps = quantile([n for n, _ in mine], q) / quantile(idle, q)
        name = f"{of}: steps to the first token over those of an idle engine, p{100 * q:g}"
        table.add(name, steps, f"<= {bar}" if is_fixed else "")
    for q, least in ((0.5, 20), (0.99, 10)):
        wall = quantile([s for _, s in other], q) / quantile([s for _, s in mine], q)
        name = f"{of}: … in seconds, first come first served over ours, p{100 * q:g}"
        table.add(name, wall, f">= {least}" if is_fixed else "")
    table.add(
        f"{of}: steps in all, ours over first come first served",
        ours[0].n_steps / theirs[0].n_steps,
        "<= 1.05" if is_fixed else "",
    )
    cpu = statistics.median(a.cpu_s / b.cpu_s for a, b in zip(ours, theirs, strict=True))
    table.add(f"{of}: CPU seconds in all, …", cpu, "<= 1.10" if is_fixed else "")
    gaps = [
        quantile([gap for row in played[0].rows[:N_LONG] for gap in row.gaps], 0.99)
        for played in (ours, theirs)
    ]
    table.add(f"{of}: between tokens of the long ones, p99, ours over …", gaps[0] / gaps[1])
    paging = ours[0].engine.paging
    table.add(f"{of}: rows sent off the device", paging.n_out)
    n_pages = paging.n_sent + paging.n_unchanged
    table.add(
        f"{of}: pages sent over pages of rows that went",
        paging.n_sent / max(1, n_pages),
        "<= 0.25" if is_fixed and owner is QUESTION else "",
    )


# -- clients -------------------------------------------------------------------------------------


class Busy:
    """Keeps an engine in work: as soon as one of its rows has ended, another one comes."""

    def __init__(self, owner: Owner, n_open: int, lengths: tuple[int, int], n_out: int) -> None:
        self.owner = owner
        self._n_missing = n_open
        self._lengths = lengths
        self._n_out = n_out
        self._rng = random.Random(n_open)

    def come(self, engine: Engine) -> None:
        """Add what is missing."""
        for _ in range(self._n_missing):
            (prompt,) = prompts(1, self._lengths, self._rng.randrange(1 << 30))
            engine.add(
                [
                    Generated(
                        prompt,
                        self._ended,
                        n_prompt=len(prompt),
                        n_max=self._n_out,
                        owner=self.owner,
                    )
                ]
            )
        self._n_missing = 0

    def _ended(self, _: Any) -> None:
        self._n_missing += 1


def clients(table: Rows) -> None:
    """Two clients with work all the time, the rows of one five times as long."""
    one = model(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    for kind in Kind:
        engine = engine_of(one)
        both = (
            Busy(Owner(kind, "a"), 50, LONG_PROMPT, 200),
            Busy(Owner(kind, "b"), 60, SHORT_PROMPT, 40),
        )
        most = 0.0
        for n_steps in range(2000):
            for client in both:
                client.come(engine)
            engine.step()
            served = [engine.schedule._slices.served(client.owner) for client in both]
            if n_steps > 50:
                most = max(most, abs(served[0] - served[1]))
        longest = LONG_PROMPT[1] + SLICE_TOKENS
        name = f"two clients ({kind.value}): tokens served apart at most, over prompt + slice"
        table.add(name, most / longest, "<= 2")
        n_sent = engine.paging.n_sent / engine.n_steps
        table.add("… pages sent in a step, of those on the device", n_sent / N_PAGES)


# -- paging --------------------------------------------------------------------------------------


def paging(table: Rows) -> None:
    """Long rows that take turns: sent off the device, or computed again."""
    one = model()
    ratios = []
    for _ in range(N_REPEATS):
        sent = play(engine_of(one, may_recompute=False), longs())
        again = play(engine_of(one, most_bytes=0), longs())
        priced = play(engine_of(one), longs())
        ratios.append((again.cpu_s / sent.cpu_s, again.cpu_s / priced.cpu_s))
        assert [row.tokens for row in sent.rows] == [row.tokens for row in again.rows]
    name = "slices of 16: CPU seconds, computed again over sent off the device"
    table.add(name, statistics.median(a for a, _ in ratios), ">= 1.5")
    table.add("… over ours, by price", statistics.median(b for _, b in ratios), ">= 1.5")
    found = sent.engine.paging
    name = "… pages sent over pages of rows that went"
    table.add(name, found.n_sent / (found.n_sent + found.n_unchanged), "<= 0.25")


# -- exact ---------------------------------------------------------------------------------------


#: Where rows go: by price, nowhere (they are computed again), and always off the device.
MEMORIES: list[dict[str, Any]] = [{}, {"most_bytes": 0}, {"may_recompute": False}]


def exact(table: Rows, n_schedules: int = 200) -> None:
    """Random schedules: every row's tokens are those that it has alone."""
    one = model(num_hidden_layers=2, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    n_rows = n_wrong = n_leaked = 0
    for seed in range(n_schedules):
        rng = random.Random(seed)
        rows = random_rows(rng)
        need = max(-(-(len(row.prompt) + row.n_out) // 16) for row in rows)
        engine = engine_of(
            one,
            rng.randint(need, 3 * need),
            rng.choice([16, 64, 256]),
            TimeSlices(rng.choice([1, 4, 16])),
            **rng.choice(MEMORIES),
        )
        sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=seed)
        play(engine, rows, sampling)
        engine.schedule._held.validate()
        while engine.schedule.prefixes.drop_one():
            pass
        n_leaked += engine._pool.n_pages - engine._pool.n_free + engine.paging.slabs.n_used
        for row in rows:
            alone = Asked(row.prompt, row.n_out, number=row.number)
            play(engine_of(one, need), [alone], sampling)
            n_rows, n_wrong = n_rows + 1, n_wrong + (alone.tokens != row.tokens)
    table.add("random schedules: rows", n_rows)
    table.add("… of which have other tokens than alone", n_wrong, "== 0")
    table.add("… pages that are not free in the end", n_leaked, "== 0")


def random_rows(rng: random.Random) -> list[Asked]:
    shared = [rng.randrange(3, VOCABULARY) for _ in range(rng.choice([0, 0, 40]))]
    return [
        Asked(
            [*shared, *(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 90)))],
            rng.randint(1, 60),
            rng.choice([0, 0, rng.randint(1, 60)]),
            Owner(rng.choice([*Kind]), rng.choice("ab")),
            number=k,
        )
        for k in range(rng.randint(6, 20))
    ]


# -- ask -----------------------------------------------------------------------------------------

#: Windows of a job, of which every other one has questions, and their seconds.
N_WINDOWS, WINDOW_S = 12, 6.0


class Steps(WorkerPlugin):  # type: ignore[misc] # its types are not shipped
    """Counts what an engine computes on a worker, and when its questions have their first token."""

    name = "steps"

    def setup(self, worker: Any) -> None:
        from dask_pcm.inference.engine.engine import Engine

        #: Time, tokens of batches and steps so far; and of questions, their steps and tokens.
        self.counted: list[tuple[float, int, int]] = [(time.monotonic(), 0, 0)]
        self.questions: list[tuple[int, int]] = []
        run, add = Engine._run, Engine.add

        def running(engine: Any, parts: Any) -> None:
            run(engine, parts)
            n = sum(part.n_tokens for part in parts if part.row.owner.kind is Kind.BATCH)
            _, before, _ = self.counted[-1]
            self.counted.append((time.monotonic(), before + n, engine.n_steps))

        def adding(engine: Any, rows: Any) -> None:
            for row in rows:
                if row.owner.kind is Kind.QUESTION:
                    self._watch(engine, row)
            add(engine, rows)

        Engine._run, Engine.add = running, adding  # type: ignore[method-assign,assignment]

    def _watch(self, engine: Any, row: Any) -> None:
        begun, told = engine.n_steps, row.on_token

        def tell(token: int) -> None:
            if len(row.new) == 1:
                self.questions.append((engine.n_steps + 1 - begun, row.n_prompt))
            told(token)

        row.on_token = tell


def counted(dask_worker: Any) -> tuple[Any, Any]:
    plugin = dask_worker.plugins["steps"]
    return list(plugin.counted), list(plugin.questions)


class Heard:
    """A stream, read on a thread: when each of its pieces came."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.begun = time.monotonic()
        self.at: list[float] = []
        self.text = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for piece in self._stream:
            self.at.append(time.monotonic())
            self.text += piece

    def wait(self) -> None:
        self._thread.join()
        assert self.text == self._stream.reply.text


def ask(table: Rows) -> None:
    """Questions, one a second, to a worker whose engine a job of long texts has full."""
    import dask_pcm as pcm

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = model(
            vocab_size=tiny.N_TOKENS,
            num_hidden_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        made.generation_config.eos_token_id = made.config.eos_token_id = None
        llm = pcm.LLM(tiny.saved(folder / "model", made), device="cpu")
        rng = random.Random(0)
        topics = [f"moon {k}" + " a b" * rng.randint(0, 20) for k in range(60_000)]
        rows = pd.DataFrame({"id": range(len(topics)), "topic": topics})
        rows.to_parquet(folder / "in.parquet")
        texts = pcm.generate(
            pcm.read_parquet(folder / "in.parquet"), llm, prompt="{topic}", max_tokens=60
        )
        with (
            LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            client.register_plugin(Steps())
            pcm.install(client)
            run = pcm.write_parquet(texts, folder / "out", wait=False, progress=False)
            while sum(len(found[0]) for found in client.run(counted).values()) < 100:
                time.sleep(0.1)
            heard, windows = asked_in_windows(llm)
            (found,) = client.run(counted).values()
            run.cancel()
    of_step, questions = found
    rates = [tokens_a_step(of_step, *window) for window in windows]
    print("tokens of the job in a step, by window:", *(f"{rate:.1f}" for rate in rates))
    ratio = statistics.median(b / a for a, b in zip(rates[::2], rates[1::2], strict=True))
    table.add("tokens of the job in a step, with questions over without", ratio, ">= 0.97")
    longest = max(n_steps - -(-n_prompt // BUDGET) for n_steps, n_prompt in questions)
    table.add("steps to the first token beside the prompt's own, most", longest, "<= 3")
    table.add("questions", len(questions))
    heard = [one for one in heard if one.at]  # a random model may say control tokens alone
    firsts = [one.at[0] - one.begun for one in heard]
    table.add("seconds from asking to the first piece, p50", statistics.median(firsts))
    table.add("… most, that of the first question among them", max(firsts))
    most = max(max(sum(t <= u < t + 1 for u in one.at) for t in one.at) for one in heard)
    table.add("pieces of a stream in any second", most, "<= 20")


def asked_in_windows(llm: Any) -> tuple[list[Heard], list[tuple[float, float]]]:
    """Ask in every other window; when each window began and ended."""
    heard: list[Heard] = []
    windows: list[tuple[float, float]] = []
    for k in range(N_WINDOWS):
        begun = time.monotonic()
        while (now := time.monotonic()) < begun + WINDOW_S:
            if k % 2:
                heard.append(Heard(llm.stream(f"Why {k}? {now}", max_tokens=40, progress=False)))
            time.sleep(1.0)
        windows.append((begun, time.monotonic()))
        for one in heard:
            one.wait()
    return heard, windows


def tokens_a_step(of_step: Any, begun: float, ended: float) -> float:
    """Tokens of batches in a step, in a window."""
    mine = [one for one in of_step if begun <= one[0] <= ended]
    return float((mine[-1][1] - mine[0][1]) / (mine[-1][2] - mine[0][2]))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = options.parse_args()
    torch.set_num_threads(1)
    table = Rows()
    parts: dict[str, Callable[[Rows], None]] = {
        "burst": burst,
        "clients": clients,
        "paging": paging,
        "exact": exact,
        "ask": ask,
    }
    for part in args.only:
        parts[part](table)
    table.write(args.json)


if __name__ == "__main__":
    main()
