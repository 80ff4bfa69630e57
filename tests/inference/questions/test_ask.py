"""Questions to a model on a cluster: what is asked, and what is answered."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import os
import time
import uuid
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
from distributed import Client, Event, get_client, wait

import dask_pcm as pcm
from dask_pcm.errors import (
    AskError,
    InstallError,
    PromptError,
)
from dask_pcm.inference.calls import Generate
from dask_pcm.inference.calls.generate import Continuation
from dask_pcm.inference.language_model import _options
from dask_pcm.inference.options import checked_generation
from dask_pcm.inference.questions.chat import checked_prompt, has_chat_template
from dask_pcm.inference.questions.exchange import Exchange
from dask_pcm.inference.questions.mailbox import Mailbox
from dask_pcm.inference.questions.question import Question, Streamed, settled
from tests.inference.questions.conftest import MESSAGES, PROMPT, check, check_nothing_left, expected
from tests.support.patience import patient, until


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 60},
        {"max_tokens": 60, "temperature": 1.0, "seed": 7},
        {"max_tokens": 40, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
        {"max_tokens": 1},
    ],
)
def test_tokens_are_those_of_generate(client, plain, local, options):
    stream = plain.stream(PROMPT, **options)
    check(stream, list(stream), expected(local, plain, PROMPT, **options))
    assert plain.ask(PROMPT, **options).text == stream.text


def test_a_stop_string_never_shows_not_even_its_beginning(client, plain, local):
    whole = expected(local, plain, PROMPT, max_tokens=200)[1].text
    at = next(k for k in range(60, len(whole)) if whole.find(whole[k : k + 6]) == k)
    stop = [whole[at : at + 6], "never said"]
    stream = plain.stream(PROMPT, max_tokens=200, stop=stop)
    shown = list(itertools.accumulate(stream))
    check(
        stream,
        [shown[0], *(b[len(a) :] for a, b in itertools.pairwise(shown))],
        expected(local, plain, PROMPT, max_tokens=200, stop=stop),
    )
    assert stream.reply.finish_reason == "stop" and stream.text == whole[:at]
    assert all(whole[:at].startswith(one) for one in shown)


def test_bytes_that_no_character_begins_with_change_what_was_settled(plain):
    """A tokenizer that decodes runs of bytes as a whole."""
    texts = {(): "", (1,): "\u00e9", (1, 2): "\ufffd\ufffd", (1, 2, 3): "\ufffd\ufffd abc"}
    model = SimpleNamespace(decode=lambda tokens: texts[tuple(tokens)])
    row, future = SimpleNamespace(new=[1]), Future()
    call = Generate(**_options(False, True), **checked_generation(9, 0.0, None, 1.0, 0, (), 1))
    question = Question(call=call, prompt="x", is_chat=None, client="me")
    answer = Streamed(question, model, row, future)
    assert answer.take().text == "\u00e9"
    row.new = [1, 2, 3]
    future.set_result([Continuation("\ufffd\ufffd abc", 3, "stop")])
    last = answer.take()
    assert last.end["text"] == "\ufffd\ufffd abc" and last.tokens == [2, 3]
    # Another worker has sent the first character, which its second token changed.
    resumed = replace(question, draft=(1, 2), n_chars=1)
    assert Streamed(resumed, model, row, future).take().end["text"] == "\ufffd\ufffd abc"


def test_a_stream_that_was_closed_has_no_empty_answer(client, plain):
    stream = plain.stream(PROMPT, max_tokens=100)
    with stream, pytest.raises(TypeError, match="cannot be copied"):
        copy.copy(stream)
    with pytest.raises(AskError, match="closed, and its answer is not complete"):
        list(stream)


def test_a_forked_process_is_told_to_make_its_own_client(client, plain):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            plain.ask(PROMPT, max_tokens=2)
        except BaseException as error:
            os.write(write, repr(error).encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 4096).decode()
    os.close(read)
    os.waitpid(child, 0)
    assert said.startswith("InstallError") and "Make a client here" in said
    assert plain.ask(PROMPT, max_tokens=2).n_tokens == 2


def test_text_is_settled_before_it_is_shown():
    whole = "naïve — 🙂 STOP"
    data = whole.encode()
    shown = [settled(data[:k].decode(errors="replace"), ["STOP"]) for k in range(len(data) + 1)]
    assert all(after.startswith(before) for before, after in itertools.pairwise(shown))
    assert shown[-1] == "naïve — 🙂 " and "\ufffd" not in "".join(shown)


def test_messages_are_rendered_by_the_template_with_one_beginning(client, chat, local, folders):
    live = local[folders[1]]
    rendered = live.tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    ids = live.padded.tokenize([rendered])[0]
    assert ids.count(live.tokenizer.bos_token_id) <= 2
    reply = chat.ask(MESSAGES, max_tokens=30)
    assert reply.text == expected(local, chat, rendered, max_tokens=30)[1].text
    # The same ids as transformers' own, so the beginning is not doubled.
    own = live.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    own = own["input_ids"] if not isinstance(own, list) else own
    call = Generate(**_options(False, True), **checked_generation(30, 0.0, None, 1.0, 0, (), 1))
    assert list(call.planned(live.padded, [{"prompt": rendered}])[0]) == list(own)
    # A text is the message of a user, unless it is the whole prompt.
    text = MESSAGES[0]["content"]
    assert chat.ask(text, max_tokens=30).text == reply.text
    raw = chat.ask(text, max_tokens=30, chat=False)
    assert raw.text == expected(local, chat, text, max_tokens=30)[1].text != reply.text


def test_a_template_that_refuses_messages_says_why(client, chat):
    with pytest.raises(PromptError, match="refuses the messages: no such role"):
        chat.ask([{"role": "forbidden", "content": "x"}])


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        (MESSAGES, {}, "has no chat template"),
        ("x", {"chat": True}, "has no chat template"),
        (MESSAGES, {"chat": False}, "Messages are a chat"),
        ("", {}, "The question is empty"),
        ([], {}, "no message"),
        (7, {}, "a text or a list of messages; found 7"),
        ({"role": "user", "content": "x"}, {}, "a text or a list of messages"),
        (["x"], {}, "Message 0 is 'x'"),
        ([*MESSAGES, {"role": "user"}], {}, "Message 1 has no 'content'"),
        ([{"role": 1, "content": "x"}], {}, "Message 0 has role 1"),
        ([{"role": "user", "content": "x", "image": 1}], {}, "Message 0 has 'image'"),
        ("x", {"max_tokens": 0}, "max_tokens is 0"),
        ("x", {"chat": "yes"}, "chat must be True, False or None"),
        ("x", {"timeout": "soon"}, "timeout must be seconds"),
        ("x", {"timeout": 0}, "expected more than 0"),
        ("x", {"timeout": [1]}, "timeout must be seconds"),
        ("x", {"chat": 0}, "chat must be True, False or None; found 0"),
        (b"x", {}, "a text or a list of messages; found b'x'"),
        ("x\ud800y", {}, "The question has half of a character .* at 1"),
        ([{"role": "user", "content": "\udfff"}], {}, "Message 0 has half of a character"),
    ],
)
def test_wrong_questions_are_refused_before_anything_is_sent(
    client, plain, monkeypatch, prompt, options, text
):
    monkeypatch.setattr(Exchange, "_call", lambda *args, **kwargs: pytest.fail("it was sent"))
    with pytest.raises(PromptError, match=text):
        plain.ask(prompt, **options)


def test_unknown_options_are_refused_with_a_hint(plain):
    with pytest.raises(pcm.PCMError, match="max_tokens="):
        plain.ask("x", max_new_tokens=3)


def test_where_a_chat_template_is(tmp_path, folders):
    assert [has_chat_template(folder) for folder in folders] == [False, True]
    for name, text, is_there in (
        ("tokenizer_config.json", '{"chat_template": "x"}', True),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": "x"}]}', False),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', True),
        ("tokenizer_config.json", "no JSON", False),
        ("chat_template.json", '{"chat_template": "x"}', True),
    ):
        (tmp_path / name).write_text(text)
        assert has_chat_template(tmp_path) is is_there, text
        (tmp_path / name).unlink()
    assert checked_prompt(tuple(MESSAGES)) == tuple(MESSAGES)


def test_a_prompt_that_is_too_long_names_its_tokens_and_the_limit(client, plain):
    with pytest.raises(PromptError, match=r"The prompt has [\d,]+ tokens; the model takes 4096"):
        plain.ask("a b c d " * 3_000)


def test_an_encoder_answers_no_questions(minilm_folder):
    with pytest.raises(PromptError, match="ask needs a causal language model"):
        pcm.LLM(minilm_folder).ask("x")


def test_messages_come_in_order_and_at_most_twenty_a_second(client, plain, monkeypatch):
    told = []
    on_event = Mailbox._on_event

    def note(self, event):
        told.append((time.monotonic(), event[1]))
        on_event(self, event)

    monkeypatch.setattr(Mailbox, "_on_event", note)
    plain.ask(PROMPT, max_tokens=5)
    with Client(client.scheduler.address) as other:  # whose mailbox notes
        told.clear()
        stream = plain.stream(PROMPT, max_tokens=1_000, client=other)
        for _ in stream:
            pass
    numbers = [message["number"] for _, message in told]
    assert numbers == list(range(len(told))) and len(told) > 5
    seconds = told[-1][0] - told[0][0]
    assert len(told) <= 20 * seconds + 2
    assert sum(len(message["tokens"]) for _, message in told) == stream.reply.n_tokens == 1_000


def test_a_question_is_answered_while_every_lane_and_thread_is_busy(client, plain, shared_cluster):
    plain.ask(PROMPT, max_tokens=1)
    may_end = Event(uuid.uuid4().hex, client=client)
    held = client.map(_occupy, range(8), [may_end.name] * 8, [plain] * 8, pure=False)
    busy = client.map(_occupy, range(8), [may_end.name] * 8, pure=False)
    workers = shared_cluster.scheduler.workers.values()
    until(lambda: sum(len(ws.processing) for ws in workers) >= 6, patient(30))
    assert plain.ask(PROMPT, max_tokens=10).n_tokens == 10
    assert not any(future.done() for future in [*held, *busy])
    may_end.set()
    wait([*held, *busy], timeout=patient(30))


def test_a_task_asks_with_the_client_of_its_worker(client, plain):
    def ask(llm, has_client):
        given = {"client": get_client()} if has_client else {}
        return llm.ask(PROMPT, max_tokens=3, **given).n_tokens

    for has_client in (False, True):
        assert client.submit(ask, plain, has_client, pure=False).result(60) == 3


def _occupy(number, may_end, model=None):
    Event(may_end).wait()


async def _texts(llm, client, n, begun=None):
    found = []
    async for piece in llm.stream(PROMPT, max_tokens=n, client=client):
        found.append(piece)
        if begun is not None:
            begun.set()
    return "".join(found)


def test_an_asynchronous_client_streams(client, plain, local):
    async def ask():
        async with Client(client.scheduler.address, asynchronous=True) as own:
            several = await asyncio.gather(*(_texts(plain, own, n) for n in (20, 30, 40)))
            with pytest.raises(InstallError, match="async for piece in"):
                plain.ask(PROMPT, client=own)
            with pytest.raises(InstallError, match="async for piece in"):
                list(plain.stream(PROMPT, client=own))
            return several

    for n, text in zip((20, 30, 40), asyncio.run(ask()), strict=True):
        assert text == expected(local, plain, PROMPT, max_tokens=n)[1].text


def test_a_synchronous_client_streams_in_a_loop_of_its_user(client, plain, local):
    text = asyncio.run(_texts(plain, client, 20))
    assert text == expected(local, plain, PROMPT, max_tokens=20)[1].text


def _break(llm, client):
    stream = llm.stream(PROMPT, max_tokens=4_000)
    for _ in stream:
        break
    return stream


def _close(llm, client):
    stream = llm.stream(PROMPT, max_tokens=4_000)
    next(iter(stream))
    stream.close()
    return stream


def _leave_block(llm, client):
    with llm.stream(PROMPT, max_tokens=4_000) as stream:
        pieces = iter(stream)
        next(pieces)
    assert list(pieces) == []
    return pieces


def _collect(llm, client):
    llm.stream(PROMPT, max_tokens=4_000)
    gc.collect()


def _break_async(llm, client):
    async def first():
        async for _ in llm.stream(PROMPT, max_tokens=4_000):
            break

    asyncio.run(first())


def _cancel_task(llm, client):
    async def cancelled():
        begun = asyncio.Event()
        task = asyncio.create_task(_texts(llm, client, 4_000, begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


@pytest.mark.parametrize(
    "leave", [_break, _close, _leave_block, _collect, _break_async, _cancel_task]
)
def test_a_stream_that_is_left_is_computed_no_further(client, plain, shared_cluster, leave):
    plain.ask(PROMPT, max_tokens=1)
    kept = leave(plain, client)
    check_nothing_left(client, shared_cluster)
    del kept


def test_fifty_questions_at_a_time_and_two_clients(client, plain, local, shared_cluster):
    with Client(shared_cluster) as other:
        clients = [client] * 50 + [other] * 5
        streams = [
            plain.stream(PROMPT, max_tokens=20 + k % 5, client=one) for k, one in enumerate(clients)
        ]
        texts = ["".join(stream) for stream in streams]
    for k in range(5):
        text = expected(local, plain, PROMPT, max_tokens=20 + k)[1].text
        assert set(texts[k::5]) == {text}
    check_nothing_left(client, shared_cluster)


def test_without_an_engine_it_streams_as_well(client, folders, local, plain):
    llm = pcm.LLM(folders[0], deterministic=True)
    stream = llm.stream(PROMPT, max_tokens=60)
    assert len(list(stream)) > 1
    _, found = expected(local, plain, PROMPT, max_tokens=60)
    assert stream.text == found.text and stream.reply.n_tokens == found.n_tokens


def test_without_an_engine_an_answer_that_is_left_makes_room_for_the_next(
    client, folders, shared_cluster
):
    llm = pcm.LLM(folders[0], deterministic=True)
    endless = llm.stream(PROMPT, max_tokens=4000)
    next(iter(endless))
    endless.close()
    assert llm.ask(PROMPT, max_tokens=2, timeout=60).n_tokens <= 2
    check_nothing_left(client, shared_cluster)
