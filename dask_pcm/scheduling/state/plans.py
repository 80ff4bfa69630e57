"""The planner's memory: what changed since its last look, and what it decided."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from dask_pcm.scheduling.actions import Action
from dask_pcm.scheduling.events import Group
from dask_pcm.scheduling.state.decisions import N_DECISIONS, Decision, Forecast

#: Up to `_FEW` pairs of a group and a worker, every decision plans anew. Each further pair adds
#: `_LOOK_S` seconds between plans, `_LONGEST_S` at most.
_FEW, _LOOK_S, _LONGEST_S = 100, 1e-4, 2.0


@dataclass(slots=True)
class Plans:
    """What lets a round look only at what has changed, and explains what was decided."""

    #: Actions of the decision round in progress.
    actions: list[Action] = field(default_factory=list)
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=N_DECISIONS))
    #: Workers with an event since the last decision; workers that had room after it; and whether
    #: work has come to a group that had none. A round between plans looks at these only.
    changed: dict[str, None] = field(default_factory=dict)
    roomy: dict[str, None] = field(default_factory=dict)
    has_new_work: bool = False
    #: When something was last decided for each group, or for a context that groups need.
    moved_at: dict[Group | str, float] = field(default_factory=dict)
    #: Time and number of the last planning round, and the pairs of group and worker it looked at.
    planned_at: float = -math.inf
    n_plans: int = 0
    n_looks: int = 0
    forecasts: dict[Group, Forecast] = field(default_factory=dict)

    def is_due(self, now: float) -> bool:
        """Whether all workers are to be looked at again: small clusters always, large ones rarely.

        >>> plans = Plans(planned_at=5.0, n_looks=10_100)
        >>> plans.is_due(5.9), plans.is_due(6.1)
        (False, True)
        """
        return now - self.planned_at >= min(_LONGEST_S, (self.n_looks - _FEW) * _LOOK_S)

    def record_plan(self, now: float, n_looks: int) -> None:
        """A planning round has looked at `n_looks` pairs; forecasts of earlier ones are stale."""
        self.planned_at, self.n_looks = now, n_looks
        self.n_plans += 1

    def to_look_at(self) -> dict[str, None]:
        """Workers that a round between plans has to look at."""
        # A group that had no work may suit workers that had room left, so look at these as well.
        return {**self.changed, **self.roomy} if self.has_new_work else self.changed

    def begin_round(self) -> None:
        """Later events count for the next round."""
        self.changed.clear()
        self.has_new_work = False

    def record(self, action: Action, now: float, numbers: tuple[float, ...]) -> None:
        """Keep an action for the caller, and the numbers behind it for ``explain``."""
        self.actions.append(action)
        self.decisions.append(Decision(now, action, numbers))

    def forget_worker(self, worker: str) -> None:
        """A worker has left."""
        self.changed.pop(worker, None)
        self.roomy.pop(worker, None)

    def forget_groups(self, groups: Iterable[Group], waiting: Container[Group]) -> None:
        """Keep forecasts of `groups` only, and times of the groups in `waiting` only.

        Groups come and go with clients and key prefixes; without this, memory would grow for ever.
        """
        for group in self.forecasts.keys() - set(groups):
            del self.forecasts[group]
        for moved in [key for key in self.moved_at if isinstance(key, Group)]:
            if moved not in waiting:
                del self.moved_at[moved]

    def validate(self, workers: Container[str]) -> None:
        """Raise AssertionError if a worker that has left is still to be looked at."""
        for address in (*self.changed, *self.roomy):
            assert address in workers, address
