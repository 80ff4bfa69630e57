"""What leaves a device: for now, what nobody has used for long."""

from __future__ import annotations

from collections.abc import Iterator

from dask_pcm.scheduling.events import Cool, Standing
from dask_pcm.scheduling.state import GateState


def cool(state: GateState, now: float, idle_s: float) -> Iterator[Cool]:
    """Drop contexts that have been warm and unused for `idle_s`; applied as they are yielded.

    What waiting work or a run needs stays, however long it has been idle.
    """
    wanted = {context for group in state.groups() for context in group.contexts}
    for view in state.workers.values():
        wanted_here = {c for work in view.running.values() for c in work.group.contexts} | wanted
        for context, standing in list(view.standings.items()):
            is_idle = now - view.used_at.get(context, now) >= idle_s
            if standing is Standing.WARM and is_idle and context not in wanted_here:
                action = Cool(view.address, context)
                state.apply(action, now)
                yield action
