"""The gate's policy against the papers' runs. The simulator's figures are calibrations.

`dask-pcm simulate` plays the same scenarios: `dask_pcm/simulation/scenarios` says where each number
in them comes from.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from benchmarks.table import Rows, parser
from dask_pcm.simulation import Result, Scenario, read_scenario, simulate, variants

#: The papers', in seconds.
ONE_GPU_S, NAIVE_S, PERVASIVE_S, SCALE_OUT_S = 11.4 * 3600, 3 * 3600, 48 * 60, 13.1 * 60
#: Of the log: p10, p50, p90 of join to first call, seconds; and who had begun to infer by its end.
WAITS_S, N_PRODUCTIVE, LOG_S = (77, 99, 130), 66, 302
N_SEEDS = 6


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


# -- real: losses, two speeds, and the policy alone go here ----------------------------------------

PARTS = {
    "calibration": calibration,
    "papers": papers,
    "scale-out": scale_out,
    "batch-sizes": batch_sizes,
    "short-lives": short_lives,
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
