"""What importing the toolkit costs, and how the accessor gets onto Dask's frames all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dask_pcm as pcm

COST = """
import sys
import distributed, distributed.cli.dask_worker, psutil
before = psutil.Process().memory_info().rss
import {module}
n_bytes = psutil.Process().memory_info().rss - before
heavy = sorted({{"pandas", "pyarrow", "torch", "transformers"}} & sys.modules.keys())
print(n_bytes >> 20, heavy)
"""


def told(code):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_what_a_worker_imports_costs_no_more_than_30_mib():
    n_mib, heavy = told(COST.format(module="dask_pcm.plugins.worker.plugin")).split(" ", 1)
    assert heavy == "[]" and int(n_mib) <= 30


@pytest.mark.parametrize(
    "module", ["dask_pcm", "dask_pcm.plugins.scheduler.plugin", "dask_pcm.plugins.nanny.plugin"]
)
def test_frames_are_imported_by_who_needs_them(module):
    assert told(COST.format(module=module)).endswith("[]")


ACCESSOR = "print(dd.DataFrame.pcm.__name__, 'pcm' in dir(dd.DataFrame))"


@pytest.mark.parametrize(
    "imports",
    [
        "import dask_pcm, dask.dataframe as dd",
        "import dask.dataframe as dd, dask_pcm",
        "import dask_pcm; dask_pcm.write_parquet; import dask.dataframe as dd",
        "import dask_pcm.runs.units.run_unit; import dask.dataframe as dd",
        "import dask_pcm.accessor; import dask.dataframe as dd",
        "import dask_pcm, importlib.util as u; u.find_spec('dask.dataframe');"
        " import dask.dataframe as dd",
    ],
)
def test_the_accessor_is_there_whatever_is_imported_first(imports):
    assert told(f"{imports}\n{ACCESSOR}") == "Accessor True"


def test_what_is_offered_is_there():
    assert {name for name in pcm.__all__ if not hasattr(pcm, name)} == set()
    assert set(pcm.__all__) <= set(dir(pcm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pcm.nothing
