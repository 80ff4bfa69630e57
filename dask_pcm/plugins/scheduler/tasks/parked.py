"""The gate owns every task that needs a context until the scheduler forgets the task."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from distributed.scheduler import TaskState

from dask_pcm.plugins.scheduler.contexts import ContextService
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.members import Member
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.plugins.scheduler.tasks import parking
from dask_pcm.plugins.scheduler.tasks.attribution import Attribution
from dask_pcm.plugins.scheduler.tasks.find_refs import find_refs
from dask_pcm.plugins.worker.lanes import LANES
from dask_pcm.plugins.worker.task import CLIENT
from dask_pcm.scheduling.events import Group, Work, WorkParked, WorkWithdrawn


class ParkedTasks(Service):
    """Parks tasks that need a context and tells the policy about them.

    Attributes
    ----------
    asked
        The user's own restrictions of each task, by key.
    unfinished
        Tasks that have left a worker without a result: part of their rows may be done.
    """

    def __init__(self, hub: Hub, contexts: ContextService, attribution: Attribution) -> None:
        self._hub = hub
        self._contexts = contexts
        self._attribution = attribution
        self.asked: dict[Any, parking.Asked] = {}
        self.unfinished: set[Any] = set()
        self._unshield = parking.shield_from_timeouts(hub.scheduler, self.asked)

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """See ``Service``."""
        return {"pcm_explain": self.on_explain}

    def take_over(self) -> None:
        """Park the context tasks that were submitted before the plugin was installed."""
        hub = self._hub
        self.add(hub.scheduler.tasks)
        for key in hub.states_of(self.asked, "no-worker"):
            self.park(key)
        queued = hub.states_of(self.asked, "queued")
        # Once released they are scheduled anew, find no worker that may run them, and are parked.
        hub.transition(dict.fromkeys(reversed(queued), "released"), "install")
        for key in hub.states_of(queued, "no-worker"):  # Dask does not call the plugin's hook yet
            self.park(key)

    def add(self, keys: Iterable[Any], client: str = "") -> None:
        """Park the context tasks among `keys`; called before their first transition."""
        for key in list(keys):
            ts = self._hub.scheduler.tasks.get(key)
            if ts is None or key in self.asked or ts.actor:
                continue
            refs = find_refs(ts.run_spec, [d.run_spec for d in ts.dependencies])
            if refs:
                contexts = self._contexts.declare(refs)
                self.asked[key] = parking.Asked.of(ts, contexts, client)
                ts.annotations = {**(ts.annotations or {}), "executor": LANES, CLIENT: client}
                parking.park(ts)

    def park(self, key: Any) -> None:
        """Tell the policy that a task waits."""
        self._hub.apply(WorkParked(self._work(self._hub.scheduler.tasks[key])))

    def withdraw(self, key: Any) -> None:
        """Tell the policy that a task waits no longer."""
        self._hub.apply(WorkWithdrawn(key))

    def forget(self, key: Any) -> None:
        """The scheduler has forgotten a task: drop its restrictions and context references."""
        self._contexts.refs.discard(self.asked.pop(key).contexts)
        self.unfinished.discard(key)

    def _work(self, ts: TaskState) -> Work:
        """Describe a task to the policy."""
        asked, said = self.asked[ts.key], ts.annotations or {}
        allowed = parking.allowed(self._hub.scheduler, ts, asked)
        is_isolated = ts.key in self._attribution.suspects
        group = Group(asked.contexts, ts.prefix.name, allowed, asked.client, is_isolated)
        n_rows, cut_for = float(said.get("pcm_rows") or 1.0), str(said.get("pcm_cut_for") or "")
        priority = tuple(ts.priority or ())
        return Work(ts.key, group, priority, n_rows, cut_for, is_again=ts.key in self.unfinished)

    async def on_explain(self, key: Any) -> str:
        """Explain why a task waits, or where it was sent and why."""
        return self._hub.explain(key)

    def worker_joined(self, worker: str, member: Member) -> None:
        """See ``Service``."""
        self._hub.wake(first=self._regroup)

    def worker_left(self, worker: str, member: Member, is_lost: bool) -> None:
        """See ``Service``."""
        self._hub.wake(first=self._regroup)

    def _regroup(self) -> None:
        """Park restricted tasks anew: the set of workers that may run them has changed."""
        for work in list(self._hub.state.ahead.waiting.works.values()):
            asked = self.asked[work.key]
            if asked.workers or asked.hosts or work.group.allowed is not None:
                self.park(work.key)

    def tick(self) -> None:
        """See ``Service``; a decision may depend on time alone, for instance a back-off."""
        if self._hub.state.ahead.waiting:
            self._hub.wake()

    def uninstall(self) -> None:
        """See ``Service``; gives all tasks back to Dask with the user's own restrictions."""
        self._unshield()
        for key, asked in self.asked.items():
            if (ts := self._hub.scheduler.tasks.get(key)) is not None:
                parking.unpark(ts, asked)
        waiting = self._hub.states_of(self.asked, "no-worker")
        self.asked.clear()
        self.unfinished.clear()
        self._hub.transition(dict.fromkeys(reversed(waiting), "released"), "uninstall")
