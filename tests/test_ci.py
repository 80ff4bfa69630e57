"""What failed is run once more, alone: what passes then is told, what fails again ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.needs import lacking

AGAIN = Path(__file__).parents[1] / ".ci" / "again.py"
FLAKY = """
import os, pathlib
def test_once():
    assert "PCM_TEST_DEADLINE" not in os.environ  # it would be skipped, and pass
    first = pathlib.Path("first")
    if not first.exists():
        first.touch()
        raise AssertionError("the first time")
"""
BROKEN = "def test_always(): raise AssertionError('always')\n"


@pytest.fixture
def again(tmp_path):
    """Run tests of this source, and what failed again; return the exit code and what was said."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    def run(source):
        (tmp_path / "test_it.py").write_text(source)
        first = {k: v for k, v in os.environ.items() if k != "PCM_TEST_DEADLINE"}
        subprocess.run([python, "-m", "pytest", "-q"], cwd=tmp_path, env=first, capture_output=True)
        command = [sys.executable, AGAIN, "2"]
        late = {**os.environ, "PCM_TEST_DEADLINE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=late, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def test_what_passes_the_second_time_is_told(again):
    code, said = again(FLAKY)
    assert code == 0 and "failed, passed  test_it.py::test_once" in said


def test_what_fails_twice_fails(again):
    code, said = again(FLAKY + BROKEN)
    assert code == 2
    assert "failed, passed  test_it.py::test_once" in said
    assert "failed, failed  test_it.py::test_always" in said


@pytest.mark.parametrize("source", ["import nowhere\n", "".join(
    BROKEN.replace("always", f"n{n}") for n in range(11))])  # fmt: skip
def test_what_is_no_bad_luck_is_not_tried_again(again, source):
    code, said = again(source)
    assert code == 2 and "not tried again" in said and "flaky" not in said


@pytest.mark.parametrize(
    ("needs", "raised"), [("", "Skipped"), ("slurm", "Skipped"), ("weights,slurm", "Failed")]
)
def test_what_must_be_there_is_not_skipped(monkeypatch, needs, raised):
    monkeypatch.setenv("PCM_TEST_NEEDS", needs)
    with pytest.raises(BaseException, match="no weights") as found:
        lacking("weights", "no weights")
    assert found.type.__name__ == raised
