"""The gate's policy against the papers' runs. The simulator's figures are calibrations.

`dask-pcm simulate` plays the same scenarios: `dask_pcm/simulation/scenarios` says where each number
in them comes from.
"""

from __future__ import annotations

import heapq
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client, LocalCluster, get_worker, wait

import dask_pcm as pcm
from benchmarks.main_job import kill_tree, kill_worker
from benchmarks.table import Rows, parser
from benchmarks.work import BATCH_ROWS, BATCH_S, META, load_wait, note, write_input
from dask_pcm.scheduling.actions import Action, Assign, Load
from dask_pcm.scheduling.events import (
    Event,
    Group,
    HostPlan,
    HostsPlanned,
    ResidencyReported,
    RunClosed,
    RunReported,
    Work,
    WorkEnded,
    WorkerJoined,
    WorkParked,
)
from dask_pcm.scheduling.feed.demand import device_demand
from dask_pcm.scheduling.feed.feed import Feed, UnitSizing
from dask_pcm.scheduling.policy import decide
from dask_pcm.scheduling.rules.drain_time import DrainTime
from dask_pcm.scheduling.rules.placer import Placeable, place
from dask_pcm.scheduling.state.state import GateState
from dask_pcm.simulation import Result, Scenario, read_any, read_scenario, simulate, variants
from dask_pcm.simulation.serving import Serving
from dask_pcm.simulation.serving.device import POLICIES as SERVING_POLICIES
from dask_pcm.simulation.serving.device import long_prompt_rate, play
from dask_pcm.tiers import Tier

#: The papers', in seconds.
ONE_GPU_S, NAIVE_S, PERVASIVE_S, SCALE_OUT_S = 11.4 * 3600, 3 * 3600, 48 * 60, 13.1 * 60
#: Of the log: p10, p50, p90 of join to first call, seconds; and who had begun to infer by its end.
WAITS_S, N_PRODUCTIVE, LOG_S = (77, 99, 130), 66, 302
N_SEEDS = 6
#: Of the scenario "burst": where its first figure was calibrated.
CALIBRATED_RATE = 1.6


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def within(rows: Rows, measure: str, found: float, expected: float) -> None:
    rows.add(f"{measure}, over {expected:g}: off by", abs(found / expected - 1), "<= 0.15")


# -- the papers' runs, simulated -----------------------------------------------------------------


def calibration(rows: Rows) -> None:
    """The log, with the papers' pervasive contexts."""
    results = [simulate(read_scenario("scale-out-186"), "pervasive", s) for s in range(N_SEEDS)]
    waits = [first_waits(result) for result in results]
    counts = [float(len(found)) for found in waits]
    within(rows, f"log, workers productive at {LOG_S} s", mean(counts), N_PRODUCTIVE)
    for name, at, expected in zip(("p10", "p50", "p90"), (1, 5, 9), WAITS_S, strict=True):
        found = mean([statistics.quantiles(found, n=10)[at - 1] for found in waits])
        within(rows, f"log, join to first call, {name}, s", found, expected)
    found = mean([result.makespan_s for result in results])
    within(rows, "scale-out, pervasive, s", found, SCALE_OUT_S)


def first_waits(result: Result) -> list[float]:
    """Seconds from join to first call of workers that had one within the log."""
    first = result.record.first_work_s.items()
    return [at - result.record.joined_s[worker] for worker, at in first if at < LOG_S]


def papers(rows: Rows) -> None:
    one_gpu, twenty = read_scenario("one-gpu"), read_scenario("twenty-gpus")
    within(rows, "one GPU, pervasive, s", simulate(one_gpu, "pervasive").makespan_s, ONE_GPU_S)
    within(rows, "one GPU, ours, s", simulate(one_gpu).makespan_s, ONE_GPU_S)
    within(rows, "twenty GPUs, naive, s", simulate(twenty, "naive").makespan_s, NAIVE_S)
    within(rows, "twenty GPUs, pervasive, s", simulate(twenty, "pervasive").makespan_s, PERVASIVE_S)
    ours = simulate(twenty)
    rows.add("twenty GPUs, ours, s", ours.makespan_s)
    rows.add("… over the lower bound", ours.over_bound)


def scale_out(rows: Rows) -> None:
    scenario = read_scenario("scale-out-186")
    ours, pervasive = simulate(scenario), simulate(scenario, "pervasive")
    share = ours.makespan_s / pervasive.makespan_s
    rows.add("scale-out on the log's joins, ours over pervasive", share, "<= 0.8")
    rows.add("… ours over the lower bound", ours.over_bound, "<= 1.1")
    rows.add("… pervasive over the lower bound", pervasive.over_bound)
    # What if slow workers, not slow copies, are what the log shows? Then we wait for them as well.
    pools = tuple(replace(p, link_bytes_s=((450e6, 0.6), (20e6, 0.4))) for p in scenario.pools)
    baselines = replace(scenario.baselines, slow_share=0.0)
    slow = replace(scenario, pools=pools, baselines=baselines)
    ours, pervasive = simulate(slow), simulate(slow, "pervasive")
    rows.add(
        "… 40 % of workers with slow links instead: ours over pervasive",
        ours.makespan_s / pervasive.makespan_s,
    )
    rows.add("… … ours over the lower bound", ours.over_bound)


def batch_sizes(rows: Rows) -> None:
    """Rows of a task; ours are rows of a piece of the input."""
    sweep = variants(read_scenario("batch-size-sweep"))
    for policy, bar in (("ours", "<= 1.15"), ("naive", ">= 5"), ("pervasive", "")):
        spans = [simulate(scenario, policy).makespan_s for _, scenario in sweep]
        measure = f"task sizes 1 … 7,500, worst over best, {policy}"
        rows.add(measure, max(spans) / min(spans), bar)
    whole = [simulate(in_batches(scenario)).makespan_s for _, scenario in sweep[-3:]]
    rows.add(
        "… ours, where one call takes 1,000 … 7,500 rows: worst over best", max(whole) / min(whole)
    )


def in_batches(scenario: Scenario) -> Scenario:
    """With calls as large as tasks: nothing can be cut smaller."""
    runs = tuple(replace(run, batch_rows=run.task_rows) for run in scenario.runs)
    return replace(scenario, runs=runs)


def short_lives(rows: Rows) -> None:
    scenario = read_scenario("short-lives")
    for policy, bar in (("ours", ">= 0.95"), ("pervasive", ""), ("naive", "")):
        shares = [simulate(scenario, policy, seed).possible_share for seed in range(2)]
        measure = f"workers living 60 s, load 10 s: rows done over possible, {policy}"
        rows.add(measure, min(shares), bar)


# -- real: losses, two speeds, and the policy alone -----------------------------------------------


def losses(rows: Rows) -> None:
    """Real processes, killed."""
    with tempfile.TemporaryDirectory(prefix="pcm-bench-") as scratch:
        folder = Path(scratch) / "in"
        write_input(folder)
        kill_worker(rows, folder, Path(scratch))
        kill_tree(rows, folder, Path(scratch))


def infer_slowly(frame: pd.DataFrame, log: str, slowness: float) -> pd.DataFrame:
    note(log, frame["id"])
    time.sleep(slowness * BATCH_S * len(frame) / BATCH_ROWS)
    return pd.DataFrame({"id": frame["id"], "answer": frame["id"] * 0.5})


def infer_at(frame: pd.DataFrame, log: str) -> pd.DataFrame:
    """A batch that takes three times as long on the second worker."""
    return infer_slowly(frame, log, 3.0 if get_worker().name == 1 else 1.0)


def _by_itself_s(slowness: float, n_calls: int = 20) -> float:
    """Seconds that a batch takes where the function is all that there is."""
    frame = pd.DataFrame({"id": range(BATCH_ROWS), "claim": "a claim of some length"})
    with tempfile.NamedTemporaryFile() as log:
        infer_slowly(frame, log.name, slowness)
        start = time.perf_counter()
        for _ in range(n_calls):
            infer_slowly(frame, log.name, slowness)
        return (time.perf_counter() - start) / n_calls


def speeds(rows: Rows, n_batches: int = 700) -> None:
    """Two workers, one three times as fast as the other; both are warm.

    The bound is what the function by itself could do at these speeds, on both all the time.
    """
    bound_s = n_batches / sum(1 / _by_itself_s(slowness) for slowness in (1.0, 3.0))
    nominal_s = n_batches * BATCH_S / (1 + 1 / 3)
    for known in ("the speeds unknown", "the speeds known from another run"):
        ratios = []
        for _ in range(3):
            with tempfile.TemporaryDirectory(prefix="pcm-bench-") as scratch, workers(2) as client:
                folder, log = Path(scratch) / "in", Path(scratch) / "log"
                _write(folder, n_batches * BATCH_ROWS)
                context = pcm.Context(load_wait, str(log), 0.0)
                frame = pcm.read_parquet(str(folder))
                job = pcm.map_partitions(
                    infer_at, frame, context=context, meta=META, batch_rows=BATCH_ROWS
                )
                wait(client.map(_warm, range(2), ctx=context, workers=[0, 1]))
                if "known from" in known:
                    pcm.write_parquet(job, Path(scratch) / "first", progress=False)
                start = time.monotonic()
                pcm.write_parquet(job, Path(scratch) / "out", progress=False)
                ratios.append((time.monotonic() - start) / bound_s)
        measure = f"two workers, speeds 1:3, {n_batches} batches, {known}: makespan over the bound"
        rows.add(measure, statistics.median(ratios), "<= 1.05")
        nominal = statistics.median(ratios) * bound_s / nominal_s
        rows.add("… over batches of exactly 40 and 120 ms", nominal)


def infer_by_name(frame: pd.DataFrame, log: str) -> pd.DataFrame:
    """A batch of 0.1 s; on the third and fourth worker, of 0.3 s."""
    note(log, frame["id"])
    time.sleep((0.3 if get_worker().name in (2, 3) else 0.1) * len(frame) / BATCH_ROWS)
    return pd.DataFrame({"id": frame["id"], "answer": frame["id"] * 0.5})


def fidelity(rows: Rows) -> None:
    """The scenario `two-speeds`, in the simulator and with real processes."""
    scenario = read_scenario("two-speeds")
    simulated_s = simulate(scenario).makespan_s
    found = []
    for _ in range(3):
        with tempfile.TemporaryDirectory(prefix="pcm-bench-") as scratch, workers(4) as client:
            found.append(_real_s(client, scenario, Path(scratch)))
    real_s = statistics.median(found)
    rows.add("two speeds, one killed: simulated, s", simulated_s)
    rows.add("… real, s (median of three)", real_s)
    rows.add("… simulated over real: off by", abs(simulated_s / real_s - 1), "<= 0.1")


def _real_s(client: Client, scenario: Scenario, scratch: Path) -> float:
    (run,), context = scenario.runs, scenario.contexts["llm"]
    folder, log = scratch / "in", scratch / "log"
    _write(folder, run.n_rows)
    llm = pcm.Context(load_wait, str(log), context.load_s["fast"])
    frame = pcm.read_parquet(str(folder))
    job = pcm.map_partitions(infer_by_name, frame, context=llm, meta=META, batch_rows=BATCH_ROWS)
    pids = client.run(lambda dask_worker: (dask_worker.name, os.getpid()))
    (victim,) = [pid for name, pid in pids.values() if name == 0]
    killer = threading.Timer(scenario.pools[0].lost_s[0] or 0.0, os.kill, (victim, signal.SIGKILL))
    start = time.monotonic()
    killer.start()
    report = pcm.write_parquet(job, scratch / "out", progress=False).report
    if report.rows != run.n_rows:
        raise RuntimeError(f"{report.rows} rows of {run.n_rows}")
    return time.monotonic() - start


def _write(folder: Path, n_rows: int) -> None:
    folder.mkdir(parents=True)
    table = pa.table({"id": range(n_rows), "claim": ["a claim of some length"] * n_rows})
    pq.write_table(table, folder / "claims.parquet")


def _warm(i: int, ctx: object = None) -> int:
    return i


@contextmanager
def workers(n: int) -> Iterator[Client]:
    local = LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=":0", memory_limit=0)
    with local, Client(local) as client:
        pcm.install(client)
        yield client


def alone(rows: Rows, n_units: int = 1_000_000) -> None:
    """The policy by itself, in CPU time of its process: nothing but events and decisions."""
    costs = {}
    for n_workers in (1_000, 10_000):
        played = Played(n_workers, n_units if n_workers == 10_000 else n_units // 5)
        played.run()
        costs[n_workers] = played.decide_s / played.n_assigned
        measure = f"policy alone, {n_workers:,} workers, {played.n_units:,} units"
        bar = "<= 100" if n_workers == 10_000 else ""
        rows.add(f"{measure}: a decision and its events, us", costs[n_workers] * 1e6, bar)
        rows.add("… longest time between two, ms", played.longest_s * 1e3)
        rows.add("… makespan over the lower bound", played.over_bound)
    rows.add(
        "… growth of a decision from 1,000 to 10,000 workers", costs[10_000] / costs[1_000], "<= 2"
    )


class Played:
    """A run of one kind of work on workers that join within a minute and load for ten seconds.

    Units of about a second go through the window of a run. What is measured is what the scheduler
    does: events are applied, and the policy decides. What the run's own process does is not.
    """

    def __init__(self, n_workers: int, n_units: int) -> None:
        self.n_units = n_units
        self.decide_s = self.longest_s = 0.0
        self.n_assigned = 0
        self._now = 0.0
        self._state = GateState()
        self._group = Group(("llm",), "infer", client="client")
        self._units = Feed(UnitSizing(10, 1.0, 10, 2, 0.5))
        self._left = n_units * 10
        self._n_cut = 0
        self._sizes: dict[object, int] = {}
        self._free_at: dict[str, float] = {}
        self._timers: list[tuple[float, int, str, Any]] = []
        draw = random.Random(0)
        self._row_s = {f"w{i}": 0.1 * draw.lognormvariate(0, 0.1) for i in range(n_workers)}
        self._joins = {name: draw.uniform(0, 60) for name in self._row_s}
        for name, at in self._joins.items():
            self._at(at, "join", name)

    @property
    def over_bound(self) -> float:
        """The time that it took, over what it would take if each worker began once it was warm."""
        offers = ((self._joins[name] + 10.0, row_s) for name, row_s in self._row_s.items())
        return self._now / DrainTime(self.n_units * 10, offers).seconds

    def _at(self, at: float, what: str, about: Any) -> None:
        heapq.heappush(self._timers, (at, len(self._timers) + self.n_assigned, what, about))

    def run(self) -> None:
        self._at(0.0, "look", None)
        while self._timers:
            self._now, _, what, about = heapq.heappop(self._timers)
            start = time.process_time()
            parked = 0.0
            if what == "join":
                self._tell(WorkerJoined(about, 2, None, about, "gpu", "pool"))
            elif what == "warm":
                self._tell(ResidencyReported(about, "llm", Tier.DEVICE, seconds=10.0))
            elif what == "end":
                n_rows = self._sizes.pop(about)
                self._units.remove("", n_rows)
                self._tell(WorkEnded(about, is_finished=True))
                parked = self._feed()
            else:
                self._look()
                parked = self._feed()
            actions = decide(self._state, self._now)
            seconds = time.process_time() - start - parked
            self.decide_s += seconds
            self.longest_s = max(self.longest_s, seconds)
            for action in actions:
                self._act(action)

    def _tell(self, event: Event) -> None:
        self._state.apply(event, self._now)

    def _look(self) -> None:
        if self._left:
            self._tell(RunReported("run", self._group, float(self._left), 100))
            self._at(self._now + 0.25, "look", None)
        else:
            self._tell(RunClosed("run"))
        self._units.update_demand(device_demand(self._state, self._group))

    def _feed(self) -> float:
        """Hand over more; return the CPU seconds that cutting it took, which is the client's."""
        sizes, cutting_s = self._units.sizes(lambda: self._left), 0.0
        while True:
            start = time.process_time()
            size = next(sizes, None)
            cutting_s += time.process_time() - start
            if size is None:
                return cutting_s
            self._n_cut += 1
            self._left -= size.n_rows
            self._units.add(size.device, size.n_rows)
            self._sizes[self._n_cut] = size.n_rows
            priority = (0.0, float(self._n_cut))
            self._tell(WorkParked(Work(self._n_cut, self._group, priority, float(size.n_rows))))

    def _act(self, action: Action) -> None:
        if isinstance(action, Load):
            self._at(self._now + 10.0, "warm", action.worker)
        elif isinstance(action, Assign):
            self.n_assigned += 1
            begins = max(self._now, self._free_at.get(action.worker, 0.0))
            ends = begins + self._sizes[action.key] * self._row_s[action.worker]
            self._free_at[action.worker] = ends
            self._at(ends, "end", action.key)


# -- contexts that lend beside contexts that borrow ------------------------------------------------

#: Of the paper on lending: what each context has to lend, or needs, in gibibytes.
LENDS_GIB, N_ON_SERVER = (30, 20, 40, 35, 15, 45, 40, -20, -10, -30), 8


def placer(rows: Rows) -> None:
    """The paper's contexts, repeated until each device of 2 to 32 servers has one.

    Also with some odd bytes more of each, as real devices have to lend.
    """
    for n_servers, most_odd in product((2, 4, 8, 16, 32), (0, 1 << 29)):
        rng = random.Random(n_servers)
        each = Counter(islice(cycle(LENDS_GIB), n_servers * N_ON_SERVER))
        contexts = [
            Placeable(f"{gib} GiB", (gib << 30) + rng.randint(0, most_odd), n)
            for gib, n in each.items()
        ]
        start = time.perf_counter()
        plan = place(contexts, {f"s{k}": N_ON_SERVER for k in range(n_servers)})
        seconds = time.perf_counter() - start
        assert plan is not None
        # No plan evens out more than all memory and all lenders, shared among the servers.
        even = sum(one.spare_bytes * one.n_copies for one in contexts) / n_servers
        name = f"placer, {n_servers} servers" + (", odd bytes" if most_odd else "")
        rows.add(f"{name}: gap to the best plan", plan.gap, "== 0")
        rows.add(
            "… GiB to lend on the server with most, over an even share",
            plan.most_bytes / even,
        )
        rows.add("… borrowers without a lender on their server", plan.n_alone, "== 0")
        rows.add("… seconds", seconds, "<= 10")
    decisions(rows, n_workers=1_000)


def decisions(rows: Rows, n_workers: int) -> None:
    """What a decision costs with a plan of hosts, over without one; in turn."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        for has_plan in (False, True):
            played = Played(n_workers, 20_000)
            if has_plan:
                hosts = {f"w{k}": Counter(llm=1) for k in range(n_workers)}
                played._tell(HostsPlanned(HostPlan(hosts, 0, 0, 0, 0.0)))
            played.run()
            seconds[has_plan].append(played.decide_s)
    rows.add(
        "a decision with a plan of hosts, over without one",
        min(seconds[True]) / min(seconds[False]),
    )


# -- requests to one device, simulated -------------------------------------------------------------


def serving(rows: Rows) -> None:
    """The paper on lending: 20 times as soon under bursts, 4 times as many tokens of a long prompt.

    Both are calibrations: links, memory and the rate of requests were chosen for them.
    """
    spec = read_any("burst")
    assert isinstance(spec, Serving)
    for rate in spec.rates:
        played = {
            policy: [play(spec, policy, rate, seed) for seed in range(3)]
            for policy in SERVING_POLICIES
        }
        order, host, lent = played.values()
        soon = sum(one.first_s(0.5, True) for one in order) / sum(
            one.first_s(0.5, True) for one in lent
        )
        rows.add(f"{rate:g} requests/s: first token of a burst, in order over slices, p50", soon)
        for name, mine in (("host", host), ("lent", lent)):
            ratio = sum(one.tokens_s for one in mine) / sum(one.tokens_s for one in order)
            rows.add(f"… tokens a second, slices ({name}) over in order", ratio)
        if rate == CALIBRATED_RATE:
            within(rows, "… calibrated: sooner", soon, 20)
    of_links = [long_prompt_rate(spec, link) for link in (spec.lent, spec.host)]
    within(rows, "long prompt, calibrated: lent over host", of_links[0] / of_links[1], 4)


PARTS = {
    "placer": placer,
    "serving": serving,
    "calibration": calibration,
    "papers": papers,
    "scale-out": scale_out,
    "batch-sizes": batch_sizes,
    "short-lives": short_lives,
    "fidelity": fidelity,
    "losses": losses,
    "speeds": speeds,
    "alone": alone,
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=list(PARTS))
    given = arguments.parse_args()
    rows = Rows()
    for name, part in PARTS.items():
        if given.only in (None, name):
            part(rows)
    rows.write(given.json)


if __name__ == "__main__":
    main()
