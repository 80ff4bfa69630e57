"""One question on its client: asked again, moved, refused."""

from __future__ import annotations

import pickle
import time
from types import SimpleNamespace

import pytest

from dask_pcm.errors import (
    AskError,
    DeviceMemoryError,
    InstallError,
    LoadError,
    ModelError,
)
from dask_pcm.inference.calls import Generate
from dask_pcm.inference.language_model import _options
from dask_pcm.inference.options import checked_generation
from dask_pcm.inference.questions.exchange import MAX_LOST, Exchange
from dask_pcm.inference.questions.models import named
from dask_pcm.inference.questions.question import Question
from dask_pcm.plugins.questions import DONE, LOST, MOVED, UNKNOWN


class Told(Exchange):
    """An exchange that is told by the test what the gate and workers say."""

    def __init__(self, plain, timeout_s=None):
        self.calls = []
        call = Generate(**_options(False, True), **checked_generation(9, 0.0, None, 1.0, 0, (), 1))
        question = Question(call=call, prompt="x", is_chat=None, client="me")
        super().__init__(FakeClient(), plain.ref, question, timeout_s)

    def _call(self, op, put, **says):
        self.calls.append((op, says))

    def message(self, tokens=(), text="", **about):
        told = {"id": self.id, "attempt": self._attempt, "tokens": [*tokens], "text": text}
        return told | about

    def say(self, tokens=(), text="", **end):
        return self.take(self.message(tokens, text) | ({"end": end} if end else {}))

    def wait(self):
        """Until it asks again, without a wait."""
        n_calls = len(self.calls)
        self._again_at = time.monotonic()
        self.take(None)
        return self.calls[n_calls:]


class FakeClient:
    id, status, asynchronous, cluster = "me", "running", False, None
    scheduler = SimpleNamespace(address="tcp://there:1")

    def subscribe_topic(self, topic, handler):
        self.handler = handler


def test_a_draft_goes_along_and_three_lost_workers_are_forgiven(plain):
    told = Told(plain)
    for number in range(MAX_LOST):
        told.say([number], f"{number} ")
        old = told._attempt
        told.say(end=LOST, why="gone")
        assert told.take({"attempt": old, "tokens": [9], "text": "stale"}) == ""
        ((op, says),) = told.wait()
        asked = pickle.loads(says["question"])
        assert op == "pcm_ask" and says["attempt"] == old + 1 and says["id"] == told.id
        assert asked.draft == tuple(range(number + 1))
        assert asked.n_chars == len(told.text) == 2 * (number + 1)
    with pytest.raises(AskError, match="4 workers in succession were lost while"):
        told.say(end=LOST, why="gone")


def test_lost_workers_are_forgiven_while_the_answer_grows(plain):
    """Workers that come and go are not ended by the question."""
    told = Told(plain)
    for _ in range(5 * MAX_LOST):
        told.say(range(20), "twenty")
        told.say(end=LOST, why="gone")
        told.wait()
    for _ in range(MAX_LOST - 1):
        told.say([1], "one")  # what ends its workers may have a token before
        told.say(end=LOST, why="gone")
        told.wait()
    with pytest.raises(AskError, match="4 workers in succession"):
        told.say([1], "one")
        told.say(end=LOST, why="gone")


def test_a_text_that_was_settled_too_soon_is_put_right_in_the_end(plain):
    told = Told(plain)
    told.say([1], "\u00e9")
    end = {"text": "\ufffd\ufffd abc", "n_tokens": 2, "finish_reason": "stop"}
    told.take(told.message([2], "\ufffd abc", end={"end": DONE, **end}))
    assert told.text == told.reply.text == "\ufffd\ufffd abc"


def test_a_scheduler_that_is_gone_is_named(plain):
    told = Told(plain)
    told.client.status = "connecting"
    told.take(None)
    assert told.note == "waiting for the scheduler at tcp://there:1: the connection is lost"
    told.client.status = "closed"
    with pytest.raises(AskError, match="scheduler at tcp://there:1"):
        told.take(None)


def test_requests_that_break_for_ever_end_the_wait(plain):
    told = Told(plain)
    with pytest.raises(AskError, match="could not be asked: OSError"):
        for _ in range(20):
            told.take({"attempt": told._attempt, "standing": OSError("no")})
    told = Told(plain)
    told.client.status = "connecting"
    for _ in range(20):
        told.take({"attempt": told._attempt, "standing": OSError("no")})
    told.client.status = "running"  # connected again: what failed before does not count
    told.take({"attempt": told._attempt, "standing": OSError("no")})


def test_what_a_loader_raised_is_said_without_its_traceback(plain):
    told = Told(plain)
    why = "Context 'm' could not be loaded:\n\nTraceback:\n  line 3\nOSError: no such file\n"
    with pytest.raises(LoadError) as raised:
        told.take({"attempt": told._attempt, "standing": {"refused": "not loaded", "why": why}})
    assert str(raised.value) == "Context 'm' could not be loaded: OSError: no such file"
    assert "line 3" in str(raised.value.__cause__)
    why = "Context 'm' could not be loaded:\n\nTraceback:\n  line 3\nE: sizes:\n\tone\n\ttwo\n"
    with pytest.raises(LoadError, match=r"^Context 'm' could not be loaded: E: sizes: one two$"):
        told.take({"attempt": told._attempt, "standing": {"refused": "not loaded", "why": why}})


def test_it_is_moved_as_often_as_needed_while_tokens_come(plain):
    told = Told(plain)
    for number in range(30):
        told.say([number], "x")
        told.say(end=MOVED, why="not warm")
        told.wait()
    with pytest.raises(AskError, match="times in succession"):
        for _ in range(30):
            told.say(end=MOVED, why="not warm")
            told.wait()


def test_what_is_lost_on_the_way_is_asked_again(plain):
    """The scheduler drops messages to a client that is not connected at that moment."""
    told = Told(plain)
    told.take(told.message([1, 2], "ab", number=0))
    assert told.take(told.message([5], "e", number=2)) == ""  # the second one is lost
    assert told.text == "ab" and told.tokens == [1, 2]
    ((op, says),) = told.wait()
    assert op == "pcm_ask" and pickle.loads(says["question"]).draft == (1, 2)
    told.take(told.message([3, 4, 5], "cde", number=0))
    end = {"end": DONE, "n_tokens": 5, "finish_reason": "stop"}
    told.take(told.message([], "", number=1) | {"end": end})
    assert told.reply.text == "abcde"


def test_workers_that_could_not_go_on_are_avoided_until_a_token_comes(plain):
    told = Told(plain)
    for worker in ("a", "b"):
        told.take(told.message() | {"worker": worker, "end": {"end": MOVED, "why": "it is broken"}})
        ((_, says),) = told.wait()
    assert says["avoided"] == ["a", "b"]
    told.take(told.message([1], "x", number=0))
    told.take(told.message(number=1) | {"worker": "c", "end": {"end": LOST, "why": "gone"}})
    ((_, says),) = told.wait()
    assert says["avoided"] == ["c"]


def test_a_client_that_connects_again_asks_again(plain):
    told = Told(plain)
    attempt = told._attempt
    for _ in range(30):
        told.take({"attempt": attempt, "standing": {"refused": UNKNOWN}})
        ((op, says),) = told.wait()
        assert op == "pcm_ask" and says["attempt"] == attempt
    told.client.status = "closed"
    with pytest.raises(AskError, match="is closed"):
        told.take({"attempt": attempt, "standing": {"refused": UNKNOWN}})


def test_times_are_those_of_arrival_and_closing_wakes_who_waits(plain):
    told = Told(plain)
    told._begun_at = time.monotonic() - 5.0
    told.take(told.message([1], "a") | {"at": told._begun_at + 1.0})
    end = {"end": DONE, "n_tokens": 1, "finish_reason": "stop"}
    told.take(told.message() | {"end": end, "at": told._begun_at + 2.0})
    assert (told.reply.first_s, told.reply.total_s) == pytest.approx((1.0, 2.0))
    other = Told(plain)
    other.close()
    begun = time.monotonic()
    assert other.take(other.inbox.get(20.0)) == "" and not other.is_open
    assert time.monotonic() - begun < 10


def test_a_question_that_the_gate_has_forgotten_is_asked_again(plain):
    told = Told(plain)
    for _ in range(2):
        told.take({"attempt": told._attempt, "standing": {"is_open": False}})
    assert [op for op, _ in told.wait()] == ["pcm_ask"]


@pytest.mark.parametrize(
    ("standing", "kind"),
    [
        (None, InstallError),
        ({"refused": "too large", "why": "it needs more"}, DeviceMemoryError),
        ({"refused": "foreign"}, AskError),
        ({"refused": "duplicate"}, AskError),
        ({"refused": "not loaded", "why": "ZeroDivisionError"}, LoadError),
        (TypeError("a bug"), AskError),
    ],
)
def test_what_the_gate_refuses_is_raised(plain, standing, kind):
    with pytest.raises(kind):
        told = Told(plain)
        told.take({"attempt": told._attempt, "standing": standing})


def test_a_client_that_is_closed_ends_the_wait(plain):
    told = Told(plain)
    told.take({"attempt": 1, "standing": OSError("no connection")})  # it may come back
    told.client.status = "closed"
    with pytest.raises(AskError, match="is closed: the question is lost"):
        told.take(None)


def test_only_a_question_without_an_answer_is_cancelled(plain):
    told = Told(plain)
    told.say([1], "so", end=DONE, n_tokens=1, finish_reason="stop")
    told.close()
    assert [op for op, _ in told.calls] == ["pcm_ask"] and not told.is_open
    other = Told(plain)
    other.close()
    other.close()
    assert [op for op, _ in other.calls] == ["pcm_ask", "pcm_unask"]


def test_a_model_is_found_by_its_name_folder_or_alone(plain, chat):
    models = [plain.ref, chat.ref]
    assert named(models, "chat") == named(models, chat.path) == named([chat.ref], None) == chat.ref
    assert named(models, "elsewhere") is None
    with pytest.raises(ModelError, match=r"several language models: 'chat' .*, 'plain'"):
        named(models, None)
    with pytest.raises(ModelError, match="knows no language model yet"):
        named([], None)
