"""Models to ask, and what is left of questions."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import Client

import dask_pcm as pcm
from dask_pcm.inference.calls import Generate
from dask_pcm.inference.language_model import _options
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.options import checked_generation
from dask_pcm.inference.padded_generate import continue_rows
from dask_pcm.plugins.scheduler.plugin import GATE
from tests.conftest import validated_cluster
from tests.support import models as tiny
from tests.support.patience import until

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
