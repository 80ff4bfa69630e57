"""Two sets of results of a checkout's tests, held against each other."""

from __future__ import annotations

from benchmarks import dask_tests
from benchmarks.dask_tests import Comparison, Result, compare, read, table

TESTS = """
import os, pathlib, pytest

IS_WITH = os.environ.get("DASK_DISTRIBUTED__SCHEDULER__PRELOAD") == '["dask_pcm.preload"]'

@pytest.mark.flaky(reruns=3)
def test_same(): ...

def test_broken(): raise OSError("no network")

@pytest.mark.skip
def test_skipped(): ...

def test_plugins(): assert not IS_WITH, "1 plugin more"

@pytest.fixture
def ends_badly():
    yield
    assert not IS_WITH

def test_teardown(ends_badly): ...

def test_once():
    mark = pathlib.Path("once")
    if IS_WITH and not mark.exists():
        mark.touch()
        raise AssertionError("only the first time")
"""


def test_what_fails_with_the_toolkit_alone_and_again_differs(tmp_path, monkeypatch):
    folder = tmp_path / "checkout" / "distributed" / "tests"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(TESTS)
    (tmp_path / "checkout" / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers")
    monkeypatch.setitem(dask_tests.AREAS, "steal", ("tests/test_some.py",))
    results = tmp_path / "results"
    results.mkdir()
    found = compare(tmp_path / "checkout", "steal", results)
    name = "distributed/tests/test_some.py::test_"
    assert found.left_out == [f"{name}broken"]
    assert found.differing == [f"{name}plugins", f"{name}teardown"]
    assert found.n_same == 3
    lines = list(table([found], "1.2.3"))
    assert "| steal | 6 | 1 | 1 | 3 | 2 |" in lines and "| client | not run | | | | |" in lines
    assert "with the tests of distributed 1.2.3." in lines[0]
    assert f"- `{name}broken`" in lines
    assert any(
        line.startswith(f"- `{name}plugins`: passed without, failed with: ") for line in lines
    )
    assert compare(tmp_path / "checkout", "steal", results) == found  # nothing is run again


def test_the_first_failure_of_a_test_is_what_became_of_it():
    lines = [
        '{"test": "a", "outcome": "passed", "error": ""}',
        '{"test": "a", "outcome": "failed", "error": "teardown"}',
        '{"test": "a", "outcome": "failed", "error": "later"}',
    ]
    assert read(lines) == {"a": Result("failed", "teardown")}


def test_a_test_that_does_not_end_differs():
    assert Comparison("steal", {"a": Result("passed")}, {}).differing == ["a"]
