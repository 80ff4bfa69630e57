"""Questions at the gate: who answers them, who hears of them, and what is left of them."""

from __future__ import annotations

import pickle
import threading
import uuid
from collections import Counter
from dataclasses import replace

from distributed import Client, Worker
from distributed.metrics import monotonic
from distributed.utils_test import gen_cluster

import dask_pcm as pcm
from dask_pcm.plugins.questions import (
    DONE,
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
from dask_pcm.plugins.scheduler.plugin import GATE
from dask_pcm.plugins.worker.plugin import CONTEXTS
from dask_pcm.scheduling.actions import Offload
from dask_pcm.scheduling.events import Group, Work
from dask_pcm.scheduling.rules.questions import choose_worker
from dask_pcm.scheduling.rules.scaling import n_workers_wanted, needed_workers
from dask_pcm.tiers import Tier
from tests.support.gated import gated, install, poll
from tests.support.questions import Asked, Live

CONTEXT = pcm.Context(Live, exclusive=False)
GO_ON = threading.Event()
FAILS = pcm.Context(lambda: 1 / 0, exclusive=False)


def occupy(number, model=None):
    assert GO_ON.wait(30)


class Asking:
    """A client that asks, and what it is told."""

    def __init__(self, client):
        self.client = client
        self.told = []
        client.subscribe_topic(topic_of(client.id), lambda event: self.told.append(event[1]))

    async def ask(self, asked=None, context=CONTEXT, id=None, attempt=1):
        id = id or uuid.uuid4().hex
        standing = await self.client.scheduler.pcm_ask(
            id=id,
            attempt=attempt,
            client=self.client.id,
            ref=pickle.dumps(context.ref),
            question=pickle.dumps(asked or Asked(text="so")),
        )
        return id, standing

    async def end(self, id):
        await poll(lambda: self._end(id), 10)
        return self._end(id)

    def _end(self, id):
        return next((m["end"] for m in self.told if m["id"] == id and "end" in m), None)


async def warm(gate, client, *workers):
    """Have workers load the context, by tasks."""

    def hold(model):
        return 1

    futures = [
        client.submit(hold, CONTEXT, workers=[w.address], pure=False, key=f"hold-{w.address}")
        for w in workers
    ]
    await client.gather(futures)
    await poll(lambda: all(is_warm(gate, w) for w in workers), 10)


def is_warm(gate, worker):
    return gate.state.workers[worker.address].holds((CONTEXT.digest,))


def live_of(worker):
    return worker.plugins[CONTEXTS].contexts.store._residencies.by_digest[CONTEXT.digest].live.value


def holders(worker):
    return worker.plugins[CONTEXTS].contexts.store._residencies.by_digest[CONTEXT.digest].n_holders


@gated(nthreads=1)
async def test_a_warm_worker_answers_while_all_its_threads_and_lanes_are_busy(c, s, gate, a):
    await warm(gate, c, a)
    GO_ON.clear()
    plain = c.map(occupy, range(4))
    lanes = [c.submit(occupy, k, CONTEXT, key=f"lane-{k}") for k in range(4)]
    await poll(lambda: len(a.state.executing) == 3, 10)  # a thread and two lanes
    asking = Asking(c)
    id, standing = await asking.ask()
    assert standing["worker"] == a.address
    assert (await asking.end(id))["end"] == DONE
    assert "".join(m["text"] for m in asking.told) == "so"
    assert gate.questions.open == {} and not gate.questions._announced
    GO_ON.set()
    await c.gather([*plain, *lanes])


@gated()
async def test_questions_go_where_fewest_are_open(c, s, gate, a, b):
    await warm(gate, c, a, b)
    asking = Asking(c)
    workers = [(await asking.ask(Asked()))[1]["worker"] for _ in range(6)]
    assert Counter(workers) == {a.address: 3, b.address: 3}
    await poll(lambda: holders(a) == holders(b) == 3, 10)
    for worker in (a, b):
        for answer in live_of(worker).answers:
            answer.say("so", is_last=True)
    await poll(lambda: not gate.questions.open, 10)
    await poll(lambda: holders(a) == holders(b) == 0, 10)


@gated(is_held=True)
async def test_a_cold_context_is_loaded_once_however_many_ask(c, s, gate, a, b):
    asking = Asking(c)
    asked = [await asking.ask() for _ in range(10)]
    assert all(not standing["worker"] for _, standing in asked)
    assert all(standing["warm_in_s"] is not None for _, standing in asked)
    assert all(standing["n_workers"] == 2 for _, standing in asked)
    gate.release()
    assert {(await asking.end(id))["end"] for id, _ in asked} == {DONE}
    assert sum(w.plugins[CONTEXTS].contexts.store.n_loads(CONTEXT.digest) for w in (a, b)) == 1
    # Nothing is expected any more, and nothing is kept.
    assert not gate.state.ahead.runs.by_name and len(gate.contexts.refs) == 0


@gated(nthreads=0)
async def test_without_workers_a_question_waits(c, s, gate):
    asking = Asking(c)
    id, standing = await asking.ask()
    assert (standing["n_workers"], standing["warm_in_s"]) == (0, None)
    async with Worker(s.address, nthreads=1):
        assert (await asking.end(id))["end"] == DONE


@gated(nthreads=1)
async def test_a_context_that_cannot_be_loaded_ends_its_questions(c, s, gate, a):
    gate.hub.config = replace(gate.hub.config, n_load_attempts=1)
    asking = Asking(c)
    id, _ = await asking.ask(context=FAILS)
    end = await asking.end(id)
    assert end["end"] == NOT_LOADED and "ZeroDivisionError" in end["why"]
    assert not gate.state.ahead.runs.by_name
    # Asked anew, it is tried anew.
    id, _ = await asking.ask(context=FAILS)
    assert (await asking.end(id))["end"] == NOT_LOADED


@gated(nthreads=1)
async def test_what_fits_on_no_device_is_refused_with_the_sizes(c, s, gate, a):
    gate.state.workers[a.address].device_bytes = 100
    large = pcm.Context(Live, device_memory=101, exclusive=False, name="large")
    _, standing = await Asking(c).ask(context=large)
    assert standing["refused"] == TOO_LARGE and "'large' needs 101 bytes" in standing["why"]
    assert not gate.questions.open
    gate.state.workers[a.address].device_bytes = None


@gated()
async def test_a_request_of_another_client_is_refused(c, s, gate, a, b):
    await warm(gate, c, a)
    asking = Asking(c)
    id, _ = await asking.ask(Asked())
    async with Client(s.address, asynchronous=True) as other:
        about = {"id": id, "client": other.id}
        assert (await other.scheduler.pcm_unask(**about))["refused"] == FOREIGN
        assert (await other.scheduler.pcm_asked(**about))["refused"] == FOREIGN
        assert (await Asking(other).ask(id=id, attempt=9))[1]["refused"] == DUPLICATE
    assert (await asking.ask(id=id))[1]["refused"] == DUPLICATE
    assert id in gate.questions.open
    # Its own client may ask again, and end it.
    assert (await asking.ask(Asked(), id=id, attempt=2))[1]["worker"] == a.address
    assert await c.scheduler.pcm_unask(id=id, client=c.id) == {"is_open": False}
    await poll(lambda: live_of(a).n_cancelled == 2 and holders(a) == 0, 10)
    assert not gate.questions.open and asking.told == []


@gated()
async def test_nothing_is_left_of_a_client_that_leaves(c, s, gate, a, b):
    await warm(gate, c, a)
    async with Client(s.address, asynchronous=True) as other:
        gone = Asking(other)
        await gone.ask(Asked())
        await gone.ask(Asked(), context=pcm.Context(dict, exclusive=False))
        await poll(lambda: holders(a) == 1, 10)
    await poll(lambda: not gate.questions.open and holders(a) == 0, 10)
    assert not gate.questions._announced and not gate.questions._clients
    assert not s._broker._topics[topic_of(other.id)].subscribers


@gated(nthreads=1)
async def test_a_context_that_is_asked_is_not_idle(c, s, gate, a):
    await warm(gate, c, a)
    used_at = gate.state.workers[a.address].used_at
    asking, before = Asking(c), used_at[CONTEXT.digest]
    id, _ = await asking.ask(Asked())
    begun = used_at[CONTEXT.digest]
    await poll(lambda: live_of(a).answers, 10)
    live_of(a).answers[0].say("so", is_last=True)
    await asking.end(id)
    assert before < begun < used_at[CONTEXT.digest]


@gated()
async def test_the_scheduler_keeps_no_answers(c, s, gate, a, b):
    await warm(gate, c, a)
    asking = Asking(c)
    id, _ = await asking.ask(Asked(text="a secret"))
    await asking.end(id)
    assert not await c.get_events(topic_of(c.id))
    assert "a secret" not in repr(await c.get_events())


@gated()
async def test_a_worker_that_is_gone_ends_its_questions_as_lost_or_moved(c, s, gate, a, b):
    await warm(gate, c, a, b)
    asking = Asking(c)
    asked = {(await asking.ask(Asked()))[1]["worker"]: None for _ in range(2)}
    ids = {one.worker: one.id for one in gate.questions.open.values()}
    assert asked.keys() == ids.keys() == {a.address, b.address}
    await poll(lambda: holders(a) == holders(b) == 1, 10)
    a.batched_stream.comm.abort()
    assert (await asking.end(ids[a.address]))["end"] == LOST
    await c.retire_workers([b.address])
    assert (await asking.end(ids[b.address]))["end"] == MOVED


@gated(nthreads=1)
async def test_a_stale_answer_changes_nothing(c, s, gate, a):
    await warm(gate, c, a)
    asking = Asking(c)
    id, _ = await asking.ask(Asked())
    for attempt, worker in ((7, a.address), (1, "tcp://elsewhere:1")):
        gate.questions.on_answer(worker, id, attempt, tokens=[1], text="stale")
    gate.questions.on_answer(a.address, "unknown", 1, tokens=[1], text="stale")
    await poll(lambda: live_of(a).answers, 10)
    live_of(a).answers[0].say("so", is_last=True)
    await asking.end(id)
    assert [m["text"] for m in asking.told] == ["so"]


@gated(nthreads=1)
async def test_a_question_waits_while_a_suspect_is_computed_alone(c, s, gate, a):
    await warm(gate, c, a)
    view = gate.state.workers[a.address]
    suspect = Work("suspect", Group((CONTEXT.digest,), "kind", is_isolated=True), (0,))
    view.give(suspect, 0.0)
    gate.state.placed["suspect"] = a.address
    asking = Asking(c)
    id, standing = await asking.ask()
    assert standing["worker"] == "" and standing["warm_in_s"] == 0.0
    del gate.state.placed["suspect"]
    view.take("suspect")
    assert (await asking.end(id))["end"] == DONE


@gated()
async def test_a_worker_that_drains_or_is_paused_is_the_last_choice_or_none(c, s, gate, a, b):
    await warm(gate, c, a, b)
    first, second = (gate.state.workers[w.address] for w in (a, b))

    def choice(n_open=(), avoided=()):
        for view in (first, second):
            view.n_asked = Counter({CONTEXT.digest: dict(n_open).get(view.address, 0)})
        return choose_worker(gate.state, CONTEXT.digest, 0.0, avoided)

    first.is_draining = True
    assert choice({b.address: 5}) == b.address
    assert choice({b.address: 5}, [b.address]) == a.address
    second.is_paused = True
    assert choice() == a.address
    first.ends_at = 1.0
    assert choice() is None
    first.is_draining, first.ends_at, second.is_paused = False, float("inf"), False
    first.evicting[CONTEXT.digest] = second.evicting[CONTEXT.digest] = Group(("other",), "work")
    assert choice() is None  # what others wait for has its turn
    del second.evicting[CONTEXT.digest]
    assert choice({b.address: 5}) == b.address
    first.evicting.clear()
    assert choice({a.address: 1}) == b.address
    assert choice({a.address: 1}, [b.address]) == a.address
    assert choice((), [a.address, b.address]) in (a.address, b.address)  # there are no others
    first.n_asked, second.n_asked = Counter(), Counter()


@gated(config={"pcm.context.idle-timeout": "100ms", "pcm.gate.tick": "20ms"})
async def test_a_worker_that_answers_is_needed_and_its_context_is_in_use(c, s, gate, a, b):
    await warm(gate, c, a)
    asking = Asking(c)
    id, _ = await asking.ask(Asked())
    await poll(lambda: live_of(a).answers, 10)
    view = gate.state.workers[a.address]
    assert needed_workers(gate.state, [a.address, b.address]) == {a.address}
    assert n_workers_wanted(gate.state, 5.0) == 1
    used_at = view.used_at[CONTEXT.digest]
    await poll(lambda: monotonic() > used_at + 0.3, 10)  # longer than the idle time
    assert view.tiers[CONTEXT.digest] is Tier.DEVICE
    assert a.plugins[CONTEXTS].contexts.store.tier(CONTEXT.digest) is Tier.DEVICE
    live_of(a).answers[0].say("so", is_last=True)
    await asking.end(id)
    assert not view.n_asked and not needed_workers(gate.state, [a.address])
    assert n_workers_wanted(gate.state, 5.0) == 0
    await poll(lambda: CONTEXT.digest not in view.tiers, 10)  # it cannot be offloaded


@gated(config={"pcm.gate.tick": "20ms"})
async def test_a_client_whose_process_is_stopped_is_not_waited_for(c, s, gate, a, b):
    await warm(gate, c, a)
    asking = Asking(c)
    await asking.ask(Asked())
    await poll(lambda: holders(a) == 1, 10)
    s.clients[c.id].last_seen -= 120
    await poll(lambda: not gate.questions.open and holders(a) == 0, 4)
    s.clients[c.id].last_seen += 120
    id, _ = await asking.ask(attempt=2)  # it goes on
    assert (await asking.end(id))["end"] == DONE


@gated(nthreads=1)
async def test_an_offload_that_a_worker_refuses_is_known_to_the_gate(c, s, gate, a):
    await warm(gate, c, a)
    store = a.plugins[CONTEXTS].contexts.store
    view = gate.state.workers[a.address]
    _, _, let_go = store.hold_warm(CONTEXT.digest)
    gate.hub.carry_out([Offload(a.address, CONTEXT.digest)])
    gate.state.apply(Offload(a.address, CONTEXT.digest), 0.0)
    assert view.tiers[CONTEXT.digest] is Tier.HOST
    await poll(lambda: view.tiers[CONTEXT.digest] is Tier.DEVICE, 10)
    let_go()


@gated(nthreads=1)
async def test_a_client_that_is_not_connected_is_not_answered(c, s, gate, a):
    await warm(gate, c, a)
    packed = {"ref": pickle.dumps(CONTEXT.ref), "question": pickle.dumps(Asked())}
    said = await c.scheduler.pcm_ask(id="x", attempt=1, client="gone", **packed)
    assert said == {"refused": UNKNOWN} and not gate.questions.open


@gated()
async def test_uninstall_ends_questions_and_refuses_others(c, s, gate, a, b):
    await warm(gate, c, a)
    asking = Asking(c)
    begun, _ = await asking.ask(Asked())
    await poll(lambda: holders(a) == 1, 10)
    live = live_of(a)
    gate.uninstall()
    assert (await asking.end(begun))["end"] == NOT_INSTALLED
    assert (await asking.ask())[1] == {"refused": NOT_INSTALLED}
    assert await c.scheduler.pcm_asked(id=begun, client=c.id) == {"refused": NOT_INSTALLED}
    assert await c.scheduler.pcm_models() is None
    await c.unregister_worker_plugin(CONTEXTS)
    await poll(lambda: live.n_cancelled == 1, 10)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_the_language_models_of_a_run_are_known(c, s, a):
    await install(c)
    gate = s.plugins[GATE]
    model = replace(CONTEXT.ref, about=(("model", "folder"), ("commit", "1")))
    plain = pcm.Context(dict).ref
    about = {"client": c.id, "kind": "k", "n_rows": 1.0, "n_units": 1}
    await c.scheduler.pcm_run(run="mine", refs=pickle.dumps((model, plain)), **about)
    found = (await c.scheduler.pcm_models(run="mine"))["models"]
    assert [pickle.loads(one) for one in found] == [model]
    assert (await c.scheduler.pcm_models(run="other"))["models"] is None
    gate.runs._close_run("mine")
    # It may be warm still.
    assert len((await c.scheduler.pcm_models())["models"]) == 1
