"""The jobs of one pool: what became of each, and which to submit or cancel. Pure: no clock, no I/O.

A worker that is gone may come back (its nanny starts another process) or not (its job has ended,
which the batch system may only be asked now and then). So the job of a worker that has been gone
for some seconds is counted as missing, and a replacement is queued; should the worker come back,
what is too many and has not started is cancelled. Where the batch system queues evicted jobs again
by itself, a job is missing only once the batch system says that it is over.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field

from dask_pcm.pools.batch import JobState
from dask_pcm.pools.pool import Pool
from dask_pcm.scheduling.rules.scaling import Offer

#: A job whose workers have all been gone for this long is missing; if the batch system said since
#: then that it runs, for the longer time: its nanny starts another worker.
_MISSING_S, _RESTART_S = 2.5, 60.0
#: A job that waits and is not wanted any more is cancelled after this time.
_UNWANTED_S = 15.0
#: A pool of which a job has waited for longer is not counted on for more than it has.
_SLOW_S = 30.0
#: What is learned of a pool's queue is of its last jobs.
_N_WAITS = 5
#: A job that was cancelled and is still there is cancelled again after this time.
_AGAIN_S = 10.0
#: After this many jobs in succession that ended before a worker of theirs had joined, or a refused
#: submission, the pool waits before it submits again: at first, and at most.
_N_VAIN, _FIRST_WAIT_S, _LONGEST_WAIT_S = 3, 5.0, 1800.0
#: What a job's output says of its node if no worker could start there (``launcher.check_scratch``);
#: the node gets no job of the pool for this long.
BAD_NODE, _EXCLUDED_S = re.compile(r"^Node (\S+) cannot be used: (.*)$", re.M), 600.0
#: Ids of Slurm's, PBS's and HTCondor's jobs.
_ID = re.compile(r"\d+(?:_\d+|\.\d+|\[\d+\])?")


@dataclass(slots=True)
class Job:
    """A job that was submitted and, as far as is known, is not over.

    Attributes
    ----------
    workers
        Names of its workers that are registered now.
    gone_at
        Since when it has had none although it had some before.
    """

    id: str
    submitted_at: float
    is_running: bool = False
    reason: str = ""
    workers: set[str] = field(default_factory=set)
    has_joined: bool = False
    gone_at: float | None = None
    #: Since when it has been more than what is wanted, and could go.
    surplus_at: float | None = None
    #: Whether its workers have a notice, or the batch system says that it ends.
    is_leaving: bool = False
    is_ending: bool = False
    #: When it was cancelled last.
    cancelled_at: float | None = None
    #: Whether the batch system has ever named it.
    is_known: bool = False
    #: When the batch system last said that it runs.
    seen_at: float = -math.inf
    #: Whether its batch system queues it again after an eviction.
    is_requeued: bool = False

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled by the cluster."""
        return self.cancelled_at is not None

    def is_missing(self, now: float) -> bool:
        """Whether its workers are gone for good, as far as one can tell."""
        if self.gone_at is None:
            return False
        if self.seen_at > self.gone_at:
            return now - self.gone_at >= _RESTART_S
        return not self.is_requeued and now - self.gone_at >= _MISSING_S

    def counts(self, now: float) -> bool:
        """Whether it is among the jobs that are wanted: not one that ends."""
        is_lost = (self.is_leaving or self.is_ending) and not self.is_requeued
        return not (self.is_cancelled or is_lost or self.is_missing(now))

    @property
    def is_idle(self) -> bool:
        """Whether it has done nothing, as far as is known, and was not cancelled by the cluster."""
        return not (self.is_cancelled or self.has_joined)

    def hangs(self, now: float) -> bool:
        """Whether it still has its nodes, long after its workers are gone."""
        if self.gone_at is None or self.is_cancelled or self.seen_at < self.gone_at:
            return False
        return now - self.gone_at >= 2 * _RESTART_S


@dataclass(frozen=True, slots=True)
class Steps:
    """What is to be done for a pool now."""

    n_submit: int = 0
    cancel: tuple[str, ...] = ()


class Fleet:
    """The jobs of one pool.

    Attributes
    ----------
    jobs
        Those that are not known to be over, by id.
    trouble
        Why nothing can be submitted, in the batch system's words or from a job's log; "" if all is
        well.
    """

    def __init__(self, name: str, pool: Pool) -> None:
        self.name = name
        self.pool = pool
        self.jobs: dict[str, Job] = {}
        self.trouble = ""
        #: Ids of those that are.
        self._over: set[str] = set()
        self._n_vain = 0
        self._wait_s = _FIRST_WAIT_S
        self._blocked_until = -math.inf
        #: Jobs of one submission: after a refusal one, and twice as many each time.
        self._at_once = math.inf
        #: Seconds from submission to nodes, of the last jobs.
        self._waits: deque[float] = deque(maxlen=_N_WAITS)
        #: Until when each node is excluded.
        self._excluded: dict[str, float] = {}

    def submitted(self, ids: Iterable[str], now: float) -> None:
        """Jobs were submitted."""
        is_requeued = self.pool.is_requeued
        self.jobs.update({one: Job(one, now, is_requeued=is_requeued) for one in ids})
        self._at_once *= 2
        if self._n_vain < _N_VAIN:  # otherwise the pool recovers when a worker joins
            self._recover()

    def refused(self, why: str, now: float) -> None:
        """A submission was refused: wait before the next, twice as long each time."""
        self.trouble, self._at_once = why, 1
        self._blocked_until = now + self._wait_s
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)

    def answered(self, states: Mapping[str, JobState], asked_at: float) -> list[Job]:
        """The batch system has answered: note what it knows; return the jobs that are over."""
        over = []
        for job in list(self.jobs.values()):
            state = states.get(job.id)
            if state is not None:
                job.is_known = True
                self._note_begin(job, state.is_running, asked_at)
                job.is_running, job.reason = state.is_running, state.reason
                job.is_ending = state.is_ending
                job.seen_at = asked_at if state.is_running else job.seen_at
                if not (state.is_running or job.workers):  # it waits, perhaps anew
                    job.gone_at, job.is_leaving = None, False
            elif job.submitted_at < asked_at:  # over, however it ended
                over.append(self.jobs.pop(job.id))
                self._over.add(job.id)
        return over

    def ended_in_vain(self, log: str, now: float) -> bool:
        """Jobs of one query are over that had begun, but no worker of theirs has joined.

        Returns whether this is to be said to the user: after it has happened some times in
        succession. What becomes of one submission counts once, however large it was.
        """
        self._n_vain += 1
        if self._n_vain % _N_VAIN:
            return False
        text = f"jobs ended before a worker of theirs had joined, {self._n_vain} times in a row"
        self.refused(f"{text}\nThe end of the last one's output:\n{log}", now)
        return True

    def forgive(self) -> None:
        """Submit at once what is wanted, although it was refused before."""
        self._n_vain, self._at_once = 0, math.inf
        self._recover()

    def unreachable(self, worker: str, address: str, why: str, now: float) -> None:
        """A worker has joined that accepts no connections: its pool does nothing so."""
        self._n_vain = max(self._n_vain, _N_VAIN)
        self.refused(
            f"its worker {worker} cannot be reached at {address} ({why}). Scheduler and workers"
            " connect to workers, so these must not be behind NAT, nor their ports be closed; see"
            " `ports` of a pool.",
            now,
        )

    def exclude(self, output: str, now: float) -> str:
        """Exclude a node of which a job's output says that it cannot be used.

        Returns the words, if they are to be said to the user: the first time.
        """
        found = BAD_NODE.search(output)
        if found is None:
            return ""
        is_known = found[1] in self.excluded(now)
        self._excluded[found[1]] = now + _EXCLUDED_S
        return "" if is_known else found[0]

    def excluded(self, now: float) -> list[str]:
        """Nodes that get no job of this pool now."""
        return [node for node, until in self._excluded.items() if now < until]

    def job_of(self, worker: str) -> str | None:
        """The job of a worker, by the worker's name; None if it is of another pool.

        A job may be there although the command that submitted it has failed.
        """
        found = worker.removeprefix(f"{self.name}-").split("-")[0]
        is_job = found in self.jobs or (found not in self._over and _ID.fullmatch(found))
        return found if worker.startswith(f"{self.name}-") and is_job else None

    def sync(self, workers: Mapping[str, bool], now: float) -> None:
        """Note which workers of this pool are registered.

        Parameters
        ----------
        workers
            By name; true for those that have a preemption notice.
        """
        found: dict[str, set[str]] = {}
        for name in workers:
            if (of := self.job_of(name)) is not None:
                found.setdefault(of, set()).add(name)
        for unknown in found.keys() - self.jobs.keys():
            is_requeued = self.pool.is_requeued
            self.jobs[unknown] = Job(unknown, now, is_running=True, is_requeued=is_requeued)
        for job in self.jobs.values():
            job.workers = found.get(job.id, set())
            if job.workers:
                self._note_begin(job, True, now)
                if not job.has_joined:
                    self._n_vain = 0
                    self._recover()
                job.has_joined = job.is_running = True
                job.gone_at = None
                job.is_leaving = all(workers[name] for name in job.workers)
            elif job.has_joined and job.is_running and job.gone_at is None:
                job.gone_at = now

    def decide(
        self,
        n_workers: int,
        needed: Collection[str],
        is_adaptive: bool,
        now: float,
        most_workers: float = math.inf,
    ) -> Steps:
        """What to do so that the pool comes to have `n_workers`.

        Parameters
        ----------
        needed
            Names of the workers that have work.
        is_adaptive
            Whether workers are only given back once they have been idle for long enough.
        most_workers
            Those above are given back at once, also while they work.
        """
        hung = tuple(job.id for job in self.jobs.values() if job.hangs(now))
        counted = [job for job in self.jobs.values() if job.counts(now)]
        n_wanted = math.ceil(n_workers / self.pool.workers_per_job)
        if self.pool.max_jobs is not None:
            n_wanted = min(n_wanted, self.pool.max_jobs)
        n_lacking = n_wanted - len(counted)
        if n_lacking >= 0:
            for job in counted:
                job.surplus_at = None
            return Steps(0 if now < self._blocked_until else self._room(n_lacking), hung)
        # Those that wait go first, the youngest of them before others; then idle ones.
        busy = {job.id for job in counted if not job.workers.isdisjoint(needed)}
        order = sorted(counted, key=lambda j: (j.is_running, j.id in busy, -j.submitted_at))
        n_workers_most = min(most_workers, len(counted) * self.pool.workers_per_job)  # finite
        n_over = len(counted) - int(n_workers_most) // self.pool.workers_per_job
        gone = []
        for k, job in enumerate(order[:-n_lacking]):
            since = job.surplus_at = now if job.surplus_at is None else job.surplus_at
            patience = self.pool.idle_s if job.is_running else _UNWANTED_S
            if job.id in busy and is_adaptive and k >= n_over:
                job.surplus_at = None
            elif not is_adaptive or k < n_over or now - since >= patience:
                gone.append(job.id)
        for job in order[-n_lacking:]:
            job.surplus_at = None
        return Steps(cancel=(*gone, *hung))

    def to_cancel_again(self, known: Container[str], now: float) -> list[str]:
        """Jobs that were cancelled, and that the batch system still knows."""
        late = [
            job
            for job in self.jobs.values()
            if job.cancelled_at is not None and now - job.cancelled_at >= _AGAIN_S
        ]
        return [job.id for job in late if job.id in known]

    def offer(self, now: float) -> Offer:
        """What the pool can give; only the workers it has, if others are long in coming."""
        jobs = [job for job in self.jobs.values() if job.counts(now)]
        waits = [job for job in jobs if not job.workers and job.gone_at is None]
        is_slow = any(now - job.submitted_at >= _SLOW_S for job in waits)
        n_here = sum(len(job.workers) for job in jobs)
        n_asked = n_here + len(waits) * self.pool.workers_per_job
        n_counted = n_here if self.trouble or is_slow else math.inf
        wait_s = statistics.median(self._waits) if self._waits else 0.0
        return Offer(self.pool.max_workers, n_here, n_asked, n_counted, wait_s)

    def n_waiting(self) -> int:
        """Jobs that have no nodes yet."""
        return sum(not job.is_running and not job.is_cancelled for job in self.jobs.values())

    def n_starting(self) -> int:
        """Jobs that have their nodes, and no worker yet."""
        return sum(
            job.is_running and not (job.has_joined or job.is_cancelled)
            for job in self.jobs.values()
        )

    def _room(self, n_jobs: int) -> int:
        """How many of `n_jobs` may be queued, in one submission."""
        n_jobs = int(min(n_jobs, self._at_once))
        if self.pool.max_queued is None:
            return n_jobs
        return max(0, min(n_jobs, self.pool.max_queued - self.n_waiting()))

    def _note_begin(self, job: Job, is_running: bool, now: float) -> None:
        """A job is known to have its nodes, or not."""
        if is_running and not (job.is_running or job.has_joined):
            self._waits.append(max(0.0, now - job.submitted_at))

    def _recover(self) -> None:
        """What was wrong is not any more."""
        self.trouble, self._wait_s, self._blocked_until = "", _FIRST_WAIT_S, -math.inf

    def __str__(self) -> str:
        running = sum(bool(job.workers) for job in self.jobs.values())
        text = f"{self.name}: {running} jobs with workers"
        if n := self.n_waiting():
            reasons = sorted(
                {j.reason for j in self.jobs.values() if j.reason and not j.is_running}
            )
            text += f", {n} pending" + (f" ({', '.join(reasons)})" if reasons else "")
        if n := self.n_starting():
            text += f", {n} starting"
        return text + (f"; {self.trouble.splitlines()[0]}" if self.trouble else "")
