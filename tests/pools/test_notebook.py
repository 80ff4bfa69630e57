"""The notebook for batch systems, on a real Slurm."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02-opportunistic-slurm.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_cell_runs_while_a_job_is_cancelled(slurm, execute, tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_PCM__POOLS__POLL_INTERVAL", "1s")
    outputs = execute(nbformat.read(NOTEBOOK, as_version=4), tmp_path)
    texts = "".join(str(o.get("data", {})) + o.get("text", "") for o in outputs)
    assert "pcm-h100 RUNNING" in texts or "pcm-a10 RUNNING" in texts
    assert texts.count("PoolCluster(") >= 2  # what is in the output, the notebook checks itself
