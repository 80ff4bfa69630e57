"""The record of a decision: the action, when it was taken, and the numbers behind it."""

from __future__ import annotations

from dataclasses import dataclass

from dask_pcm.scheduling.actions import Action

#: Decisions kept for ``explain``; older ones are dropped.
N_DECISIONS = 2_000


@dataclass(frozen=True, slots=True)
class Decision:
    """An action that the policy decided on.

    Attributes
    ----------
    at
        Time of the decision, in seconds of the policy's clock.
    numbers
        The estimates that it was based on; ``explain.describe`` names them for each action.
    """

    at: float
    action: Action
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a group's work will have drained, as estimated in one planning round.

    Attributes
    ----------
    plan
        Number of the planning round; the forecast is stale as soon as the next one has run.
    drained_at
        Time at which all known work of the group is finished, in seconds of the policy's clock.
    fastest_row_s
        Seconds per row of the fastest worker that serves the group at that time.
    """

    plan: int
    drained_at: float
    fastest_row_s: float
