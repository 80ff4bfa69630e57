"""``dask-pcm run``: what it computes, and options that do not fit together."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from dask_pcm.cli import main
from dask_pcm.factcheck import PROMPT, generate
from tests.cli.test_cli import CHOICES


@pytest.fixture
def invoke(shared_cluster):
    """Run on the cluster that is up already, in this process."""

    def run(*args):
        where = ["--scheduler", shared_cluster.scheduler_address]
        return CliRunner().invoke(main, [*map(str, args), *where])

    return run


@pytest.fixture
def source(tmp_path):
    generate(40, seed=3).to_parquet(tmp_path / "claims.parquet", index=False)
    return tmp_path / "claims.parquet"


def asked(source, out, *options):
    return ["run", str(source), str(out), "--model", "demo", *map(str, options)]


def test_texts_are_continued(invoke, source, tmp_path):
    out = tmp_path / "out"
    options = ("--prompt", PROMPT, "--generate", "--max-tokens", 5, "--temperature", 0.8)
    done = invoke(*asked(source, out, *options, "--n", 2, "--seed", 7, "--keep-columns", "id"))
    assert done.exit_code == 0, done.output
    found = pd.read_parquet(out)
    assert [*found.columns] == ["id", "text", "n_tokens", "finish_reason", "error"]
    assert {len(row) for row in found.text} == {2} and len(found) == 40


def test_answers_have_their_scores(invoke, source, tmp_path):
    out = tmp_path / "out"
    options = ("--prompt", PROMPT, "--choices", CHOICES, "--logprobs", "--normalize", "tokens")
    done = invoke(*asked(source, out, *options))
    assert done.exit_code == 0, done.output
    assert {len(row) for row in pd.read_parquet(out).logprobs} == {3}


def test_texts_become_vectors(invoke, source, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    options = ("--prompt", "{claim}", "--embed", "--pooling", "mean", "--report", report)
    done = invoke(*asked(source, out, *options))
    assert done.exit_code == 0, done.output
    vectors = np.stack(pd.read_parquet(out).embedding)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert json.loads(report.read_text())["state"] == "finished"


FUNCTION = """
LENGTHS = {"a": 1}

def verdicts(df, model):
    answers = model.classify([f"Claim: {one}" for one in df["claim"]], ["SUPPORTED", "REFUTED"])
    return df[["id"]].assign(verdict=[one.answer for one in answers], n=LENGTHS["a"])
"""


@pytest.mark.parametrize("where", ["my_checks", "{folder}/my_checks.py"])
def test_a_function_of_a_module_here_or_of_a_file(invoke, source, tmp_path, monkeypatch, where):
    """Workers do not have the module."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my_checks.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(str(tmp_path))  # restores sys.path afterwards
    monkeypatch.delitem(sys.modules, "my_checks", raising=False)
    if "{" not in where:
        monkeypatch.chdir(folder)
    out = tmp_path / "out"
    name = f"{where.format(folder=folder)}:verdicts"
    options = ("--function", name, "--keep-columns", "id", "--adds", "verdict", "--adds", "n=int64")
    done = invoke(*asked(source, out, *options, "--batch-rows", 8))
    assert done.exit_code == 0, done.output
    found = pd.read_parquet(out)
    assert [*found.columns] == ["id", "verdict", "n", "error"]
    assert set(found.verdict) <= {"SUPPORTED", "REFUTED"} and found.error.isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give one of --choices, --generate, --embed, --function"),
        (["--prompt", "{claim}", "--choices", "a,b", "--embed"], "Give one of"),
        (["--prompt", "{claim}", "--generate"], "--generate needs --max-tokens"),
        (["--choices", "a,b"], "--choices needs --prompt"),
        (
            ["--prompt", "{claim}", "--choices", "a,b", "--max-tokens", "3"],
            "--max-tokens belongs to --generate, not to --choices",
        ),
        (
            ["--prompt", "{claim}", "--embed", "--stop", "x"],
            "--stop belongs to --generate, not to --embed",
        ),
        (["--function", "m:f", "--adds", "x", "--prompt", "p"], "--prompt does not belong to"),
        (["--function", "m:f"], "Name the columns that the function adds"),
        (["--function", "nothing", "--adds", "x"], "expected MODULE:NAME or FILE.py:NAME"),
        (["--function", "no_such_module:f", "--adds", "x"], "No module named 'no_such_module'"),
        (["--function", "json:no_such", "--adds", "x"], "has no attribute 'no_such'"),
        (["--function", "json:dumps", "--adds", "x=colour"], "--adds x=colour"),
        (["--prompt", "{claim}", "--embed", "--pooling", "max"], "'max' is not one of"),
        (
            ["--prompt", "{claim}", "--choices", "a,b", "--normalize", "x"],
            "normalize must be 'tokens'",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_runs(
    source, tmp_path, options, message
):
    out = tmp_path / "out"
    done = CliRunner().invoke(main, asked(source, out, *options))
    assert done.exit_code in (1, 2) and message in done.output, done.output
    assert "Traceback" not in done.output and not out.exists()
