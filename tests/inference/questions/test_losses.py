"""Questions whose worker, client or model goes away: real processes, real losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

import dask_pcm as pcm
from dask_pcm.errors import (
    AskError,
    InstallError,
)
from tests.inference.questions.conftest import (
    LONG,
    PROMPT,
    check,
    check_nothing_left,
    expected,
    gate_of,
)
from tests.support.patience import patient, until
from tests.support.signals import heed_interrupts


def _fail_questions_of(marker):
    from dask_pcm.inference.engine.engine import Engine

    run = Engine._run

    def _run(self, parts):
        if any(marker in part.row.tokens[:3] for part in parts):
            raise RuntimeError("a broken forward")
        return run(self, parts)

    Engine._run = _run
    Engine._run_before = run


def _mend():
    from dask_pcm.inference.engine.engine import Engine

    Engine._run = Engine._run_before


def test_a_failing_forward_ends_that_question_alone(client, plain, local):
    live = local[Path(plain.path)]
    wrong = live.padded.tokenize(["yes no maybe"])[0]
    good = live.padded.tokenize([PROMPT])[0]
    assert wrong[0] not in good[:3]
    plain.ask(PROMPT, max_tokens=1)
    client.run(_fail_questions_of, wrong[0])
    try:
        other = plain.stream(PROMPT, max_tokens=50)
        with pytest.raises(AskError, match="has failed: RuntimeError: a broken forward"):
            plain.ask("yes no maybe", max_tokens=5)
        assert "".join(other) == expected(local, plain, PROMPT, max_tokens=50)[1].text
    finally:
        client.run(_mend)


def test_a_release_waits_for_the_answer_and_the_next_question_loads_again(
    client, plain, local, shared_cluster
):
    stream = plain.stream(PROMPT, max_tokens=300)
    pieces = iter(stream)
    first = next(pieces)
    assert pcm.release(plain) >= 1
    assert first + "".join(pieces) == expected(local, plain, PROMPT, max_tokens=300)[1].text
    assert plain.ask(PROMPT, max_tokens=3).n_tokens == 3


def _offload(digest, dask_worker=None):
    from dask_pcm.plugins.worker.plugin import CONTEXTS

    plugin = dask_worker.plugins[CONTEXTS]
    report, plugin.contexts.store._residencies.report = (
        plugin.contexts.store._residencies.report,
        lambda change: None,
    )
    plugin.contexts.store.offload(digest)
    plugin.contexts.store._residencies.report = report


def test_a_worker_that_is_not_warm_any_more_says_so_and_it_is_asked_again(client, plain):
    """The gate does not know yet that the context has left the device."""
    plain.ask(PROMPT, max_tokens=3)
    client.run(_offload, plain.digest)
    stream = plain.stream(PROMPT, max_tokens=3, timeout=30)
    moved = stream._exchange
    until(lambda: _step(stream) and moved._n_moved, 10)
    client.run(_report_absent, plain.digest)
    assert len("".join(stream)) == len(stream.text) > 0


def _step(stream):
    exchange = stream._exchange
    exchange.take(exchange.inbox.get(min(0.05, exchange.patience_s)))
    return True


def _report_absent(digest, dask_worker=None):
    from dask_pcm.ladder.residency import Change
    from dask_pcm.plugins.worker.plugin import CONTEXTS

    contexts = dask_worker.plugins[CONTEXTS].contexts
    contexts._report(Change(digest, contexts.store.tier(digest)))


@pytest.fixture
def asking(cluster, plain, long):
    """A stream of which some has arrived, its pieces, and what it will be: it takes seconds."""
    client = Client.current()
    client.run(_slow_down)
    stream = plain.stream(PROMPT, max_tokens=LONG, progress=False)
    pieces = iter(stream)
    return stream, pieces, next(pieces), long


def _slow_down():
    from dask_pcm.inference.engine.engine import Engine

    step = Engine.step

    def slow(self):
        time.sleep(0.02)
        return step(self)

    Engine.step = slow


def pid_of(client, address):
    return client.run(os.getpid, workers=[address])[address]


def answering(cluster, stream):
    return gate_of(cluster).questions.open[stream._exchange.id].worker


def test_a_worker_that_is_killed_loses_and_repeats_nothing(cluster, asking):
    stream, pieces, first, found = asking
    client = stream._exchange.client
    killed = answering(cluster, stream)
    os.kill(pid_of(client, killed), signal.SIGKILL)
    rest = list(pieces)
    check(stream, [first, *rest], found)
    assert stream._exchange._n_lost == 1


def test_a_worker_under_notice_finishes_its_questions(cluster, asking):
    stream, pieces, first, found = asking
    address = answering(cluster, stream)
    stream._exchange.client.run(_notice, patient(60), workers=[address])
    check(stream, [first, *pieces], found)
    assert stream._exchange._n_moved == stream._exchange._n_lost == 0
    until(lambda: address not in cluster.scheduler.workers, 30, "it leaves then")


def test_questions_move_if_the_notice_is_short(cluster, asking):
    stream, pieces, first, found = asking
    stream._exchange.client.run(_notice, 0.5, workers=[answering(cluster, stream)])
    check(stream, [first, *pieces], found)
    assert (stream._exchange._attempt, stream._exchange._n_lost) == (2, 0)


def _notice(seconds, dask_worker=None):
    from dask_pcm.plugins.worker.plugin import CONTEXTS

    dask_worker.loop.add_callback(dask_worker.plugins[CONTEXTS].notice, seconds)


def test_uninstall_ends_open_questions(cluster, asking):
    stream, pieces, _, _ = asking
    pcm.uninstall(stream._exchange.client)
    with pytest.raises(InstallError, match="call dask_pcm"):
        list(pieces)
    with pytest.raises(InstallError, match="call dask_pcm"):
        pcm.LLM(stream_folder(stream)).ask("x")


def stream_folder(stream):
    return dict(stream._exchange._ref.about)["model"]


def test_a_scheduler_without_the_toolkit_is_said(plain):
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as bare,
        Client(bare) as client,
        pytest.raises(InstallError, match="not installed on this cluster: call dask_pcm"),
    ):
        plain.ask("x", client=client)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_client_that_is_killed_or_interrupted(cluster, plain, number):
    Client.current().run(_slow_down)
    script = (
        "import sys; from distributed import Client; import dask_pcm as pcm\n"
        "client = Client(sys.argv[1])\n"
        "llm = pcm.LLM(sys.argv[2])\n"
        "llm.ask('Claim: the moon', max_tokens=1)\n"
        "try:\n"
        "    print('begun', flush=True)\n"
        "    llm.ask('Claim: the moon', max_tokens=4000)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, cluster.scheduler_address, plain.path]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=heed_interrupts,
        text=True,
    ) as process:
        assert process.stdout.readline() == "begun\n"
        questions = gate_of(cluster).questions
        until(lambda: [one for one in questions.open.values() if one.worker], 10)
        process.send_signal(number)
        with Client(cluster) as client:
            if number == signal.SIGINT:  # the client is still there
                assert process.stdout.readline() == "interrupted\n"
            check_nothing_left(client, cluster)
        process.kill()


def test_without_workers_it_waits_and_says_so(plain, capfd, caplog):
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0") as empty,
        Client(empty) as client,
    ):
        pcm.install(client)
        with pytest.raises(TimeoutError, match=r"no answer after 0.5 s .*no workers"):
            plain.ask("x", timeout=0.5)
        assert "no workers: the cluster has 0" in capfd.readouterr().err
        until(lambda: not gate_of(empty).questions.open, 10)
        stream = plain.stream(PROMPT, max_tokens=3, progress=False)
        stream._exchange._had_workers_at -= 60  # seconds have passed
        pieces = iter(stream)
        thread = threading.Thread(target=lambda: list(pieces))
        thread.start()
        until(lambda: "waits: no workers" in caplog.text, 10)
        empty.scale(1)
        thread.join(patient(40))
        assert stream.reply.n_tokens == 3


def test_loading_is_said_and_only_one_worker_loads(cluster, plain, capfd):
    loads = gate_of(cluster).contexts.loads
    streams = [plain.stream(PROMPT, max_tokens=3) for _ in range(5)]
    assert [len("".join(stream)) > 0 for stream in streams] == [True] * 5
    assert loads[plain.digest].n == 1
    assert "loading 'plain' on a worker" in capfd.readouterr().err
