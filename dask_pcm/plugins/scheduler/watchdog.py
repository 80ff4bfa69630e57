"""If the policy fails or stalls, waiting work is assigned as plain Dask would."""

from __future__ import annotations

import itertools
import logging
from contextlib import suppress
from typing import Any

from distributed.metrics import monotonic

from dask_pcm.scheduling.actions import Action
from dask_pcm.scheduling.explain import decisions, explain
from dask_pcm.scheduling.policy import decide
from dask_pcm.scheduling.rules.fallback import assign_as_dask, stalled
from dask_pcm.scheduling.rules.rules import Rules
from dask_pcm.scheduling.state.state import GateState

logger = logging.getLogger(__name__)


class Watchdog:
    """Calls the policy, and falls back to Dask's own assignment if it fails or stalls.

    Parameters
    ----------
    stall_s
        How long work may wait while its workers are idle and nothing is decided.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s

    def decide(self, state: GateState, now: float, rules: Rules) -> list[Action]:
        """Return the policy's actions, or the fallback's if the policy raises or has stalled."""
        try:
            decide(state, now, rules)
            key = stalled(state, now, self._stall_s)
        except Exception:
            logger.exception("The policy failed; waiting work goes to idle workers, warm or not")
            # The state may be what made the policy fail; actions decided before that still count.
            with suppress(Exception):
                assign_as_dask(state, now)
            return state.plans.actions
        if key is None:
            return state.plans.actions
        logger.warning(
            "Work waits, workers idle, and nothing has been decided for %.3g s; waiting work goes"
            " to idle workers, warm or not. %s\nThe last decisions:\n%s",
            self._stall_s,
            explain(state, key, now),
            decisions(state, now),
        )
        assign_as_dask(state, now)
        return state.plans.actions

    def explain(self, state: GateState, key: Any) -> str:
        """Explain the state of a task, or of a unit by the name of its part."""
        try:
            hash(key)
        except TypeError:
            return f"{key!r:.80} is no key: pass a future, a task's key or the name of a part."
        if isinstance(key, str) and key.startswith("part-"):
            ending = "-" + key.removesuffix(".parquet")
            decided = (getattr(d.action, "key", None) for d in reversed(state.plans.decisions))
            known = itertools.chain(state.placed, state.ahead.waiting.works, decided)
            key = next((k for k in known if isinstance(k, str) and k.endswith(ending)), key)
        return explain(state, key, monotonic())
