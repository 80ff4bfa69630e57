"""Small worlds in which all can be computed by hand."""

from __future__ import annotations

import yaml

from dask_pcm.simulation import read_scenario

#: Nothing takes time, but what a test says.
FREE = {"unit_s": 0, "message_s": 0, "decide_every_s": 0}
EXACT = {"manager_bandwidth": 10, "task_s": 0, "dispatches_per_s": 1e9}


def pool(**values):
    return {"device": "gpu", "link": 10, **values}


def world(tmp_path, pools=None, runs=None, context=None, **sections):
    """10 rows of a second each, a load of 5 s, a link of 10 bytes a second, one worker."""
    described = {
        "store_bandwidth": 10,
        "devices": {"gpu": None, "slow": None},
        "contexts": {"llm": {"load_s": 5, "row_s": {"gpu": 1, "slow": 2}, **(context or {})}},
        "pools": pools or {"one": pool()},
        "runs": runs or {"run": {"rows": 10, "task_rows": 10, "contexts": ["llm"]}},
        "overheads": FREE,
        "baselines": EXACT,
        **sections,
    }
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(described))
    return read_scenario(str(path))


def run(n_rows, **values):
    return {"run": {"rows": n_rows, "contexts": ["llm"], **values}}
