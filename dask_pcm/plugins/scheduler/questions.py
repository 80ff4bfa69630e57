"""Questions of clients go to a warm worker at once, past the queue; what comes back goes to them.

A question is no task: it takes no lane, and a worker whose lanes are all busy answers it. If no
worker is warm, it waits at the gate, which hears of it as of a run that is to come.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed.metrics import monotonic

from dask_pcm.context.context import ContextRef
from dask_pcm.plugins.questions import (
    DUPLICATE,
    FOREIGN,
    LOST,
    MOVED,
    NOT_INSTALLED,
    NOT_LOADED,
    TOO_LARGE,
    UNKNOWN,
    topic_of,
)
from dask_pcm.plugins.scheduler.contexts import ContextService
from dask_pcm.plugins.scheduler.hub import Hub
from dask_pcm.plugins.scheduler.members import Member
from dask_pcm.plugins.scheduler.runs import RunService
from dask_pcm.plugins.scheduler.service import Service
from dask_pcm.plugins.scheduler.workers import Workers
from dask_pcm.scheduling.actions import Action
from dask_pcm.scheduling.events import (
    Event,
    Group,
    QuestionEnded,
    QuestionPlaced,
    ResidencyReported,
    RunClosed,
    RunReported,
)
from dask_pcm.scheduling.rules.device_fit import why_too_large
from dask_pcm.scheduling.rules.questions import choose_worker, warm_in_s
from dask_pcm.tiers import Tier

#: Clients that have sent Dask no heartbeat for so long wait for no answer.
_SILENT_S = 60.0
#: The kind of work that questions are announced as.
_KIND = "ask"


@dataclass(slots=True)
class _Question:
    """A question that is not answered.

    Attributes
    ----------
    attempt
        How often it was asked; messages of an earlier attempt are dropped.
    ref
        The context that answers it.
    payload
        The question, which only workers unpickle; empty once one has it.
    avoided
        Workers that could not go on with it.
    worker
        The worker that answers it; empty while it waits for one.
    """

    id: str
    attempt: int
    client: str
    ref: ContextRef
    payload: bytes
    avoided: Sequence[str] = ()
    worker: str = ""


class QuestionService(Service):
    """Open questions, by id.

    Attributes
    ----------
    open
        Those that were asked and have not ended.
    """

    def __init__(
        self, hub: Hub, workers: Workers, contexts: ContextService, runs: RunService
    ) -> None:
        self._hub = hub
        self._workers = workers
        self._contexts = contexts
        self._runs = runs
        self.open: dict[str, _Question] = {}
        #: Contexts that are announced to the policy, since questions wait for them.
        self._announced: set[str] = set()
        self._clients: set[str] = set()
        self._is_over = False
        hub.observers.append(self)

    def handlers(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """See ``Service``."""
        return {
            "pcm_ask": self.on_ask,
            "pcm_asked": self.on_asked,
            "pcm_unask": self.on_unask,
            "pcm_models": self.on_models,
        }

    def stream_handlers(self) -> Mapping[str, Callable[..., None]]:
        """See ``Service``."""
        return {"pcm-answer": self.on_answer}

    # -- clients --------------------------------------------------------------------------------

    async def on_ask(
        self,
        id: str,
        attempt: int,
        client: str,
        ref: bytes,
        question: bytes,
        avoided: Sequence[str] = (),
    ) -> dict[str, Any]:
        """A client asks a question; return how it stands, see ``_standing``.

        Errors are part of the answer: what a handler raises is logged as a fault of the scheduler.
        """
        if self._is_over:
            return {"refused": NOT_INSTALLED}
        if client not in self._hub.scheduler.clients:
            # It is gone, or connects again at this moment: what it is sent now would be lost.
            return {"refused": UNKNOWN}
        if (known := self.open.get(id)) is not None:
            if (known.client, known.attempt < attempt) != (client, True):
                return {"refused": DUPLICATE}
            self._cancel(known)
        asked: ContextRef = pickle.loads(ref)  # its recipe is sealed
        one = _Question(id, attempt, client, asked, question, avoided)
        if why := self._why_too_large(asked):
            return {"refused": TOO_LARGE, "why": why}
        self.open[id] = one
        self._clients.add(client)
        self._place(one)
        return self._standing(one)

    async def on_asked(self, id: str, client: str) -> dict[str, Any]:
        """A client asks how its question stands."""
        one = self.open.get(id)
        if self._is_over:
            return {"refused": NOT_INSTALLED}
        if one is None:
            return {"is_open": False}
        return {"refused": FOREIGN} if one.client != client else self._standing(one)

    async def on_unask(self, id: str, client: str) -> dict[str, Any]:
        """A client does not wait any more; no error if the question has ended."""
        one = self.open.get(id)
        if one is None:
            return {"is_open": False}
        if one.client != client:
            return {"refused": FOREIGN}
        self._cancel(one)
        return {"is_open": False}

    async def on_models(self, run: str = "") -> dict[str, Any] | None:
        """The language models that the gate knows, or those of an open run, as pickled refs.

        None instead of them if there is no such run; None if the toolkit is not installed.
        """
        if self._is_over:
            return None
        known = dict(self._contexts.models)
        if run:
            wanted = self._runs.contexts_of.get(run)
            if wanted is None:
                return {"models": None}
            known = {digest: known[digest] for digest in wanted if digest in known}
        return {"models": [pickle.dumps(ref) for ref in known.values()]}

    def _standing(self, one: _Question) -> dict[str, Any]:
        """How an open question stands, for its client."""
        state, digest = self._hub.state, one.ref.digest
        tiers = [view.tiers.get(digest) for view in state.workers.values()]
        return {
            "is_open": True,
            "worker": one.worker,
            "n_workers": len(state.workers),
            "n_on_cluster": len(self._hub.scheduler.workers),
            "is_loading": Tier.LOADING in tiers,
            "warm_in_s": None if one.worker else warm_in_s(state, digest, monotonic()),
        }

    # -- workers --------------------------------------------------------------------------------

    def on_answer(self, worker: str, id: str, attempt: int, **news: Any) -> None:
        """A worker sends what is new of an answer: pass it on."""
        one = self.open.get(id)
        if one is None or (one.worker, one.attempt) != (worker, attempt):
            return
        if "end" in news:
            self._forget(one)
        self._tell(one, **news)

    def worker_left(self, worker: str, member: Member, is_lost: bool) -> None:
        """See ``Service``; its questions are asked again by their clients, who have the drafts."""
        for one in [one for one in self.open.values() if one.worker == worker]:
            self._end(one, LOST if is_lost else MOVED, f"worker {worker} is gone")

    def worker_joined(self, worker: str, member: Member) -> None:
        """See ``Service``; an earlier life of the plugin has forgotten its questions."""
        for one in [one for one in self.open.values() if one.worker == worker]:
            self._end(one, MOVED, f"worker {worker} has begun anew")

    def client_left(self, client: str) -> None:
        """See ``Service``."""
        for one in [one for one in self.open.values() if one.client == client]:
            self._cancel(one)
        if client in self._clients:
            self._clients.discard(client)
            self._hub.scheduler.unsubscribe_topic(topic_of(client), client)

    def on_event(self, event: Event, now: float) -> None:
        """See ``Observer``; a context that has become warm answers what waits for it."""
        match event:
            case ResidencyReported(context=digest, tier=Tier.DEVICE) if digest in self._announced:
                self._place_waiting(digest)

    def on_action(self, action: Action, now: float) -> None:
        """See ``Observer``."""

    def tick(self) -> None:
        """See ``Service``; workers are paused and drained without a word to this service."""
        for one in self._of_silent_clients():
            self._cancel(one)
        failures = self._hub.state.failures
        for digest in list(self._announced):
            if digest in failures.given_up:
                self._end_waiting(digest, NOT_LOADED, failures.errors.get(digest, ""))
                continue
            self._place_waiting(digest)
            if waiting := self._waiting(digest):
                if why := self._why_too_large(waiting[0].ref):
                    self._end_waiting(digest, TOO_LARGE, why)
                self._hub.wake()

    def _of_silent_clients(self) -> list[_Question]:
        """Questions of clients whose processes are stopped; they ask again if they go on."""
        since, known = time.time() - _SILENT_S, self._hub.scheduler.clients
        return [
            one
            for one in self.open.values()
            if one.client in known and known[one.client].last_seen < since
        ]

    # -- placing --------------------------------------------------------------------------------

    def _place(self, one: _Question) -> None:
        """Send a question to a worker; if none is warm, announce its context to the policy."""
        digest = one.ref.digest
        worker = choose_worker(self._hub.state, digest, monotonic(), one.avoided)
        if worker is None:
            self._announce(one)
            return
        one.worker, payload, one.payload = worker, one.payload, b""
        self._hub.apply(QuestionPlaced(worker, digest))
        about = {"id": one.id, "attempt": one.attempt, "digest": digest}
        self._workers.tell(worker, {"op": "pcm-ask", **about, "question": payload})

    def _place_waiting(self, digest: str) -> None:
        for one in self._waiting(digest):
            self._place(one)
        self._withdraw(digest)

    def _waiting(self, digest: str) -> list[_Question]:
        found = self.open.values()
        return [one for one in found if not one.worker and one.ref.digest == digest]

    def _announce(self, one: _Question) -> None:
        """Have the policy warm a worker, as for a run that will submit one row.

        Once for each context, however many questions wait for it: one worker answers them all.
        """
        digest = one.ref.digest
        if digest in self._announced:
            return
        self._announced.add(digest)
        self._contexts.declare([one.ref])
        group = Group((digest,), _KIND, client=one.client)
        self._hub.apply(RunReported(_run_of(digest), group, 1.0, 1))

    def _withdraw(self, digest: str) -> None:
        """End what was announced, if no question waits for the context any more."""
        if digest in self._announced and not self._waiting(digest):
            self._announced.discard(digest)
            self._hub.apply(RunClosed(_run_of(digest)))
            self._contexts.refs.discard([digest])

    def _why_too_large(self, ref: ContextRef) -> str:
        state = self._hub.state
        n_bytes = self._contexts.size_of(ref)
        return why_too_large(state, [ref.name], n_bytes, state.workers.values())

    # -- ends -----------------------------------------------------------------------------------

    def _cancel(self, one: _Question) -> None:
        """Have the worker compute an answer no further."""
        self._forget(one)
        if one.worker:
            self._workers.tell(one.worker, {"op": "pcm-unask", "id": one.id})

    def _forget(self, one: _Question) -> None:
        self.open.pop(one.id, None)
        if one.worker:
            self._hub.apply(QuestionEnded(one.worker, one.ref.digest))
        self._withdraw(one.ref.digest)

    def _end_waiting(self, digest: str, end: str, why: str) -> None:
        for one in self._waiting(digest):
            self._end(one, end, why)

    def _end(self, one: _Question, end: str, why: str) -> None:
        """End a question without an answer, and tell its client why."""
        self._forget(one)
        self._tell(one, tokens=[], text="", end={"end": end, "why": why})

    def _tell(self, one: _Question, **news: Any) -> None:
        """Send something to the client of a question, as an event of its topic.

        Past Dask's broker, which would keep every answer, readable by every client.
        """
        about = {"id": one.id, "attempt": one.attempt, "worker": one.worker}
        event = time.time(), {**about, **news}
        topic = topic_of(one.client)
        self._hub.scheduler.client_send(one.client, {"op": "event", "topic": topic, "event": event})

    def uninstall(self) -> None:
        """See ``Service``."""
        self._is_over = True
        for one in list(self.open.values()):
            self._end(one, NOT_INSTALLED, "")


def _run_of(digest: str) -> str:
    """The name under which questions to a context are announced."""
    return f"questions-{digest}"
