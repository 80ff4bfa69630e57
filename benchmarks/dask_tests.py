"""distributed's own tests, without and with the toolkit: a plain Dask cluster stays one.

``python -m benchmarks.dask_tests CHECKOUT`` runs the tests of a checkout of dask/distributed twice,
compares the results and prints a table. The checkout's own package is what is tested; take the tag
of the installed version, or the nearest.

With the toolkit, each scheduler that a test starts, in its own process or another, has the preload
that users have: ``dask_pcm.preload`` installs the plugins of scheduler, workers and nannies.
Tests that fail without it are listed and left out. What differs is run again, alone, both ways.

This module is the plugin of pytest, too, that notes each result as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_RESULTS, _PRELOAD = "PCM_DASK_TESTS_RESULTS", "DASK_DISTRIBUTED__SCHEDULER__PRELOAD"
_REPOSITORY = Path(__file__).parent.parent
#: Files and folders below ``distributed/``.
AREAS: dict[str, tuple[str, ...]] = {
    "client": (
        "tests/test_client.py",
        "tests/test_client_executor.py",
        "tests/test_client_loop.py",
        "tests/test_as_completed.py",
    ),
    "scheduler": (
        "tests/test_scheduler.py",
        "tests/test_priorities.py",
        "tests/test_resources.py",
        "tests/test_failed_workers.py",
        "tests/test_reschedule.py",
        "tests/test_cancelled_state.py",
    ),
    "worker": (
        "tests/test_worker.py",
        "tests/test_worker_client.py",
        "tests/test_worker_memory.py",
        "tests/test_worker_metrics.py",
        "tests/test_worker_state_machine.py",
    ),
    "nanny": ("tests/test_nanny.py",),
    "steal": ("tests/test_steal.py",),
    "shuffle": ("shuffle/tests",),
    "deploy": ("deploy/tests",),
    "http": ("http/tests", "http/scheduler/tests", "http/worker/tests"),
    "diagnostics": ("diagnostics/tests",),
}
_PASSED, _FAILED, _SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one test; of one that failed, the last line of its error."""

    outcome: str
    error: str = ""


class Notes:
    """The side in pytest: one line a test, so that a run that is ended loses nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed and report.when != "call":
            return
        text = str(report.longrepr or "")
        crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
        error = (crash or text).strip().splitlines()[:1] if report.failed else []
        line = {"test": report.nodeid, "outcome": report.outcome, "error": "".join(error)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: Any) -> None:
    """Called by pytest, which loads this module with ``-p``."""
    config.pluginmanager.register(Notes(Path(os.environ[_RESULTS])))
    # Of a plugin that need not be here: a test that fails once is looked at again by ``compare``.
    config.addinivalue_line("markers", "flaky: may be run again")


def run(checkout: Path, tests: Sequence[str], notes: Path, is_with: bool) -> dict[str, Result]:
    """Run tests, unless their results are there already, and return what became of each."""
    if not notes.exists():
        folder = [str(checkout), str(_REPOSITORY)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*folder, os.environ.get("PYTHONPATH", "")]),
            _RESULTS: str(notes),
        }
        if is_with:
            environment[_PRELOAD] = '["dask_pcm.preload"]'
        options = ["-q", "--color=no", "-p", "no:cacheprovider", "-p", __spec__.name]
        # One test that hangs is not to end the others.
        options += ["-o", "timeout_method=signal", "--timeout=120"]
        log = notes.with_suffix(".log")
        with log.open("w", encoding="utf-8") as output:
            subprocess.run(
                [sys.executable, "-m", "pytest", *options, *tests],
                cwd=checkout,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if not notes.exists():
            raise SystemExit(f"pytest has noted no result of {tests[0]}; see {log}.")
    return read(notes.read_text(encoding="utf-8").splitlines())


def read(lines: Iterable[str]) -> dict[str, Result]:
    """Results by test; one whose setup, call or teardown has failed has failed."""
    found: dict[str, Result] = {}
    for line in lines:
        noted = json.loads(line)
        before = found.get(noted["test"])
        if before is None or before.outcome != _FAILED:
            found[noted["test"]] = Result(noted["outcome"], noted["error"])
    return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """An area's results without and with the toolkit."""

    area: str
    without: Mapping[str, Result]
    beside: Mapping[str, Result]

    @property
    def left_out(self) -> list[str]:
        """Tests that fail without the toolkit."""
        return sorted(test for test, r in self.without.items() if r.outcome == _FAILED)

    @property
    def differing(self) -> list[str]:
        """Tests that end otherwise with it, or do not end."""
        return sorted(
            test
            for test, result in self.without.items()
            if result.outcome != _FAILED
            and self.beside.get(test, Result("missing")).outcome != result.outcome
        )

    @property
    def n_same(self) -> int:
        return len(self.without) - len(self.left_out) - len(self.differing)


def compare(checkout: Path, area: str, results: Path) -> Comparison:
    """Run the tests of an area both ways; what differs twice more, alone."""
    tests = [f"distributed/{name}" for name in AREAS[area]]
    found = Comparison(
        area,
        run(checkout, tests, results / f"{area}-without.jsonl", is_with=False),
        run(checkout, tests, results / f"{area}-with.jsonl", is_with=True),
    )
    for number in (1, 2):
        if not found.differing:
            break
        again = found.differing
        name = f"{area}-again-{number}"
        without = run(checkout, again, results / f"{name}-without.jsonl", is_with=False)
        beside = run(checkout, again, results / f"{name}-with.jsonl", is_with=True)
        found = Comparison(area, {**found.without, **without}, {**found.beside, **beside})
    return found


def table(found: Sequence[Comparison], version: str) -> Iterator[str]:
    """Lines of Markdown: counts by area, then what differs and what was left out."""
    yield f"Measured on {datetime.now(UTC):%Y-%m-%d}, with the tests of distributed {version}."
    yield ""
    yield "| area | tests | skipped | fail without the toolkit, left out | same | differ |"
    yield "|---|---|---|---|---|---|"
    for area in AREAS:
        one = next((one for one in found if one.area == area), None)
        if one is None:
            yield f"| {area} | not run | | | | |"
            continue
        n_skipped = sum(result.outcome == _SKIPPED for result in one.without.values())
        counts = (len(one.without), n_skipped, len(one.left_out), one.n_same, len(one.differing))
        yield f"| {area} | {' | '.join(map(str, counts))} |"
    yield from _listed(
        "Differ", [_difference(one, test) for one in found for test in one.differing]
    )
    yield from _listed("Left out", [f"`{test}`" for one in found for test in one.left_out])


def _difference(one: Comparison, test: str) -> str:
    beside = one.beside.get(test, Result("missing"))
    error = f": {beside.error[:200]}" if beside.error else ""
    return f"`{test}`: {one.without[test].outcome} without, {beside.outcome} with{error}"


def _listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield f"{title}:"
        yield ""
        for line in lines:
            yield f"- {line}"


def version_of(checkout: Path) -> str:
    """The tag of a checkout, or the nearest; "unknown" where Git does not say."""
    command = ["git", "-C", str(checkout), "describe", "--tags"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="of dask/distributed")
    parser.add_argument("--only", help=f"areas, of {','.join(AREAS)}")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("build/dask-tests"),
        help="where results are noted; what is there already is not run again",
    )
    parser.add_argument("--version", help="of the checkout, where Git does not say")
    given = parser.parse_args()
    areas = given.only.split(",") if given.only else list(AREAS)
    if unknown := set(areas) - AREAS.keys():
        parser.error(f"no such area: {', '.join(sorted(unknown))}; there are {', '.join(AREAS)}")
    checkout = given.checkout.resolve()
    if not (checkout / "distributed" / "tests").is_dir():
        parser.error(f"{checkout} is no checkout of dask/distributed: it has no distributed/tests")
    results = given.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    found = [compare(checkout, area, results) for area in areas]
    print("\n".join(table(found, given.version or version_of(checkout))))


if __name__ == "__main__":
    main()
