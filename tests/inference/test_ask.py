"""Questions to a model on a cluster: real processes, real losses."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from distributed import Client, LocalCluster
from rich.console import Console

import dask_pcm as pcm
from dask_pcm.errors import (
    AskError,
    DeviceMemoryError,
    InstallError,
    LoadError,
    ModelError,
    PromptError,
)
from dask_pcm.inference.calls import Generate
from dask_pcm.inference.language_model import _options
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.options import checked_generation
from dask_pcm.inference.padded_generate import continue_rows
from dask_pcm.inference.questions.chat import checked_prompt, has_chat_template
from dask_pcm.inference.questions.exchange import MAX_LOST, Exchange
from dask_pcm.inference.questions.mailbox import Mailbox
from dask_pcm.inference.questions.models import named
from dask_pcm.inference.questions.question import Question, settled
from dask_pcm.inference.questions.shown import _Terminal
from dask_pcm.plugins.questions import DONE, LOST, MOVED
from dask_pcm.plugins.scheduler.plugin import GATE
from tests.conftest import validated_cluster
from tests.support import models as tiny
from tests.support.patience import patient, until
from tests.support.signals import heed_interrupts

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'forbidden' %}"
    "{{ raise_exception('no such role') }}{% endif %}<|turn|>{{ m.role }}: {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)
PROMPT = "Claim: the moon is round. Answer:"
LONG = 150
MESSAGES = [{"role": "user", "content": "Claim: the moon"}]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A model without a chat template, and one with a template and a beginning token."""
    made = tmp_path_factory.mktemp("models")
    model = tiny.llama(max_position_embeddings=4096)
    model.lm_head.weight.data[:4] = 0  # no control tokens, so answers are long
    words = tiny.tokenizer(bos=True)
    words.chat_template = TEMPLATE
    return tiny.saved(made / "plain", model), tiny.saved(made / "chat", model, words)


@pytest.fixture(scope="session")
def plain(folders):
    return pcm.LLM(folders[0])


@pytest.fixture(scope="session")
def chat(folders):
    return pcm.LLM(folders[1])


@pytest.fixture(scope="session")
def local(folders):
    """The same models in this process, in padded batches."""
    return {folder: load_model(str(folder), device="cpu") for folder in folders}


def expected(local, llm, prompt, **options):
    """Tokens and continuation that ``generate`` has for a prompt."""
    live = local[Path(llm.path)]
    given = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "seed": 0, "stop": (), **options}
    (found,) = live.generate([prompt], **given)
    call = Generate(**_options(False, True), **checked_generation(**given, n=1))
    (plan,) = call.planned(live.padded, [{"prompt": prompt}])
    (tokens,) = continue_rows(
        live.padded,
        [plan],
        call._numbers(plan),
        [call._n_max(live.padded, plan)],
        call.sampling,
        call._is_over(live.padded) if call.stop else None,
        8_192,
        live.padded.stops_of(call.stop),
    )
    return tokens, found


def gate_of(cluster):
    return cluster.scheduler.plugins[GATE]


def check(stream, pieces, found):
    tokens, continuation = found
    assert "".join(pieces) == stream.text == str(stream.reply) == continuation.text
    assert stream._exchange.tokens == tokens
    assert stream.reply.n_tokens == continuation.n_tokens
    assert stream.reply.finish_reason == continuation.finish_reason
    assert all(pieces)


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
    held = client.map(_occupy, range(8), [plain] * 8, pure=False)
    busy = client.map(_occupy, range(8), pure=False)
    workers = shared_cluster.scheduler.workers.values()
    until(lambda: sum(len(ws.processing) for ws in workers) >= 6, 30)
    begun = time.monotonic()
    reply = plain.ask(PROMPT, max_tokens=10)
    assert time.monotonic() - begun < patient(3) and reply.n_tokens == 10
    assert not any(future.done() for future in [*held, *busy])
    client.cancel([*held, *busy])


def _occupy(number, model=None):
    time.sleep(8)


async def _texts(llm, client, n):
    found = []
    async for piece in llm.stream(PROMPT, max_tokens=n, client=client):
        found.append(piece)
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


def _left(dask_worker=None):
    """What questions have left on a worker: open ones, holds, rows in engines."""
    from dask_pcm.plugins.worker.plugin import CONTEXTS

    plugin = dask_worker.plugins[CONTEXTS]
    found = list(plugin.contexts.store._residencies.by_digest.values())
    engines = [one.attendant for one in found if one.attendant is not None]
    return (
        len(plugin.questions._open),
        sum(one.n_holders for one in found),
        sum(bool(engine._requests) for engine in engines),
    )


def check_nothing_left(client, cluster):
    until(lambda: not gate_of(cluster).questions.open, 10, "no open questions at the gate")
    until(lambda: set(client.run(_left).values()) <= {(0, 0, 0)}, 10, "nothing on workers")


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
        task = asyncio.create_task(_texts(llm, client, 4_000))
        await asyncio.sleep(0.2)
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


def test_without_an_engine_the_answer_is_one_piece(client, folders, local, plain):
    llm = pcm.LLM(folders[0], deterministic=True)
    stream = llm.stream(PROMPT, max_tokens=12)
    pieces = list(stream)
    assert len(pieces) == 1
    _, found = expected(local, plain, PROMPT, max_tokens=12)
    assert stream.text == found.text and stream.reply.n_tokens == 12


def _fail_questions_of(marker):
    from dask_pcm.inference.engine.engine import Engine

    run = Engine._run

    def _run(self, parts):
        if any(marker in part.row.tokens[:3] for part in parts):
            raise RuntimeError("a broken forward")
        return run(self, parts)

    Engine._run = _run
    Engine._run_before = run


def _mend():
    from dask_pcm.inference.engine.engine import Engine

    Engine._run = Engine._run_before


def test_a_failing_forward_ends_that_question_alone(client, plain, local):
    live = local[Path(plain.path)]
    wrong = live.padded.tokenize(["yes no maybe"])[0]
    good = live.padded.tokenize([PROMPT])[0]
    assert wrong[0] not in good[:3]
    plain.ask(PROMPT, max_tokens=1)
    client.run(_fail_questions_of, wrong[0])
    try:
        other = plain.stream(PROMPT, max_tokens=50)
        with pytest.raises(AskError, match="has failed: RuntimeError: a broken forward"):
            plain.ask("yes no maybe", max_tokens=5)
        assert "".join(other) == expected(local, plain, PROMPT, max_tokens=50)[1].text
    finally:
        client.run(_mend)


def test_a_release_waits_for_the_answer_and_the_next_question_loads_again(
    client, plain, local, shared_cluster
):
    stream = plain.stream(PROMPT, max_tokens=300)
    pieces = iter(stream)
    first = next(pieces)
    assert pcm.release(plain) >= 1
    assert first + "".join(pieces) == expected(local, plain, PROMPT, max_tokens=300)[1].text
    assert plain.ask(PROMPT, max_tokens=3).n_tokens == 3


def _offload(digest, dask_worker=None):
    from dask_pcm.plugins.worker.plugin import CONTEXTS

    plugin = dask_worker.plugins[CONTEXTS]
    report, plugin.contexts.store._residencies.report = (
        plugin.contexts.store._residencies.report,
        lambda change: None,
    )
    plugin.contexts.store.offload(digest)
    plugin.contexts.store._residencies.report = report


def test_a_worker_that_is_not_warm_any_more_says_so_and_it_is_asked_again(client, plain):
    """The gate does not know yet that the context has left the device."""
    plain.ask(PROMPT, max_tokens=3)
    client.run(_offload, plain.digest)
    stream = plain.stream(PROMPT, max_tokens=3, timeout=30)
    moved = stream._exchange
    until(lambda: _step(stream) and moved._n_moved, 10)
    client.run(_report_absent, plain.digest)
    assert len("".join(stream)) == len(stream.text) > 0


def _step(stream):
    exchange = stream._exchange
    exchange.take(exchange.inbox.get(min(0.05, exchange.patience_s)))
    return True


def _report_absent(digest, dask_worker=None):
    from dask_pcm.ladder.residency import Change
    from dask_pcm.plugins.worker.plugin import CONTEXTS

    contexts = dask_worker.plugins[CONTEXTS].contexts
    contexts._report(Change(digest, contexts.store.tier(digest)))


# -- losses, of processes of their own -------------------------------------------------------------


@pytest.fixture
def cluster():
    with validated_cluster() as made, Client(made) as client:
        pcm.install(client)
        yield made
        if (gate := made.scheduler.plugins.get(GATE)) is not None:  # not uninstalled
            gate.state.validate()


@pytest.fixture(scope="session")
def long(plain, local):
    """What a long answer is."""
    return expected(local, plain, PROMPT, max_tokens=LONG)


@pytest.fixture
def asking(cluster, plain, long):
    """A stream of which some has arrived, its pieces, and what it will be: it takes seconds."""
    client = Client.current()
    client.run(_slow_down)
    stream = plain.stream(PROMPT, max_tokens=LONG, progress=False)
    pieces = iter(stream)
    return stream, pieces, next(pieces), long


def _slow_down():
    from dask_pcm.inference.engine.engine import Engine

    step = Engine.step

    def slow(self):
        time.sleep(0.02)
        return step(self)

    Engine.step = slow


def pid_of(client, address):
    return client.run(os.getpid, workers=[address])[address]


def answering(cluster, stream):
    return gate_of(cluster).questions.open[stream._exchange.id].worker


def test_a_worker_that_is_killed_loses_and_repeats_nothing(cluster, asking):
    stream, pieces, first, found = asking
    client = stream._exchange.client
    killed = answering(cluster, stream)
    os.kill(pid_of(client, killed), signal.SIGKILL)
    rest = list(pieces)
    check(stream, [first, *rest], found)
    assert stream._exchange._n_lost == 1


def test_a_worker_under_notice_finishes_its_questions(cluster, asking):
    stream, pieces, first, found = asking
    address = answering(cluster, stream)
    stream._exchange.client.run(_notice, patient(60), workers=[address])
    check(stream, [first, *pieces], found)
    assert stream._exchange._n_moved == stream._exchange._n_lost == 0
    until(lambda: address not in cluster.scheduler.workers, 30, "it leaves then")


def test_questions_move_if_the_notice_is_short(cluster, asking):
    stream, pieces, first, found = asking
    stream._exchange.client.run(_notice, 0.5, workers=[answering(cluster, stream)])
    check(stream, [first, *pieces], found)
    assert (stream._exchange._attempt, stream._exchange._n_lost) == (2, 0)


def _notice(seconds, dask_worker=None):
    from dask_pcm.plugins.worker.plugin import CONTEXTS

    dask_worker.loop.add_callback(dask_worker.plugins[CONTEXTS].notice, seconds)


def test_uninstall_ends_open_questions(cluster, asking):
    stream, pieces, _, _ = asking
    pcm.uninstall(stream._exchange.client)
    with pytest.raises(InstallError, match="call dask_pcm"):
        list(pieces)
    with pytest.raises(InstallError, match="call dask_pcm"):
        pcm.LLM(stream_folder(stream)).ask("x")


def stream_folder(stream):
    return dict(stream._exchange._ref.about)["model"]


def test_a_scheduler_without_the_toolkit_is_said(plain):
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as bare,
        Client(bare) as client,
        pytest.raises(InstallError, match="not installed on this cluster: call dask_pcm"),
    ):
        plain.ask("x", client=client)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_client_that_is_killed_or_interrupted(cluster, plain, number):
    Client.current().run(_slow_down)
    script = (
        "import sys; from distributed import Client; import dask_pcm as pcm\n"
        "client = Client(sys.argv[1])\n"
        "llm = pcm.LLM(sys.argv[2])\n"
        "llm.ask('Claim: the moon', max_tokens=1)\n"
        "try:\n"
        "    print('begun', flush=True)\n"
        "    llm.ask('Claim: the moon', max_tokens=4000)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, cluster.scheduler_address, plain.path]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=heed_interrupts,
        text=True,
    ) as process:
        assert process.stdout.readline() == "begun\n"
        questions = gate_of(cluster).questions
        until(lambda: [one for one in questions.open.values() if one.worker], 10)
        process.send_signal(number)
        with Client(cluster) as client:
            if number == signal.SIGINT:  # the client is still there
                assert process.stdout.readline() == "interrupted\n"
            check_nothing_left(client, cluster)
        process.kill()


def test_without_workers_it_waits_and_says_so(plain, capfd, caplog):
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0") as empty,
        Client(empty) as client,
    ):
        pcm.install(client)
        with pytest.raises(TimeoutError, match=r"no answer after 0.5 s .*no workers"):
            plain.ask("x", timeout=0.5)
        assert "no workers: the cluster has 0" in capfd.readouterr().err
        until(lambda: not gate_of(empty).questions.open, 10)
        stream = plain.stream(PROMPT, max_tokens=3, progress=False)
        stream._exchange._had_workers_at -= 60  # seconds have passed
        pieces = iter(stream)
        thread = threading.Thread(target=lambda: list(pieces))
        thread.start()
        until(lambda: "waits: no workers" in caplog.text, 10)
        empty.scale(1)
        thread.join(patient(40))
        assert stream.reply.n_tokens == 3


def test_loading_is_said_and_only_one_worker_loads(cluster, plain, capfd):
    loads = gate_of(cluster).contexts.loads
    streams = [plain.stream(PROMPT, max_tokens=3) for _ in range(5)]
    assert [len("".join(stream)) > 0 for stream in streams] == [True] * 5
    assert loads[plain.digest].n == 1
    assert "loading 'plain' on a worker" in capfd.readouterr().err


# -- what a client makes of what it is told -------------------------------------------------------


class Told(Exchange):
    """An exchange that is told by the test what the gate and workers say."""

    def __init__(self, plain, timeout_s=None):
        self.calls = []
        call = Generate(**_options(False, True), **checked_generation(9, 0.0, None, 1.0, 0, (), 1))
        question = Question(call=call, prompt="x", is_chat=None, client="me")
        super().__init__(FakeClient(), plain.ref, question, timeout_s)

    def _call(self, op, put, **says):
        self.calls.append((op, says))

    def say(self, tokens=(), text="", **end):
        told = {"id": self.id, "attempt": self._attempt, "tokens": [*tokens], "text": text}
        return self.take(told | ({"end": end} if end else {}))

    def wait(self):
        """Until it asks again, without a wait."""
        n_calls = len(self.calls)
        self._again_at = time.monotonic()
        self.take(None)
        return self.calls[n_calls:]


class FakeClient:
    id, status, asynchronous, cluster = "me", "running", False, None

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
    with pytest.raises(AskError, match="4 workers were lost while they answered it"):
        told.say(end=LOST, why="gone")


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


# -- shown -----------------------------------------------------------------------------------------


def test_a_notebook_shows_the_answer_until_it_is_there(client, plain, execute, tmp_path):
    source = (
        "from distributed import Client; import dask_pcm as pcm\n"
        f"client = Client({client.scheduler.address!r})\n"
        "from IPython.display import DisplayHandle\n"
        "shown = []; update = DisplayHandle.update\n"
        "def note(self, content, **kw):\n"
        "    shown.append(content['text/plain']); return update(self, content, **kw)\n"
        "DisplayHandle.update = note\n"
        f"reply = pcm.LLM({plain.path!r}).ask({PROMPT!r}, max_tokens=1_000)\n"
        "texts = [one for one in shown if reply.text.startswith(one) and one]\n"
        "print('parts', len(texts) > 2, texts == sorted(texts, key=len), shown[-1] == '')\n"
        "reply"
    )
    cell = nbformat.v4.new_code_cell(source)
    outputs = execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    printed = "".join(one.text for one in outputs if one.output_type == "stream")
    assert "parts True True True" in printed
    displays = [one for one in outputs if one.output_type == "display_data"]
    assert [one.data["text/plain"] for one in displays] == [""]
    (result,) = [one for one in outputs if one.output_type == "execute_result"]
    assert len(result.data["text/markdown"]) > 500


def test_a_terminal_shows_the_end_of_the_text_and_erases_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=20, height=6)
    with _Terminal(console, shows_text=True) as shown:
        shown.show("", "loading 'm'")
        shown.show("\n".join(f"line {k}" for k in range(50)), "")
        said = console.file.getvalue()
        assert "loading 'm'" in said and "line 49" in said and "line 30" not in said
    assert console.file.getvalue().endswith("\x1b[2K")
