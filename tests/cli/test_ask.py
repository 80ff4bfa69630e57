"""``dask-pcm ask`` as a user runs it, beside a run in another process."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from click.testing import CliRunner
from distributed import Client

import dask_pcm as pcm
from dask_pcm.cli import main
from dask_pcm.factcheck.demo import demo_model, write_claims
from tests.cli.test_cli import command, run_args
from tests.support.patience import patient, until
from tests.support.signals import heed_interrupts

QUESTION = "Claim: the moon is round."


@pytest.fixture
def invoke(client, shared_cluster):
    """Run on the cluster that is up already, in this process."""

    def run(*args):
        where = ["--scheduler", shared_cluster.scheduler_address]
        return CliRunner().invoke(main, ["ask", *map(str, args), *where])

    return run


def test_the_only_model_that_the_cluster_knows_answers(invoke, client, tmp_path):
    found = invoke(QUESTION)
    assert found.exit_code == 1 and "knows no language model yet" in found.stderr
    expected = demo_model().ask(QUESTION, max_tokens=8, client=client)
    file = tmp_path / "question.txt"
    file.write_text(f"{QUESTION}\n")
    for question in (QUESTION, f"@{file}"):
        found = invoke(question, "--max-tokens", 8)
        assert (found.exit_code, found.stdout) == (0, f"{expected.text}\n")
    found = invoke(QUESTION, "--max-tokens", 8, "--model", "demo", "--raw", "--stop", "never said")
    assert (found.exit_code, found.stdout) == (0, f"{expected.text}\n")
    folder = dict(demo_model().ref.about)["model"]
    assert invoke(QUESTION, "--max-tokens", 8, "--model", folder).stdout == found.stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "/no/such/folder"], "There is no model folder"),
        (["--model", "/no/such/folder"], "The cluster knows these models: 'demo'"),
        (["--model", "demo", "--temperature", "-1"], "temperature"),
        (["--model", "demo", "--timeout", "soon"], "timeout must be seconds"),
    ],
)
def test_mistakes_are_said_in_one_message(invoke, client, options, text):
    demo_model().ask(QUESTION, max_tokens=1, client=client)
    found = invoke(QUESTION, *options)
    assert found.exit_code == 1 and text in found.stderr and "Traceback" not in found.stderr


def test_arguments_that_do_not_fit_are_refused(invoke, tmp_path):
    assert invoke("one", "two").exit_code == 2
    found = CliRunner().invoke(main, ["ask", "--scheduler", "tcp://127.0.0.1:9", ""])
    assert found.exit_code == 1 and "The question is empty" in found.stderr
    assert CliRunner().invoke(main, ["ask", "one"]).exit_code == 2
    found = CliRunner().invoke(main, ["ask", str(tmp_path), QUESTION])
    assert found.exit_code == 1 and "There is no output of dask_pcm" in found.stderr


def test_the_run_of_an_output_is_asked_while_it_works(tmp_path):
    source, out = tmp_path / "claims", tmp_path / "out"
    write_claims(source, 40_000)
    options = ["--batch-timeout", "10m", "--workers", "1"]
    with subprocess.Popen(
        command(*run_args(source, out), *options),
        stderr=subprocess.DEVNULL,
        preexec_fn=heed_interrupts,
    ) as run:
        try:
            until(lambda: any(out.glob("part-*")), 60)
            asked = subprocess.run(
                command("ask", out, QUESTION, "--max-tokens", 8),
                capture_output=True,
                text=True,
                timeout=patient(60),
            )
            assert asked.returncode == 0, asked.stderr
            assert run.poll() is None  # it was at work meanwhile
            assert pcm.attach(out).status in ("running", "finished")
        finally:
            run.send_signal(signal.SIGINT)
            run.wait(patient(30))
    live = pytest.importorskip("dask_pcm.inference.loading").load_model(demo_model().path)
    assert asked.stdout == f"{live.generate([QUESTION], max_tokens=8)[0].text}\n"
    found = CliRunner().invoke(main, ["ask", str(out), QUESTION])
    assert found.exit_code == 1 and "No run is at work" in found.stderr


def test_a_command_that_is_interrupted_ends_its_question(client, shared_cluster):
    demo_model().ask(QUESTION, max_tokens=1, client=client)
    where = ["--scheduler", shared_cluster.scheduler_address]
    # A model without an end that it would come to soon.
    asked = ["ask", QUESTION, "--max-tokens", 100_000, "--temperature", 5, *where]
    with subprocess.Popen(
        command(*asked), stdout=subprocess.PIPE, preexec_fn=heed_interrupts
    ) as process:
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        code = process.wait(patient(20))
    assert code in (0, 130)
    with Client(shared_cluster):
        gate = shared_cluster.scheduler.plugins["pcm-gate"]
        until(lambda: not gate.questions.open, 10)
