"""For how many workers, of which speeds, a run's units are cut."""

from __future__ import annotations

from collections import Counter

from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.feed.feed import DeviceDemand
from dask_pcm.scheduling.state.state import GateState


def device_demand(state: GateState, group: Group) -> list[DeviceDemand]:
    """Workers that may run work of `group`, counted by device model, with their speeds."""
    counts = Counter(view.device for view in state.candidates(group) if not view.is_draining)
    row_s = state.estimates.cost.row_s
    return [
        DeviceDemand(device, n_workers, row_s(group.costs, "", device))
        for device, n_workers in counts.items()
    ]
