"""Models behind an engine: which they are, and that answers are those of padded batches."""

from __future__ import annotations

import gc
import threading

import dask
import pandas as pd
import pytest
import torch

import dask_pcm as pcm
from dask_pcm.errors import LoadError
from dask_pcm.factcheck import LABELS, PROMPT, generate
from dask_pcm.factcheck.demo import MODEL_PATH
from dask_pcm.inference.calls import Classify, Generate, prompted
from dask_pcm.inference.engine import attention
from dask_pcm.inference.engine.probe import narrowed
from dask_pcm.inference.engine.timeslice import Kind, Owner
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.probe import cache_key, probe
from dask_pcm.inference.prompts import Template
from dask_pcm.inference.served import attendant_of
from dask_pcm.ladder.store import Store
from dask_pcm.tiers import Tier
from tests.conftest import patient
from tests.inference.engine.conftest import FAMILIES as EXACT
from tests.inference.test_probe import FAMILIES
from tests.support import models as tiny

CALL = Classify(
    template=Template(PROMPT),
    choices=tuple(LABELS),
    truncate_column=None,
    kept=("id",),
    batch_tokens=8_192,
)


@pytest.fixture(scope="module")
def demo():
    return load_model(str(MODEL_PATH), device="cpu")


@pytest.fixture
def served(demo):
    serving = attendant_of(demo)
    serving.start()
    yield serving
    serving.close()


def padded_of(kind, config, options):
    return PaddedModel(tiny.random_model(kind, config, **options), tiny.tokenizer())


def test_answers_are_those_of_padded_batches(demo, served):
    assert demo.is_attended
    claims = generate(600, seed=3)
    begun = [CALL.submit(claims.iloc[at : at + 200], served) for at in (0, 200, 400)]
    found = pd.concat([one.result(patient(60)) for one in begun])
    expected = CALL(claims, demo)
    assert found.id.tolist() == claims.id.tolist()
    assert found.answer.tolist() == expected.answer.tolist()
    assert (found.answer_probability - expected.answer_probability).abs().max() < 1e-5


def test_rows_that_cannot_be_scored_have_errors_beside_answers(demo, served):
    claims = generate(4, seed=4)
    claims["claim"] = [claims["claim"][0], None, "word " * 5_000, claims["claim"][3]]
    found = CALL.submit(claims, served).result(patient(60))
    assert found.answer.notna().tolist() == [True, False, False, True]
    assert "tokens; the model takes" in found.error[2]


def test_a_model_behind_an_engine_answers_a_callers_own_function_as_before(demo, served):
    """On another thread, while the engine computes."""
    ids = torch.tensor([demo.padded.tokenize(["a claim of some length"])[0]])
    with torch.inference_mode():
        alone = demo.padded.model(input_ids=ids).logits
    stop, wrong = threading.Event(), []

    def call():
        while not stop.is_set():
            with torch.inference_mode():
                if not torch.equal(demo.padded.model(input_ids=ids).logits, alone):
                    wrong.append(True)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        claims = generate(300, seed=5)
        found = CALL.submit(claims, served).result(patient(60))
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert found.answer.tolist() == CALL(claims, demo).answer.tolist()


def test_a_closed_engine_says_so(demo):
    serving = attendant_of(demo)
    serving.start()
    serving.close()
    with pytest.raises(LoadError, match="leaves the device"):
        CALL.submit(generate(2, seed=6), serving)


@pytest.mark.parametrize("family", ["alibi", "state", "state space", "mixed"])
def test_what_an_engine_does_not_compute_exactly_is_left_to_padded_batches(family):
    padded = padded_of(*FAMILIES[family])
    before = padded.model.config._attn_implementation
    assert probe(padded)["unfit"]
    assert padded.model.config._attn_implementation in (before, f"dask_pcm_{before}")


@pytest.mark.parametrize("family", EXACT)
def test_what_it_computes_exactly_is_found_so(family):
    found = probe(padded_of(*EXACT[family]))
    assert not found["unfit"] and found["packed"] < 1e-3


def test_a_window_that_an_engine_would_ignore_is_noticed(monkeypatch):
    padded = padded_of(*EXACT["mistral"])
    padded.model.config.sliding_window = 4096  # wider than any text that is tried
    hook = attention._attend

    def without(pack, layer, q, k, v, how):
        return hook(pack, layer, q, k, v, attention._How(how.scale, None, None, None))

    monkeypatch.setattr(attention, "_attend", without)
    for module in padded.model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 4096
    assert "changes its logits" in probe(padded)["unfit"]


def test_windows_are_as_wide_as_before_afterwards():
    model = padded_of(*EXACT["mistral"]).model
    model.config.sliding_window = 100
    with narrowed(model):
        assert model.config.sliding_window == 16
    assert model.config.sliding_window == 100


def test_a_model_leaves_the_device_between_two_calls_and_comes_back(tmp_path):
    """Down to the host tier, not dropped: nothing of its engine refers to it any more."""
    ref = pcm.LLM(tiny.saved(tmp_path / "model", tiny.llama()), device="cpu").ref
    store = Store(is_mapped=False)
    prompts = ["the moon is round", "a b c d"] * 5
    found = []
    gc.collect()
    gc.disable()  # what only Python's collector would free counts as used elsewhere
    try:
        for _ in range(3):
            with store.acquire([ref]) as (model,):
                texts = model.generate(prompts, max_tokens=6)
                answers = model.classify(prompts, [" yes", " no"])
                found.append(([one.text for one in texts], [one.logprobs for one in answers]))
                del model
            assert store.offload(ref.digest) and store.tier(ref.digest) is Tier.HOST
    finally:
        gc.enable()
    assert found[1] == found[0] and found[2] == found[0]
    assert store.n_loads(ref.digest) == 1
    store.close()


def test_rows_of_a_call_that_is_cancelled_leave_the_engine(demo, served):
    future = CALL.submit(generate(512, seed=7), served)
    assert served.hungry() < 100
    assert future.cancel()
    assert served.hungry() == served.n_rows
    claims = generate(3, seed=8)
    found = CALL.submit(claims, served).result(patient(60))
    assert found.answer.tolist() == CALL(claims, demo).answer.tolist()


def test_the_size_of_a_step_is_remembered(demo, tmp_path, monkeypatch):
    """By content of the model: another process begins with what was found here."""
    monkeypatch.setattr("dask_pcm.user_cache.cache_folder", lambda kind: tmp_path / kind)

    def capacity_of(content):
        monkeypatch.setattr(demo, "content", content)
        serving = attendant_of(demo)
        engines, make = [], serving._make
        serving._make = lambda: engines.append(make()) or engines[0]
        serving.start()
        serving.close()
        return engines[0].capacity

    first = capacity_of("a model")
    assert first.tokens == 512
    first.fail(400)
    assert 0 < first.tokens < 400
    assert capacity_of("a model").tokens == first.tokens
    assert capacity_of("another").tokens == 512 and capacity_of(None).tokens == 512


def test_a_size_that_cannot_be_read_is_not_remembered(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("dask_pcm.user_cache.cache_folder", lambda kind: tmp_path)
    monkeypatch.setattr(demo, "content", "some content")
    key = cache_key("tokens of a step", demo.padded, "some content")
    for content in (b"[" * 100_000, b"", b"null", b"-5", b"true", b'"many"', b"\xff"):
        (tmp_path / f"{key}.json").write_bytes(content)
        serving = attendant_of(demo)
        serving.start()
        try:
            assert CALL.submit(generate(2, seed=9), serving).result(patient(60)).error.isna().all()
        finally:
            serving.close()


def test_its_slices_and_memory_are_as_they_are_set(demo):
    with dask.config.set(
        {
            "pcm.inference.slice-tokens": 4,
            "pcm.inference.question-weight": 3,
            "pcm.inference.recompute": "never",
            "pcm.inference.host-pages": "1 MiB",
        }
    ):
        serving = attendant_of(demo)
    engine = serving._make()
    assert serving.host_bytes == 1 << 20
    slabs, shape = engine.paging.slabs, engine._pool.shape
    assert slabs.n_free == (1 << 20) // shape.page_bytes(4)
    assert not engine.paging._may_recompute
    slices = engine.schedule._slices
    assert slices.slice_tokens == 4 and slices._weights[Kind.QUESTION] == 3
    engine.close()


def test_texts_that_the_device_has_no_room_for_are_generated_all_the_same(demo, monkeypatch):
    claims = generate(12, seed=8)
    call = Generate(
        template=Template(PROMPT),
        truncate_column=None,
        kept=("id",),
        batch_tokens=8_192,
        max_tokens=20,
    )
    expected = call(claims, demo)
    monkeypatch.setattr("dask_pcm.inference.served._POOL_BYTES", 1)
    serving = attendant_of(demo)
    engine = serving._make()
    assert engine._pool.n_pages == 1
    monkeypatch.setattr(serving, "_make", lambda: engine)
    serving.start()
    # The host's memory is a multiple of the device's, which is next to none here.
    engine.paging.slabs.most_pages = 1_000
    found = call.submit(claims, serving).result(patient(60))
    assert engine.paging.n_sent
    serving.close()
    pd.testing.assert_frame_equal(found, expected)


def test_rows_of_a_batch_have_the_client_of_their_task(demo, served, monkeypatch):
    owners = []
    submit = served.submit
    monkeypatch.setattr(prompted, "client_of_task", lambda: "Client-7")
    monkeypatch.setattr(
        served, "submit", lambda rows: owners.extend(row.owner for row in rows) or submit(rows)
    )
    CALL.submit(generate(3, seed=1), served).result(patient(30))
    assert owners == [Owner(Kind.BATCH, "Client-7")] * 3
