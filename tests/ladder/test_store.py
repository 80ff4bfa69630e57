from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dask_pcm import Context
from dask_pcm.context.context import ContextRef, Recipe
from dask_pcm.errors import LoadError
from dask_pcm.ladder.store import Store
from dask_pcm.tiers import Tier
from tests.support.patience import patient

# Loaders are pickled into their recipe, so what they share with a test stands in this module,
# which they find again by its name.
LOADED: list[str] = []
CLOSED: list[str] = []
GO = threading.Event()
STARTED = threading.Semaphore(0)
STORES: list[Store] = []
SELF: list[ContextRef] = []


@pytest.fixture(autouse=True)
def fresh():
    LOADED.clear()
    CLOSED.clear()
    GO.clear()


@pytest.fixture
def changes():
    return []


@pytest.fixture
def store(changes):
    store = Store(changes.append)
    yield store
    store.validate()


def load(name):
    import tests.ladder.test_store as shared

    shared.LOADED.append(name)
    return [name]


def slow_load(name):
    import tests.ladder.test_store as shared

    shared.STARTED.release()
    assert shared.GO.wait(patient(10))
    return shared.load(name)


def failing_load(message):
    import tests.ladder.test_store as shared

    shared.LOADED.append(message)
    raise RuntimeError(message)


def ended_load(message):
    import tests.ladder.test_store as shared

    shared.STORES.pop().end()
    return shared.failing_load(message)


def close(value):
    import tests.ladder.test_store as shared

    shared.CLOSED.append(value[0])


def test_one_load_however_many_ask(store):
    ref = Context(slow_load, "a").ref
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(store.load, ref) for _ in range(8)]
        assert STARTED.acquire(timeout=patient(10))
        GO.set()
        values = [future.result(10) for future in asked]
    assert LOADED == ["a"]
    assert all(value is values[0] for value in values)
    assert store.n_loads(ref.digest) == 1


def test_reports_each_step(store, changes):
    ref = Context(load, "a").ref
    store.load(ref)
    store.load(ref)
    assert [change.tier for change in changes] == [Tier.LOADING, Tier.DEVICE]
    assert changes[1].seconds > 0


def test_a_failure_has_the_users_traceback_is_reported_once_and_can_be_tried_again(store, changes):
    ref = Context(failing_load, "no such weights").ref
    with pytest.raises(LoadError, match=r"(?s)failing_load.*RuntimeError: no such weights"):
        store.load(ref)
    with pytest.raises(LoadError, match="no such"), store.acquire([ref], again=False):
        pass
    assert LOADED == ["no such weights"]
    assert [change.tier for change in changes] == [Tier.LOADING, Tier.FAILED]
    with pytest.raises(LoadError):
        store.load(ref)
    assert len(LOADED) == 2


def test_an_exclusive_context_has_one_holder(store):
    ref = Context(load, "a").ref
    entered, leave = threading.Semaphore(0), threading.Event()

    def hold():
        with store.acquire([ref]):
            entered.release()
            assert leave.wait(patient(10))

    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(hold) for _ in range(2)]
        assert entered.acquire(timeout=patient(10))
        assert not entered.acquire(timeout=0.2)
        leave.set()
        for future in held:
            future.result(10)


def test_a_shared_context_has_many(store):
    ref = Context(load, "a", exclusive=False).ref
    both = threading.Barrier(2, timeout=patient(10))

    def hold():
        with store.acquire([ref]):
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(hold) for _ in range(2)]:
            future.result(10)


def test_two_that_want_the_same_pair_never_wait_for_each_other(store):
    a, b = Context(load, "a").ref, Context(load, "b").ref

    def hold(refs):
        for _ in range(200):
            with store.acquire(refs) as values:
                assert [value[0] for value in values] == [
                    "a" if ref.digest == a.digest else "b" for ref in refs
                ]

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(hold, [a, b]), pool.submit(hold, [b, a])]:
            future.result(30)


def test_one_by_one_in_other_orders_one_is_told_and_the_others_go_on(store):
    """A ring of three: each holds one and wants the next."""
    refs = [Context(load, name).ref for name in "abc"]
    all_hold = threading.Barrier(3)

    def take(number):
        with store.acquire([refs[number]]) as (first,):
            all_hold.wait(patient(10))
            with store.acquire([refs[(number + 1) % 3]]) as (second,):
                return first[0] + second[0]

    with ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(take, number) for number in range(3)]
        errors = [future.exception(10) for future in taken]
    assert sorted(type(error).__name__ for error in errors if error) == ["DeadlockError"]
    message = str(next(error for error in errors if error))
    assert "holds or loads context 'load'" in message and "Acquire both in one call" in message
    with store.acquire(refs) as values:
        assert values == [["a"], ["b"], ["c"]]


def load_upper(lower):
    import tests.ladder.test_store as shared

    shared.STARTED.release()
    with shared.STORES[0].acquire([lower]) as (live,):
        return live


def test_a_task_and_a_loader_that_wait_for_each_other_are_told(store):
    """One holds a context and wants another, whose loader wants the one that is held."""
    STORES[:] = [store]
    lower = Context(load, "a").ref
    higher = Context(load_upper, lower).ref
    is_held = threading.Event()

    def hold_and_want():
        with store.acquire([lower]):
            is_held.set()
            assert STARTED.acquire(timeout=patient(10))
            with store.acquire([higher]):
                return "both"

    def want():
        assert is_held.wait(patient(10))
        with store.acquire([higher]):
            return "one"

    with ThreadPoolExecutor(2) as pool:
        errors = [
            future.exception(10) for future in (pool.submit(hold_and_want), pool.submit(want))
        ]
    assert any("Acquire both in one call" in str(error) for error in errors)


def test_a_loader_that_asks_for_its_own_context(store):
    STORES[:] = [store]
    SELF[:] = [Context(load_self).ref]
    with pytest.raises(LoadError, match="asks for that context itself"):
        store.load(SELF[0])


def load_self():
    import tests.ladder.test_store as shared

    return shared.STORES[0].load(shared.SELF[0])


def test_the_same_thread_takes_it_again_and_leaves_it_once(store):
    ref = Context(load, "a").ref
    with ThreadPoolExecutor(1) as pool:

        def take():
            with store.acquire([ref]):
                return "taken"

        with store.acquire([ref]):
            with store.acquire([ref]) as (value,):
                assert value == ["a"]
            waiting = pool.submit(take)
            with pytest.raises(TimeoutError):
                waiting.result(0.1)
        assert waiting.result(10) == "taken"


def test_turns_that_are_given_back_are_anothers_until_they_are_taken_again(store):
    ref = Context(load, "a").ref
    has_taken, leave = threading.Event(), threading.Event()

    def take():
        with store.acquire([ref]):
            has_taken.set()
            assert leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with store.acquire([ref]), store.acquire([ref]):
            given = store.turns.give_back()
            other = pool.submit(take)
            assert has_taken.wait(10)
            assert not store.evict(ref.digest)  # held all the same
            leave.set()
            store.turns.take_again(given)
            other.result(10)
            has_taken.clear()
            other = pool.submit(take)
        assert has_taken.wait(10)  # not before both blocks had ended
        other.result(10)


def test_who_never_takes_them_again_ends_no_turn_of_another(store):
    ref = Context(load, "a").ref
    has_taken, leave = threading.Event(), threading.Event()

    def take():
        with store.acquire([ref]):
            has_taken.set()
            assert leave.wait(10)

    with ThreadPoolExecutor(2) as pool:
        with store.acquire([ref]):
            store.turns.give_back()
            first = pool.submit(take)
            assert has_taken.wait(10)
        second = pool.submit(take)
        with pytest.raises(TimeoutError):
            second.result(0.1)
        leave.set()
        assert first.result(10) is second.result(10) is None


def test_what_cannot_be_loaded_rests_ten_times_as_long_as_the_load_took(store, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dask_pcm.ladder.loads.time.monotonic", lambda: now[0])

    def failing():
        now[0] += 5.0
        raise RuntimeError

    ref = Context(failing).ref
    monkeypatch.setattr(
        "dask_pcm.context.sealed.Sealed.open", lambda sealed: Recipe(failing, (), {})
    )
    assert not store.is_backing_off(ref.digest)
    with pytest.raises(LoadError):
        store.load(ref)
    now[0] = 54.0
    assert store.is_backing_off(ref.digest)
    now[0] = 56.0
    assert not store.is_backing_off(ref.digest)


def test_closed_it_drops_what_is_held_as_soon_as_it_is_not(store):
    held, other = Context(load, "a", close=close).ref, Context(load, "b", close=close).ref
    store.load(other)
    with store.acquire([held]):
        store.close()
        assert CLOSED == ["b"]
    assert CLOSED == ["b", "a"]
    with store.acquire([other]):  # a task that was still on its way
        assert CLOSED == ["b", "a"]
    assert CLOSED == ["b", "a", "b"]


def test_a_load_that_the_end_of_the_process_stops_does_not_warn(store, caplog):
    """What it needs, for instance the worker's plugin, may be gone by then."""
    with pytest.raises(LoadError, match="gone"):
        store.load(Context(failing_load, "gone").ref)
    assert "gone" in caplog.text
    caplog.clear()
    STORES.append(store)
    with pytest.raises(LoadError, match="lost"):
        store.load(Context(ended_load, "lost").ref)
    assert caplog.text == ""


def test_a_users_exception_never_costs_the_context(store):
    ref = Context(load, "a").ref
    with pytest.raises(ZeroDivisionError), store.acquire([ref]):
        _ = 1 / 0
    with store.acquire([ref]) as (value,):
        assert value == ["a"]
    assert LOADED == ["a"]


def test_what_is_held_is_not_evicted(store, changes):
    ref = Context(load, "a", close=close).ref
    with store.acquire([ref]):
        assert not store.evict(ref.digest)
    assert store.evict(ref.digest)
    assert CLOSED == ["a"]
    assert store.tier(ref.digest) is Tier.ABSENT
    assert changes[-1].tier is Tier.ABSENT
    store.load(ref)
    assert LOADED == ["a", "a"]


def interrupt():
    raise KeyboardInterrupt
    return 0


def test_an_interrupt_of_the_user_is_no_failed_load(store, changes, caplog):
    ref = Context(interrupt).ref
    with pytest.raises(KeyboardInterrupt):
        store.load(ref)
    assert caplog.text == "" and store.tier(ref.digest) is not Tier.LOADING
    with pytest.raises(KeyboardInterrupt):  # and may be tried again
        store.load(ref)


def test_a_loader_that_exits_is_a_failed_load(store):
    with pytest.raises(LoadError, match="SystemExit"):
        store.load(Context(exit, 3, name="exits").ref)
