"""Workers that a batch system is about to end: ``dask worker`` processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import dask
import pandas as pd
import psutil
import pytest
from distributed import Client, LocalCluster, Nanny, Scheduler, wait

import dask_pcm as pcm
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.plugins.signals import Signals
from dask_pcm.plugins.worker.drain import ends_in_s
from dask_pcm.plugins.worker.plugin import CONTEXTS
from tests.support.gated import poll
from tests.support.patience import patient, until

IMPORTS = ["distributed"]
#: What the batch system leaves, where a test says nothing else; times that are to be kept are as
#: patient as the machine is busy.
NOTICE_S = patient(8.0)


class Job:
    """A ``dask worker`` process, as a batch system starts it."""

    def __init__(self, address, name, folder, *options, **settings):
        command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--name", name]
        settings = {"NOTICE": f"{NOTICE_S}s", "IMPORTS": repr(IMPORTS), **settings}
        said = {f"DASK_PCM__WORKER__{key}": value for key, value in settings.items()}
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--nthreads", "1", "--no-dashboard", *options],
                env={**os.environ, **said},
                stderr=log,
                start_new_session=True,
            )

    def worker(self, client):
        """Address and process of its worker."""

        def found():
            workers = client.scheduler_info(n_workers=-1)["workers"].items()
            return [address for address, about in workers if about["name"] == self.name]

        (address,) = until(found)  # on a busy machine a nanny may have had to start it again
        return address, client.run(os.getpid, workers=[address])[address]

    def signal(self, number, to, client):
        if to == "worker":
            os.kill(self.worker(client)[1], number)
        elif to == "all":
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid, number)

    def ends_within(self, seconds):
        code = self.process.wait(seconds)
        until(lambda: not self.processes(), 5)
        return code

    def processes(self):
        """Whatever it has started is in its session."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != "zombie":
                    found.append(process.pid)
            except (ProcessLookupError, psutil.Error):
                continue
        return found

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        text = self.log.read_text()
        assert "Traceback" not in text, text


@pytest.fixture
def cluster():
    """A scheduler."""
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        LocalCluster(n_workers=0, dashboard_address=":0") as cluster,
    ):
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster) as client:
        yield client


@pytest.fixture
def start(cluster, client, tmp_path):
    """Start jobs of so many names, with the toolkit."""
    jobs = []

    def started(*names, options=(), is_installed=True, **settings):
        new = [
            Job(cluster.scheduler_address, name, tmp_path, *options, **settings) for name in names
        ]
        jobs.extend(new)
        client.wait_for_workers(
            sum(job.process.poll() is None for job in jobs), timeout=patient(30)
        )
        if is_installed:
            pcm.install(client)
        return new

    yield started
    for job in jobs:
        job.close()


def load():
    return "live"


def note(log, *words):
    with Path(log).open("a") as file:
        print(*words, file=file)


def noted(log, word):
    path = Path(log)
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1:] for line in lines if line.startswith(word)]


def work(i, context, log, seconds):
    with pcm.acquire(context):
        note(log, "begin", i, os.getpid())
        time.sleep(seconds)
        note(log, "end", i, os.getpid())
        return i


def n_suspicious(client):
    def count(dask_scheduler):
        return sum(ts.suspicious for ts in dask_scheduler.tasks.values())

    return client.run_on_scheduler(count)


def removals(client):
    events = [event for _, event in client.get_events("all")]
    return [event for event in events if event["action"] == "remove-worker"]


def n_in_memory(client, address):
    def count(dask_scheduler):
        return sum(ts.state == "memory" for ts in dask_scheduler.workers[address].has_what)

    return client.run_on_scheduler(count)


@pytest.mark.parametrize(
    ("number", "to", "options"),
    [
        (signal.SIGTERM, "nanny", ()),
        (signal.SIGUSR1, "worker", ()),
        (signal.SIGUSR1, "nanny", ("--no-nanny",)),
        (signal.SIGTERM, "all", ("--preload-nanny", "dask_pcm.preload")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_worker_takes_its_leave(client, start, tmp_path, number, to, options):
    """It ends what it has begun, its results survive, and nothing is done twice."""
    one, _ = start("one", "other", options=options)
    address, pid = one.worker(client)
    if to == "all":  # the fork server gets it, too
        server = psutil.Process(pid).ppid()
        assert server != one.process.pid and server in one.processes()
    log = tmp_path / "log"
    futures = client.map(work, range(24), context=pcm.Context(load), log=str(log), seconds=0.2)
    until(lambda: n_in_memory(client, address) >= 4)
    ended = len(noted(log, "end"))
    begun = time.monotonic()
    one.signal(number, to, client)
    assert one.ends_within(NOTICE_S) == 0
    took = time.monotonic() - begun
    assert ended < 20 and took < NOTICE_S - 1  # with nothing left to do it does not wait
    assert client.gather(futures) == list(range(24))
    assert Counter(int(i) for i, _ in noted(log, "begin")) == Counter(range(24))
    assert n_suspicious(client) == 0
    (event,) = removals(client)
    assert event["worker"] == address and event["expected"]
    assert not event["lost-computed-tasks"] and not event["processing-tasks"]
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins[GATE].state.validate())


def plain(i, log, seconds):
    note(log, "begin", i, os.getpid())
    time.sleep(seconds)
    return i


def test_plain_tasks_that_have_not_begun_are_done_elsewhere_at_once(client, start, tmp_path):
    one, other = start("one", "other")
    (address, pid), (there, _) = one.worker(client), other.worker(client)
    log = tmp_path / "log"
    long = client.submit(plain, -1, str(log), NOTICE_S / 2, workers=[address])
    until(lambda: noted(log, "begin"))
    futures = client.map(
        plain, range(8), log=str(log), seconds=0, workers=[address], allow_other_workers=True
    )
    # Restricted loosely they wait where they were put; stealing leaves them alone for as long.
    until(lambda: len(client.processing()[address]) + len(client.processing()[there]) > 1, 5)
    one.signal(signal.SIGTERM, "nanny", client)
    assert client.gather(futures) == list(range(8))
    assert not long.done()
    assert one.ends_within(NOTICE_S) == 0
    assert long.result() == -1
    assert noted(log, "begin").count(["-1", str(pid)]) == 1
    assert n_suspicious(client) == 0


def test_what_takes_longer_than_the_notice_is_done_elsewhere(client, start, tmp_path):
    """The worker is gone in time all the same, and nothing that has ended is lost."""
    notice_s = patient(5)
    (one,) = start("one", NOTICE=f"{notice_s}s")
    _, pid = one.worker(client)
    log, context = str(tmp_path / "log"), pcm.Context(load)
    kept = client.map(work, range(3), context=context, log=log, seconds=0)
    wait(kept)
    endless = client.submit(work, 99, context=context, log=log, seconds=600)
    until(lambda: noted(log, "begin 99"))
    start("other")
    begun = time.monotonic()
    one.signal(signal.SIGTERM, "nanny", client)
    assert one.ends_within(1.1 * notice_s) == 0
    assert time.monotonic() - begun > 0.7 * notice_s  # it could have ended by then
    until(lambda: len(noted(log, "begin 99")) == 2)
    (_, first), (_, second) = noted(log, "begin 99")
    assert first == str(pid) != second
    assert client.gather(kept) == [0, 1, 2]
    assert len(noted(log, "begin")) == 3 + 2
    (event,) = removals(client)
    assert event["expected"] and not event["lost-computed-tasks"]
    assert n_suspicious(client) == 0
    endless.cancel()


def test_the_only_worker_leaves_too(client, start, tmp_path):
    """Nobody can take its results: they are computed again once there is another."""
    notice_s = patient(5)
    (one,) = start("one", NOTICE=f"{notice_s}s")
    log, context = str(tmp_path / "log"), pcm.Context(load)
    futures = client.map(work, range(3), context=context, log=log, seconds=0)
    wait(futures)
    futures.append(client.submit(work, 3, context=context, log=log, seconds=600))
    until(lambda: noted(log, "begin 3"))
    one.signal(signal.SIGTERM, "nanny", client)
    assert one.ends_within(1.1 * notice_s) == 0
    (event,) = removals(client)
    assert event["expected"] and len(event["processing-tasks"]) == 1
    assert n_suspicious(client) == 0
    futures.pop().cancel()
    start("other")
    assert client.gather(futures) == [0, 1, 2]


def test_a_load_that_a_notice_ends_is_no_fault_of_its_context(client, start, tmp_path):
    folder = tmp_path / "loads"
    folder.mkdir()

    def slow(folder):
        n_before = len(os.listdir(folder))
        Path(folder, str(n_before)).touch()
        time.sleep(0 if n_before else 600)
        return "live"

    notice_s = patient(2)
    (one,) = start("one", NOTICE=f"{notice_s}s")
    context = pcm.Context(slow, str(folder))
    future = client.submit(work, 1, context=context, log=str(tmp_path / "log"), seconds=0)
    until(lambda: os.listdir(folder))
    one.signal(signal.SIGTERM, "nanny", client)
    assert one.ends_within(1.25 * notice_s) == 0
    start("two")  # on the same node
    assert future.result(patient(60)) == 1

    def errors(dask_scheduler):
        return dict(dask_scheduler.plugins[GATE].state.failures.errors)

    assert not client.run_on_scheduler(errors)


def verdicts(frame, state, log, seconds):
    note(log, "batch", ",".join(map(str, frame["id"])))
    time.sleep(seconds)
    return frame[["id"]]


def n_rows_at(client, address):
    """Rows of the largest unit that a worker has."""

    def rows(dask_scheduler):
        found = [ts.annotations or {} for ts in dask_scheduler.workers[address].processing]
        return max((about.get("pcm_rows", 0) for about in found), default=0)

    return client.run_on_scheduler(rows)


def give_back(job, client):
    """Tell a worker that its cluster does not need it any more."""

    def told(dask_worker):
        dask_worker.handlers["pcm_notice"](3600.0, is_preempted=False)

    client.run(told, workers=[job.worker(client)[0]])


def timed(frame, state, log, seconds):
    note(log, "batch", *map(str, frame["id"]), os.getpid(), time.time())
    time.sleep(seconds)
    return frame[["id"]]


def test_a_worker_that_is_given_back_begins_nothing_more(client, start, tmp_path, claims):
    one, _ = start("one", "other")
    _, pid = one.worker(client)
    log = str(tmp_path / "log")
    frame = pcm.map_partitions(
        timed,
        pcm.read_parquet(claims(n_files=4, n_rows=8)),
        log,
        patient(1.0),
        context=pcm.Context(load),
        meta={"id": "i8"},
        batch_rows=2,
    )
    run = pcm.write_parquet(frame, tmp_path / "out", client=client, progress=False, wait=False)
    # Both lanes have a unit, and one of them waits for its turn.
    until(lambda: sum(pid_ == str(pid) for *_, pid_, _ in noted(log, "batch")) >= 2)
    give_back(one, client)
    told = time.time() + patient(0.2)
    assert one.ends_within(patient(10)) == 0
    run.wait()
    found = noted(log, "batch")
    assert not [when for *_, pid_, when in found if pid_ == str(pid) and float(when) > told]
    assert Counter(int(i) for *ids, _, _ in found for i in ids) == Counter(range(32))
    assert run.report.rows_recomputed == 0


def test_a_preemption_while_a_worker_is_given_back_ends_it_in_time(client, start, tmp_path):
    notice_s = patient(3)
    one, _ = start("one", "other", NOTICE=f"{notice_s}s")
    log = str(tmp_path / "log")
    options = {"log": log, "seconds": 600, "workers": [one.worker(client)[0]]}
    endless = client.submit(work, 1, context=pcm.Context(load), **options)
    until(lambda: noted(log, "begin"))
    give_back(one, client)
    time.sleep(0.5)
    assert one.process.poll() is None
    one.signal(signal.SIGUSR1, "worker", client)
    assert one.ends_within(1.25 * notice_s) == 0
    endless.cancel()


def test_a_run_loses_no_finished_batch_of_a_unit_that_still_ran(client, start, tmp_path, claims):
    notice_s = patient(2)
    one, _ = start("one", "other", NOTICE=f"{notice_s}s")
    address, _ = one.worker(client)
    log = str(tmp_path / "log")
    frame = pcm.map_partitions(
        verdicts,
        pcm.read_parquet(claims(n_files=2, n_rows=200)),
        log,
        0.04 * notice_s,
        context=pcm.Context(load),
        meta={"id": "i8"},
        batch_rows=2,
    )
    # Once its speed is known, each unit is a quarter of what remains.
    with dask.config.set({"pcm.run.unit-seconds": "60s"}):
        run = pcm.write_parquet(frame, tmp_path / "out", client=client, progress=False, wait=False)
        until(lambda: n_rows_at(client, address) >= 50)  # as much work as there is time
    begun = time.monotonic()
    one.signal(signal.SIGTERM, "nanny", client)
    assert one.ends_within(1.25 * notice_s) == 0
    assert time.monotonic() - begun > 0.7 * notice_s  # its time was up
    (event,) = removals(client)
    assert event["expected"] and not event["processing-tasks"]  # they stopped between batches
    run.wait()
    found = pd.read_parquet(tmp_path / "out")
    assert sorted(found.id) == list(range(400)) and found.error.isna().all()
    computed = Counter(i for (rows,) in noted(log, "batch") for i in rows.split(","))
    assert computed.total() == 400  # no batch was begun that could not end
    assert run.report.rows_recomputed == 0
    assert n_suspicious(client) == 0


def is_noticed(client):
    """Whether a worker has told the gate."""
    return client.run_on_scheduler(lambda dask_scheduler: bool(noticed(dask_scheduler)))


def noticed(scheduler):
    workers = scheduler.plugins[GATE].state.workers.values()
    return [view.address for view in workers if view.is_draining]


@pytest.mark.parametrize(
    ("first", "to", "options"),
    [
        (signal.SIGTERM, "nanny", ()),
        (signal.SIGUSR1, "nanny", ()),
        (signal.SIGTERM, "nanny", ("--no-nanny",)),
        (signal.SIGTERM, "all", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sigterm_after_that_ends_it_as_dask_does(client, start, tmp_path, first, to, options):
    (one,) = start("one", NOTICE="60s", options=options)
    log = str(tmp_path / "log")
    # Dask waits for what runs: where there is a nanny for 8 seconds, and else for 30.
    seconds = 6 if options else 600
    long = client.submit(work, 1, context=pcm.Context(load), log=log, seconds=seconds)
    until(lambda: noted(log, "begin"))
    one.signal(first, to, client)
    until(lambda: is_noticed(client))
    time.sleep(0.5)
    assert one.process.poll() is None
    if to != "all":  # Python's own resource tracker would not outlive it
        one.signal(signal.SIGUSR1, to, client)  # that says nothing new
        time.sleep(0.5)
        assert one.process.poll() is None
    assert not removals(client)
    one.signal(signal.SIGTERM, to, client)
    until(lambda: removals(client), 5)
    one.ends_within(patient(12))
    (event,) = removals(client)
    assert not event["expected"]  # it did not take its leave
    long.cancel()


def handlers(dask_worker=None):
    found = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    return [h if isinstance(h, signal.Handlers) else h.__module__ for h in found]


def test_handlers_are_those_of_before_after_uninstall(client, start):
    start("one", is_installed=False)
    ours = "dask_pcm.plugins.signals"
    before = [next(iter(client.run(handlers, nanny=is_its).values())) for is_its in (True, False)]
    assert before[0][0] == "distributed._signals" and before[1] == [signal.SIG_DFL] * 2
    pcm.install(client)
    until(lambda: list(client.run(handlers).values()) == [[ours, ours]])
    assert list(client.run(handlers, nanny=True).values()) == [[ours, ours]]
    pcm.uninstall(client)
    after = [next(iter(client.run(handlers, nanny=is_its).values())) for is_its in (True, False)]
    assert after == before


def test_signals_of_a_notebook_are_the_users():
    before = handlers()
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)

        def is_settled(dask_worker):
            return dask_worker.plugins[CONTEXTS].contexts._loader._work_queue.qsize() == 0

        until(lambda: all(client.run(is_settled).values()))
        assert handlers() == before
        assert list(client.run(handlers).values()) == [[signal.SIG_DFL] * 2]


def test_nor_does_a_nanny_on_the_loop_of_the_main_thread_take_them():
    async def run():
        before = handlers()
        async with (
            Scheduler(dashboard_address=":0", port=0) as scheduler,
            Nanny(scheduler.address, nthreads=1),
            Client(scheduler.address, asynchronous=True) as client,
        ):
            from tests.support.gated import install

            await install(client)
            assert handlers() == before
        assert handlers() == before

    asyncio.run(run())


def test_handlers_of_others_stay():
    """A preload of the user's own, say."""
    calls = []

    def mine(number, frame):
        calls.append(number)

    async def run():
        found = Signals()
        found.listen("somebody", calls.append, 60)
        assert signal.getsignal(signal.SIGUSR1) is mine
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [60, signal.SIGUSR1]
        found.ignore("somebody")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        asyncio.run(run())
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_time_that_is_up_is_as_a_second_signal(monkeypatch):
    calls = []

    async def run():
        def dasks(number, frame):
            calls.append(number)

        dasks.__module__ = "distributed._signals"
        signal.signal(signal.SIGTERM, dasks)
        found = Signals()
        found.listen("somebody", lambda seconds: calls.append("told"), patient(0.5))
        os.kill(os.getpid(), signal.SIGUSR1)
        await poll(lambda: calls, 10, period=0.005)
        assert calls == ["told"] and found.is_listening
        await poll(lambda: len(calls) > 1, 10)
        assert calls == ["told", signal.SIGTERM] and not found.is_listening
        assert signal.getsignal(signal.SIGTERM) is dasks

    before = signal.getsignal(signal.SIGTERM)
    try:
        asyncio.run(run())
    finally:
        signal.signal(signal.SIGTERM, before)


def has_started(dask_worker):
    return dask_worker.process.status.name == "running"


def test_a_worker_says_of_what_job_it_is(cluster, client, start):
    pcm.install(client)
    said, on_hello = [], cluster.scheduler.stream_handlers["pcm-hello"]

    def listen(**message):
        said.append(message)
        on_hello(**message)

    cluster.scheduler.stream_handlers["pcm-hello"] = listen
    start("one", is_installed=False, POOL="owners", WALLTIME="1h")
    until(lambda: said)
    (hello,) = said
    assert hello["pool"] == "owners" and hello["device"]
    assert 3_500 < hello["ends_in_s"] < 3_600
    # Its nanny's life counts, not its own. Dask's nanny gives up one that dies as it starts.
    until(lambda: all(client.run(has_started, nanny=True).values()))
    (pid,) = client.run(os.getpid).values()
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(said) == 2)
    assert said[1]["ends_in_s"] < hello["ends_in_s"]


def test_when_a_worker_ends(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert ends_in_s(None) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert 98 < ends_in_s(None) <= 100
    assert ends_in_s(1e6) > 10_000  # what the user says holds
    assert ends_in_s(1e-3) == 0.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert ends_in_s(None) is None


def test_it_stays_as_long_as_the_gate_may_have_more_for_it(client, cluster, start, monkeypatch):
    notice_s = patient(30)
    (one,) = start("one", NOTICE=f"{notice_s}s")
    address, _ = one.worker(client)
    asked = []

    async def may_get_more(worker):
        asked.append(worker)
        return len(asked) < 4

    monkeypatch.setitem(cluster.scheduler.handlers, "pcm_more", may_get_more)
    begun = time.monotonic()
    one.signal(signal.SIGTERM, "nanny", client)
    assert one.ends_within(0.6 * notice_s) == 0  # there is no more: it does not wait for the end
    assert asked == [address] * 4
    assert time.monotonic() - begun > 4 * 0.5  # each time that it has been idle for so long
