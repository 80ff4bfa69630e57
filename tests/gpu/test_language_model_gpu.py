"""What a user's own function gets on a GPU: the methods of the live object, beside a CPU's."""

from __future__ import annotations

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client

import dask_pcm as pcm
from dask_pcm.inference.loading import load_model
from tests.conftest import spawning, validated_cluster
from tests.inference.test_embed import ENCODERS, OTHERS, words
from tests.support import models as tiny
from tests.support.patience import patient

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # DeBERTa's
]
TEXTS = ["the moon is round", "yes", "Answer: no maybe " * 12, "", "a b c d", "🙂 שלום عالم"] * 9
PROMPTS = [text for text in TEXTS if text]
CHOICES = [" yes", " no", " maybe not"]


@pytest.fixture
def served(request):
    """Load a folder; close its engine at the end."""

    def load(folder, device, **options):
        model = load_model(str(folder), "float32", device, **options)
        if model.is_attended:
            serving = model.attend()
            serving.start()
            request.addfinalizer(serving.close)
        return model

    return load


@pytest.mark.parametrize("family", [*ENCODERS, *OTHERS])
def test_vectors_of_encoders_are_those_of_the_cpu(family, tmp_path, served):
    kind, config, options = {**ENCODERS, **OTHERS}[family]
    folder = tiny.saved(tmp_path / "m", tiny.random_model(kind, config, **options), words())
    on_gpu, on_cpu = (served(folder, device, is_encoder=True) for device in (None, "cpu"))
    assert on_gpu.is_attended == on_cpu.is_attended == (family in ENCODERS)
    assert on_gpu.facts["device"].startswith("cuda")
    for pooling in ("mean", "cls", "last"):
        found, expected = (one.embed(TEXTS, pooling=pooling) for one in (on_gpu, on_cpu))
        assert np.abs(found - expected).max() < 1e-3


def test_answers_and_texts_are_those_of_the_cpu(tmp_path, served):
    folder = tiny.saved(tmp_path / "m", tiny.llama())
    on_gpu, on_cpu = (served(folder, device) for device in (None, "cpu"))
    assert on_gpu.is_attended
    for normalize in (None, "tokens"):
        found, expected = (
            one.classify(PROMPTS, CHOICES, normalize=normalize) for one in (on_gpu, on_cpu)
        )
        logprobs = [np.array([one.logprobs for one in answers]) for answers in (found, expected)]
        assert np.abs(logprobs[0] - logprobs[1]).max() < 1e-3
        assert [one.answer for one in found] == [one.answer for one in expected]
    scores = [[s.logprob for s in one.score(PROMPTS, PROMPTS[::-1])] for one in (on_gpu, on_cpu)]
    assert np.allclose(*scores, atol=1e-2)
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        texts = [one.generate(PROMPTS, max_tokens=8, **options) for one in (on_gpu, on_cpu)]
        assert [one.text for one in texts[0]] == [one.text for one in texts[1]]
    with on_gpu.raw() as module:
        assert next(module.parameters()).is_cuda
        assert on_gpu.generate(PROMPTS[:2], max_tokens=2)


def test_with_fixed_shapes_results_in_bfloat16_are_the_same_in_any_batch(tmp_path):
    folder = tiny.saved(tmp_path / "m", tiny.llama(hidden_size=256, num_hidden_layers=4))
    model = load_model(str(folder), "bfloat16", deterministic=True)

    def results(texts):
        answers = model.classify(texts, CHOICES)
        new = model.generate(texts, max_tokens=8, temperature=0.7, seed=3)
        return [(a.logprobs, t.text) for a, t in zip(answers, new, strict=True)]

    expected = dict(zip(PROMPTS, results(PROMPTS), strict=True))
    for some in (PROMPTS[::-1], PROMPTS[:3], PROMPTS[:1], PROMPTS[2:5]):
        assert results(some) == [expected[text] for text in some]


def measured_bytes(folder):
    """What a context of a folder takes on the device: its weights, and what its engine has."""
    before = torch.cuda.memory_allocated()
    model = load_model(str(folder), "float32")
    n_bytes = torch.cuda.memory_allocated() - before + model.attend().n_bytes
    del model
    torch.cuda.empty_cache()
    return n_bytes


def own(df, model):
    texts = [*df["text"]]
    answers = model.classify(texts, CHOICES)
    return df[["id"]].assign(
        answer=[one.answer for one in answers],
        text=[one.text for one in model.generate(texts, max_tokens=6)],
    )


def tier_of_each(dask_worker):
    """Where contexts are, and how often each was loaded."""
    store = dask_worker.plugins["pcm-contexts"].contexts.store
    digests = list(store._residencies.by_digest)
    return sorted((store.tier(one).value, store.n_loads(one)) for one in digests)


@pytest.mark.timeout(300)
def test_models_that_alternate_on_a_device_answer_as_they_do_alone(tmp_path, served):
    """Of two models one fits: the other's engine is closed, and begins again, between two calls."""
    llms, expected = [], []
    rows = pd.DataFrame({"id": range(len(PROMPTS)), "text": PROMPTS})
    for k in range(2):
        folder = tiny.saved(tmp_path / f"m{k}", tiny.llama(num_hidden_layers=4 + k))
        llms.append(pcm.LLM(folder, dtype="float32"))
        expected.append(own(rows, served(folder, "cpu")))
    budget = 1.5 * max(measured_bytes(tmp_path / f"m{k}") for k in range(2))
    meta = {"id": "i8", "answer": "str", "text": "str"}
    with (
        dask.config.set({"pcm.ladder.device.budget": int(budget)}),
        spawning(),
        validated_cluster(n_workers=1, memory_limit=0) as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        for _ in range(3):
            for llm, same in zip(llms, expected, strict=True):
                ddf = dd.from_pandas(rows, npartitions=3)
                found = pcm.map_partitions(own, ddf, context=llm, meta=meta)
                pd.testing.assert_frame_equal(
                    client.compute(found).result(patient(100)), same, check_dtype=False
                )
        (tiers,) = client.run(tier_of_each).values()
        assert tiers == [("device", 1), ("host", 1)]
