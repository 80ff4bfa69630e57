"""Progress of a simulation, sampled at regular times."""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_pcm.simulation.simulate import Result

_N_POINTS = 1_000


def progress(result: Result) -> tuple[list[float], list[float], list[int], list[int]]:
    """Return sample times in seconds, rows done, workers present, and workers warm at each time."""
    record = result.record
    at_s = np.linspace(0.0, result.end_s, _N_POINTS)
    rows = np.concatenate([[0.0], np.cumsum(record.done_rows)])
    done = rows[np.searchsorted(record.done_at_s, at_s, side="right")]
    gone = np.sort(list(record.left_s.values()))
    gone_warm = np.sort([at for worker, at in record.left_s.items() if worker in record.warm_s])

    def there(since: dict[str, float], left: Any) -> list[int]:
        began = np.searchsorted(np.sort(list(since.values())), at_s, side="right")
        return list((began - np.searchsorted(left, at_s, side="right")).tolist())

    joined, warm = there(record.joined_s, gone), there(record.warm_s, gone_warm)
    return at_s.tolist(), done.tolist(), joined, warm
