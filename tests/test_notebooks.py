from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

#: Those that need no batch system; see ``tests/pools/test_notebook.py`` for the others.
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*-quickstart.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_cell_runs(path, execute):
    execute(nbformat.read(path, as_version=4), path.parent)


RUN = """
import sys
import pandas as pd
import dask_pcm as pcm
from dask.distributed import Client, LocalCluster

pd.DataFrame({"id": range(400)}).to_parquet("claims.parquet", index=False)
with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
    with Client(cluster):
        verdicts = pcm.map_partitions(
            lambda frame, model: frame, pcm.read_parquet("claims.parquet"),
            context=pcm.Context(dict), meta={"id": "i8"}, batch_rows=10,
        )
        pcm.write_parquet(verdicts, "verdicts")
assert "ipywidgets" not in sys.modules
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bar_without_widgets_whose_last_state_is_100_per_cent(execute, tmp_path):
    """One output, replaced as the run goes on."""
    cell = nbformat.v4.new_code_cell(RUN)
    outputs = execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    shown = [o["data"]["text/plain"] for o in outputs if o.output_type == "display_data"]
    assert len(shown) == 1, outputs
    assert "━━━━━━━━━━ 400/400 rows, 100%, 0 failed" in shown[0] and "ETA" not in shown[0]
