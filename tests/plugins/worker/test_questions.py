"""Questions on a worker, on a thread of their own, without a cluster."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from types import SimpleNamespace

import pytest

import dask_pcm as pcm
from dask_pcm.errors import LoadError, PromptError
from dask_pcm.ladder.store import Store
from dask_pcm.plugins.questions import DONE, FAILED, MOVED, REFUSED
from dask_pcm.plugins.worker.questions import EVERY_S, Questions
from dask_pcm.tiers import Tier
from tests.support.patience import until
from tests.support.questions import Asked, Live

CONTEXT = pcm.Context(Live, exclusive=False)


class Desk:
    """A service with a store, and what it has sent."""

    def __init__(self):
        self.store = Store()
        self.sent = []
        self.restarts = []
        contexts = SimpleNamespace(store=self.store, set_threads=lambda: None)
        self.service = Questions(contexts, self._tell, self.restarts.append)
        self._numbers = itertools.count()

    def _tell(self, message):
        self.sent.append((time.monotonic(), message))

    def ask(self, asked=None, context=CONTEXT):
        id = f"question-{next(self._numbers)}"
        self.service.on_ask(id, 1, context.digest, pickle.dumps(asked or Asked()))
        return id

    def of(self, id):
        return [message for _, message in list(self.sent) if message["id"] == id]

    def end(self, id):
        """How an answer has ended."""
        return until(lambda: next((m["end"] for m in self.of(id) if "end" in m), None), 10)

    def n_holders(self, context=CONTEXT):
        return self.store._residencies.by_digest[context.digest].n_holders


@pytest.fixture
def desk():
    made = Desk()
    made.live = made.store.load(CONTEXT.ref)
    yield made
    made.service.close()
    made.store.validate()


def test_the_first_token_goes_at_once_and_others_together(desk):
    id = desk.ask()
    answer = until(lambda: desk.live.answers, 10)[0]
    begun = time.monotonic()
    for number in range(40):
        answer.say(f"{number} ", is_last=number == 39)
        threading.Event().wait(0.005)
    desk.end(id)
    sent = [(at, m) for at, m in desk.sent if m["id"] == id]
    assert sent[0][0] - begun < EVERY_S and sent[0][1]["text"] == "0 "
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(sent)]
    assert all(gap >= EVERY_S * 0.99 for gap in gaps) and len(sent) < 20
    assert "".join(m["text"] for _, m in sent) == "".join(f"{k} " for k in range(40))
    assert [m["number"] for _, m in sent] == list(range(len(sent)))
    assert sent[-1][1]["end"]["end"] == DONE


def test_a_context_is_held_until_the_answer_has_ended(desk):
    first, second = desk.ask(), desk.ask()
    until(lambda: len(desk.live.answers) == 2, 10)
    assert desk.n_holders() == 2 and desk.service.is_busy
    assert not desk.store.offload(CONTEXT.digest)
    desk.store.release(CONTEXT.digest)
    assert desk.store.tier(CONTEXT.digest) is Tier.DEVICE
    desk.live.answers[0].say("so", is_last=True)
    desk.end(first)
    assert desk.store.tier(CONTEXT.digest) is Tier.DEVICE
    desk.live.answers[1].say("so", is_last=True)
    desk.end(second)
    assert desk.store.tier(CONTEXT.digest) is Tier.ABSENT
    assert not desk.service.is_busy


def test_a_question_that_is_cancelled_is_computed_no_further(desk):
    kept, gone = desk.ask(), desk.ask()
    until(lambda: len(desk.live.answers) == 2, 10)
    desk.service.on_cancel(gone)
    until(lambda: desk.n_holders() == 1, 10)
    assert desk.live.n_cancelled == 1
    desk.live.answers[1].say("too late", is_last=True)
    desk.live.answers[0].say("so", is_last=True)
    assert desk.end(kept)["end"] == DONE
    assert desk.of(gone) == []


def test_what_is_not_warm_is_asked_elsewhere_and_never_loaded(desk):
    other = pcm.Context(lambda: Live(), exclusive=False)
    assert desk.end(desk.ask(context=other))["end"] == MOVED
    assert desk.store.n_loads(other.digest) == 0
    desk.store.offload(CONTEXT.digest)
    assert desk.end(desk.ask())["end"] == MOVED


def test_a_context_that_others_may_have_alone_answers_no_questions(desk):
    alone = pcm.Context(dict, exclusive=True)
    desk.store.load(alone.ref)
    assert desk.end(desk.ask(context=alone))["end"] == MOVED


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (PromptError("too long"), REFUSED),
        (LoadError("the engine is closed"), MOVED),
        (ValueError("bad"), FAILED),
        (RuntimeError("CUDA error: device-side assert triggered"), MOVED),
    ],
)
@pytest.mark.parametrize("is_begun", [False, True])
def test_errors_are_of_their_question_alone(desk, error, end, is_begun):
    other = desk.ask()
    until(lambda: desk.live.answers, 10)
    id = desk.ask(None if is_begun else Asked(error))
    if is_begun:
        until(lambda: len(desk.live.answers) == 2, 10)
        desk.live.answers[1].fail(error)
    found = desk.end(id)
    assert found["end"] == end and str(error) in found["why"]
    assert len(desk.restarts) == ("CUDA" in str(error))
    until(lambda: desk.n_holders() == 1, 10)
    desk.live.answers[0].say("so", is_last=True)
    assert desk.end(other)["end"] == DONE


def test_questions_move_when_the_worker_leaves(desk):
    ids = [desk.ask(), desk.ask()]
    until(lambda: len(desk.live.answers) == 2, 10)
    desk.live.answers[0].say("be")
    until(lambda: desk.of(ids[0]), 10)
    desk.service.move()
    assert [desk.end(id)["end"] for id in ids] == [MOVED, MOVED]
    assert desk.n_holders() == 0 and not desk.service.is_busy


def test_what_cannot_be_interrupted_keeps_its_context_until_it_ends(desk):
    id = desk.ask()
    (answer,) = until(lambda: desk.live.answers, 10)
    answer.is_slow = True
    desk.service.on_cancel(id)
    until(lambda: answer.then, 10)
    assert desk.n_holders() == 1 and not desk.store.offload(CONTEXT.digest)
    other = desk.ask(Asked(text="so"))  # and keeps no other waiting
    assert desk.end(other)["end"] == DONE
    answer.then()
    until(lambda: desk.n_holders() == 0, 10)


def test_one_that_takes_long_to_begin_keeps_no_other_answer_waiting(desk, monkeypatch):
    begins, goes_on = threading.Event(), threading.Event()
    first = desk.ask()
    (answer,) = until(lambda: desk.live.answers, 10)

    def slow(self, served, wake, apart):
        begins.set()
        assert goes_on.wait(20)
        return begin(self, served, wake, apart)

    begin = Asked.begin
    monkeypatch.setattr(Asked, "begin", slow)
    kept, gone = desk.ask(Asked(text="kept")), desk.ask(Asked(text="gone"))
    assert begins.wait(10)
    answer.say("so", is_last=True)
    assert desk.end(first)["end"] == DONE
    desk.service.on_cancel(gone)
    goes_on.set()
    assert desk.end(kept)["end"] == DONE
    until(lambda: desk.n_holders() == 0 and not desk.service.is_busy, 10)
    assert desk.of(gone) == []


def test_nothing_is_held_or_begun_once_it_is_closed(desk):
    desk.ask()
    until(lambda: desk.live.answers, 10)
    thread = desk.service._thread
    desk.service.close()
    thread.join(10)
    assert not thread.is_alive() and desk.n_holders() == 0 and desk.live.n_cancelled == 1
    desk.ask()
    assert len(desk.live.answers) == 1 and not desk.service.is_busy


def test_what_takes_long_is_computed_on_another_thread(desk):
    done = []
    began, goes_on = threading.Event(), threading.Event()

    def compute():
        began.set()
        assert goes_on.wait(10)
        return "computed"

    future = desk.service._run_apart(compute)
    assert began.wait(10)
    id = desk.ask(Asked(text="so"))
    assert desk.end(id)["end"] == DONE  # meanwhile
    goes_on.set()
    done.append(future.result(10))
    assert done == ["computed"]
