"""The command as a user runs it: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import dask
import pandas as pd
import psutil
import pytest
from click.testing import CliRunner
from distributed import rpc

import dask_pcm as pcm
from dask_pcm.cli import main
from dask_pcm.cli.cluster import client_of
from dask_pcm.factcheck import PROMPT, generate
from tests.support.patience import patient, until
from tests.support.signals import heed_interrupts

DATA = Path(__file__).parents[2] / "data"
CHOICES = "SUPPORTED,REFUTED,NOT ENOUGH INFO"


def command(*args):
    return [str(Path(sys.executable).with_name("dask-pcm")), *map(str, args)]


def run_args(source, out, *more):
    basic = ["--model", "demo", "--prompt", PROMPT, "--choices", CHOICES]
    return ["run", str(source), str(out), *basic, *map(str, more)]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "claims"
    folder.mkdir()
    claims = generate(400, seed=9)
    for i in range(4):
        claims.iloc[i * 100 : i * 100 + 100].to_parquet(folder / f"{i}.parquet", index=False)
    return folder


@pytest.fixture
def invoke(shared_cluster):
    """Run on the cluster that is up already, in this process."""

    def run(*args):
        where = ["--scheduler", shared_cluster.scheduler_address]
        return CliRunner().invoke(main, [*map(str, args), *where])

    return run


def test_the_demo(tmp_path):
    out = tmp_path / "verdicts"
    done = subprocess.run(
        command("demo", "--rows", 1200, "--output", out),
        capture_output=True,
        text=True,
        timeout=patient(110),
    )
    assert done.returncode == 0, done.stderr
    for word in ("rows", "rows/s", "context loads   2 on 2", "loading", "inferring", "accuracy"):
        assert word in done.stdout
    accuracy = float(done.stdout.split("accuracy")[1].strip().rstrip("%"))
    assert accuracy >= 95
    assert done.stderr.startswith("Starting 2 workers on this machine to verify 1,200 generated")
    assert "1,200/1,200 rows" in done.stderr
    found = pd.read_parquet(out)
    assert found.id.tolist() == list(range(1200))
    assert {"label", "answer"} <= set(found.columns)


def test_the_demo_with_a_real_model_claims_no_accuracy(smollm2_folder):
    done = subprocess.run(
        command("demo", "--model", "smollm2", "--rows", 12, "--workers", 1),
        capture_output=True,
        text=True,
        timeout=patient(110),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "to verify 12 generated claims with SmolLM2-135M" in done.stderr
    assert "rows            12 (0 failed" in done.stdout
    assert "% (at chance; the demo's own model is trained for it)" in done.stdout


def test_the_demo_says_what_it_starts_before_it_imports_anything_large(tmp_path):
    """What is imported by then takes under 2 s on a machine of its own."""
    script = """
import sys
from types import ModuleType
package = ModuleType("dask_pcm")  # without the names that it has for users
package.__path__ = [sys.argv[1]]
sys.modules["dask_pcm"] = package
from dask_pcm.cli import main
import click

def echo(text, err):
    found = {"pandas", "pyarrow", "distributed", "torch", "dask.dataframe"} & set(sys.modules)
    print(text, found)
    sys.exit(7)

click.echo = echo
main(["demo", "--workers", "3"])
"""
    package = str(Path(pcm.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", script, package], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith("Starting 3 workers") and done.stdout.endswith("set()\n")


def test_the_demo_overwrites_no_other_job(invoke, source, tmp_path):
    out = tmp_path / "out"
    assert invoke(*run_args(source, out)).exit_code == 0
    done = CliRunner().invoke(main, ["demo", "--rows", "10", "--output", str(out)])
    assert done.exit_code == 1 and "the output of another job" in done.output
    assert len(pd.read_parquet(out)) == 400


def test_a_terminal_shows_a_bar(tmp_path):
    """On a pseudo-terminal: rows, rate, ETA, warm workers and loads in one line."""
    master, slave = pty.openpty()
    # So many that some are done before the others: only then is there an ETA.
    args = command("demo", "--rows", 4_000, "--workers", 1)
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(args, stderr=slave, stdout=subprocess.DEVNULL, env=environment) as demo:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal is gone when the process is
            while chunk := os.read(master, 4096):
                shown += chunk
    os.close(master)
    assert demo.returncode == 0
    text = shown.decode()
    for part in ("4,000/4,000 rows", "100%", "/s", "ETA", "1/1 warm", "1 loads", "━"):
        assert part in text


def test_real_claims_through_the_command(invoke, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    args = run_args(
        DATA / "fever-sample.parquet", out, "--report", report, "--truncate-column", "evidence"
    )
    done = invoke(*args)
    assert done.exit_code == 0, done.output
    found = pd.read_parquet(out)
    sample = pd.read_parquet(DATA / "fever-sample.parquet")
    assert found.id.tolist() == sample.id.tolist()
    assert (found.answer.notna() ^ found.error.notna()).all()
    written = json.loads(report.read_text())
    assert written["rows"] == 500
    assert written["rows_failed"] == found.error.notna().sum()
    again = invoke(*args)
    assert again.exit_code == 0
    assert json.loads(report.read_text())["rows_resumed"] == 500


def test_rows_that_are_too_long_decide_the_exit_code(invoke, source, tmp_path):
    claims = pd.read_parquet(source / "0.parquet")
    claims.loc[:9, "evidence"] = "tennis " * 600
    claims.to_parquet(source / "0.parquet", index=False)
    out, report = tmp_path / "out", tmp_path / "report.json"
    done = invoke(*run_args(source, out, "--report", report, "--max-failed-share", "1%"))
    assert done.exit_code == 3
    assert "10 rows failed, more than max_failed_share=0.01 allows of 400" in done.output
    assert "tokens" in done.output and "--retry-failed" in done.output  # some of the errors
    assert json.loads(report.read_text())["state"] == "failed"
    shown = invoke_here("status", out)
    assert "failed: " in shown.output and "ended by        FailedRowsError" in shown.output
    again = invoke(*run_args(source, out, "--max-failed-share", "0.01"))
    assert again.exit_code == 3  # at once: they have failed already
    allowed = run_args(source, out, "--max-failed-rows", "10", "--report", report)
    assert invoke(*allowed).exit_code == 0
    assert len(pd.read_parquet(out)) == 400
    assert json.loads(report.read_text())["rows_failed"] == 10
    assert invoke(*allowed, "--retry-failed").exit_code == 0
    found = json.loads(report.read_text())
    assert (found["rows_retried"], found["rows_failed"], found["rows"]) == (10, 10, 400)
    cut = run_args(source, tmp_path / "cut", "--truncate-column", "evidence")
    assert invoke(*cut).exit_code == 0


def invoke_here(*args):
    return CliRunner().invoke(main, [*map(str, args)])


def test_extend_and_sample(invoke, source, tmp_path):
    out = tmp_path / "out"
    sampled = invoke(*run_args(source, out, "--sample", "7"))
    assert sampled.exit_code == 0, sampled.output
    assert "7 of 400 rows" in sampled.output and "device-hours" in sampled.output
    assert not out.exists()
    assert invoke(*run_args(source, out)).exit_code == 0
    generate(50, seed=10).assign(id=range(1000, 1050)).to_parquet(source / "0-new.parquet")
    refused = invoke(*run_args(source, out))
    assert refused.exit_code == 1 and "--extend" in refused.output
    assert invoke(*run_args(source, out, "--extend")).exit_code == 0
    assert sorted(pd.read_parquet(out).id) == [*range(400), *range(1000, 1050)]


def test_pools_for_one_command_and_a_connection_file(source, tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_PCM_HOME", str(tmp_path / "home"))
    file, out = tmp_path / "cluster.yaml", tmp_path / "out"
    file.write_text("pools: {cpu: {batch: local, max_jobs: 1}}\n")
    done = invoke_here(*run_args(source, out, "--cluster", file))
    assert done.exit_code == 0, done.output
    assert sorted(pd.read_parquet(out).id) == list(range(400))
    with pcm.PoolCluster(file) as cluster:
        cluster.scale(1)
        other = run_args(source, tmp_path / "other", "--scheduler", cluster.connection_file)
        assert invoke_here(*other).exit_code == 0
    gone = invoke_here(*run_args(source, tmp_path / "gone", "--cluster", tmp_path / "none.yaml"))
    assert gone.exit_code == 1 and "none.yaml' cannot be read" in gone.output


def test_workers_of_the_command_end_without_a_word():
    """One that a nanny started again too: the scheduler is gone, and nobody needs to hear it."""

    async def lose_the_scheduler(dask_worker):
        logging.getLogger("distributed.worker").error("something else")
        with dask.config.set({"distributed.comm.timeouts.connect": "100ms"}):
            scheduler, dask_worker.scheduler = dask_worker.scheduler, rpc("tcp://127.0.0.1:9")
            await dask_worker.heartbeat()
            dask_worker.scheduler = scheduler
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    with client_of(1, None) as client:
        client.restart()
        assert list(client.run(lose_the_scheduler).values()) == [True]
        (said,) = client.get_worker_logs().values()
    assert "something else" in str(said) and "heartbeat" not in str(said)


def test_status_pause_resume_and_cancel_from_another_process(tmp_path):
    """A run in a process of its own, looked at and ended from here."""
    generate(20_000, seed=3).to_parquet(tmp_path / "claims.parquet", index=False)
    out = tmp_path / "out"
    args = command(*run_args(tmp_path / "claims.parquet", out))

    def status():
        assert running.poll() is None
        shown = invoke_here("status", "--json", out)
        return json.loads(shown.output) if shown.exit_code == 0 else {"state": "none yet"}

    def until_it_is(state):
        until(lambda: status()["state"] == state, 60)
        return status()

    missing = invoke_here("status", out)
    assert missing.exit_code == 1 and "no output of dask_pcm" in missing.output
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as running:
        found = until_it_is("running")
        assert str(running.pid) in found["driver"] and found["total"] == 20_000
        assert invoke_here("pause", out).exit_code == 0
        until_it_is("paused")
        assert "paused" in invoke_here("status", out).output
        assert invoke_here("resume", out).exit_code == 0
        until_it_is("running")
        assert invoke_here("cancel", out).exit_code == 0
        _, said = running.communicate(timeout=patient(60))
    assert running.returncode == 130
    assert "was cancelled" in said and "Traceback" not in said
    assert json.loads(invoke_here("status", "--json", out).output)["state"] == "cancelled"
    nobody = invoke_here("pause", out)
    assert nobody.exit_code == 1 and "No run is at work" in nobody.output
    n_done = len(pd.read_parquet(out))
    assert 0 <= n_done < 20_000


def test_prompt_choices_and_columns_from_files_and_repeated(invoke, source, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    (tmp_path / "choices.txt").write_text("SUPPORTED\nREFUTED\n")
    args = ["run", source, tmp_path / "out", "--model", "demo"]
    args += ["--prompt", f"@{tmp_path}/prompt.txt", "--choices", f"@{tmp_path}/choices.txt"]
    args += [
        "--choices",
        "NOT ENOUGH INFO",
        "--keep-columns",
        "id,label",
        "--keep-columns",
        "claim",
    ]
    args += ["--special-tokens-in-fields", "--batch-timeout", "10m"]
    done = invoke(*args)
    assert done.exit_code == 0, done.output
    found = pd.read_parquet(tmp_path / "out")
    assert found.columns.tolist()[:4] == ["id", "label", "claim", "answer"]
    assert set(found.answer) == {"SUPPORTED", "REFUTED", "NOT ENOUGH INFO"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: "nowhere"}, "There is no input at 'nowhere'"),
        ({"--prompt": "{claim} {proof}"}, "The prompt names 'proof'"),
        ({"--prompt": "no field"}, "has no field"),
        ({"--choices": "a,a"}, "choices repeats 'a'"),
        ({"--choices": "a,,b"}, "choices contains an empty string"),
        ({"--model": "./nowhere"}, "no model folder './nowhere'"),
        ({"--prompt": "@nowhere.txt"}, "Cannot read 'nowhere.txt'"),
        ({"--max-failed-share": "120%"}, "is no share of the rows"),
        ({"--keep-columns": "x"}, "keep_columns names 'x'"),
        ({"--report": "/nowhere/at/all.json"}, "The report cannot be written"),
        ({"--scheduler": "tcp://127.0.0.1:9"}, "No scheduler answers at 'tcp://127.0.0.1:9'"),
        ({"--truncate-column": "label"}, "not a field of the prompt"),
        ({"--batch-timeout": "soon"}, "batch_timeout must be a positive duration"),
    ],
)
def test_bad_input_is_one_message_and_no_output(source, tmp_path, change, message, monkeypatch):
    monkeypatch.setitem(dask.config.config["distributed"]["comm"]["timeouts"], "connect", "1h")
    out = tmp_path / "out"
    args = run_args(source, out)
    for where, value in change.items():
        if isinstance(where, int):
            args[where] = value
        elif where in args:
            args[args.index(where) + 1] = value
        else:
            args += [where, value]
    done = CliRunner().invoke(main, args)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert "Traceback" not in done.output
    assert not out.exists()


def test_ctrl_c_leaves_a_resumable_output_and_says_so(tmp_path):
    """SIGINT to the process group, as a terminal sends it; then the same command finishes."""
    generate(4_000, seed=3).to_parquet(tmp_path / "claims.parquet", index=False)
    out, report = tmp_path / "out", tmp_path / "report.json"
    args = command(*run_args(tmp_path / "claims.parquet", out, "--report", report))
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(args, preexec_fn=heed_interrupts, **options) as first:
        until(lambda: len(list(out.glob("part-*.parquet"))) >= 2 or first.poll() is not None, 60)
        os.killpg(first.pid, signal.SIGINT)
        _, said = first.communicate(timeout=patient(60))
    assert first.returncode == 130
    assert "rerun the same command to resume" in said
    assert "Traceback" not in said, said
    assert 0 < len(pd.read_parquet(out)) < 4_000
    assert subprocess.run(args, capture_output=True, timeout=patient(110)).returncode == 0
    assert pd.read_parquet(out).id.tolist() == list(range(4_000))
    assert json.loads(report.read_text())["rows_resumed"] > 0


def test_ctrl_c_while_its_cluster_starts(tmp_path):
    """Dask can close only a cluster that has started."""
    generate(100, seed=3).to_parquet(tmp_path / "claims.parquet", index=False)
    out = tmp_path / "out"
    args = command(*run_args(tmp_path / "claims.parquet", out))
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(args, preexec_fn=heed_interrupts, **options) as driver:
        until(lambda: psutil.Process(driver.pid).children(), 60)
        started = psutil.Process(driver.pid).children(recursive=True)
        os.killpg(driver.pid, signal.SIGINT)
        _, said = driver.communicate(timeout=patient(60))
    assert driver.returncode == 130
    assert "ending as soon as it has started" in said
    assert "Traceback" not in said, said
    until(lambda: not any(process.is_running() for process in started))


@pytest.mark.parametrize("where", ["dask_pcm.cli.cluster.client_of", "dask_pcm.cli.run.inferred"])
def test_ctrl_c_at_any_time_has_its_exit_code(source, tmp_path, monkeypatch, where):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    done = CliRunner().invoke(main, run_args(source, tmp_path / "out"))
    assert done.exit_code == 130 and "Interrupted." in done.output
    monkeypatch.setattr("tempfile.TemporaryDirectory", interrupt)  # before anything is reported
    done = CliRunner().invoke(main, ["demo"])
    assert done.exit_code == 130
    assert done.output.endswith("Interrupted.\n")  # nothing is kept


def test_help_names_the_commands():
    shown = CliRunner().invoke(main, ["--help"]).output
    assert "run" in shown and "demo" in shown
    shown = CliRunner().invoke(main, ["run", "--help"]).output
    assert "--max-failed-rows" in shown and "--max-failed-share" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--workers", "2", "--scheduler", "tcp://nowhere:1"],
            "Give one of --workers, --scheduler and --cluster",
        ),
        (["--sample", "3", "--report", "report.json"], "A sample has no report"),
        (["--max-failed-share", "120%"], "'120%' is no share of the rows"),
        (["--max-failed-share", "a few"], "'a few' is no share of the rows"),
        (["--max-failed-rows", "1%"], "'1%' is not a valid integer range"),
    ],
)
def test_options_that_exclude_each_other(invoke, source, tmp_path, options, message):
    done = invoke(
        "run",
        source,
        tmp_path / "out",
        "--model",
        "demo",
        "--prompt",
        "{claim}",
        "--choices",
        "a,b",
        *options,
    )
    assert done.exit_code == 2 and message in done.output
