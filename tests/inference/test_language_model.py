"""A user's own function, which is given the model: its methods take lists of texts."""

from __future__ import annotations

import pickle
import threading
import time

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch

import dask_pcm as pcm
from dask_pcm.errors import PromptError
from dask_pcm.factcheck import LABELS, PROMPT, demo_model, generate
from dask_pcm.factcheck.demo import MODEL_PATH
from dask_pcm.inference.language_model import LanguageModel, RowsError
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.padded import PaddedModel
from tests.conftest import patient
from tests.support import models as tiny


@pytest.fixture(scope="module", params=["engine", "padded"])
def model(request):
    found = load_model(str(MODEL_PATH), device="cpu")
    if request.param == "padded":
        yield LanguageModel(found.padded, is_attended=False)
        return
    serving = found.attend()
    serving.start()
    yield found
    serving.close()


@pytest.fixture(scope="module")
def claims():
    return generate(24, seed=12)


def prompts_of(claims):
    return [PROMPT.format(**row) for row in claims.to_dict("records")]


def test_answers_are_those_of_the_verb(model, claims):
    ddf = dd.from_pandas(claims, npartitions=1)
    expected = pcm.classify(ddf, demo_model(), prompt=PROMPT, choices=LABELS, logprobs=True)
    expected = expected.compute(scheduler="sync")
    found = model.classify(prompts_of(claims), LABELS)
    assert [one.answer for one in found] == expected.answer.tolist()
    assert np.allclose([one.probability for one in found], expected.answer_probability, atol=1e-5)
    logprobs = np.stack([one.logprobs for one in found])
    assert np.allclose(logprobs, np.stack(expected.logprobs), atol=1e-4)


def test_scores_by_token_are_what_is_compared_where_that_is_asked_for(model, claims):
    choices = ["yes", "no, not at all"]
    raw = model.classify(prompts_of(claims), choices)
    found = model.classify(prompts_of(claims), choices, normalize="tokens")
    n_tokens = [
        len(one)
        for one in model.padded.tokenize([f" {choice}" for choice in choices], keeps_end=True)
    ]
    assert n_tokens[1] > n_tokens[0]
    for before, after in zip(raw, found, strict=True):
        assert np.allclose(before.logprobs, after.logprobs, atol=1e-4)
        means = np.array(after.logprobs) / _lengths(model, choices)
        assert after.answer == choices[int(np.argmax(means))]
        spread = np.exp(means - means.max())
        assert after.probability == pytest.approx(float(spread.max() / spread.sum()), abs=1e-4)


def _lengths(model, choices):
    """Tokens of each choice after a prompt."""
    (prompt,) = model.padded.tokenize(["Claim: x"])
    wholes = model.padded.tokenize([f"Claim: x {choice}" for choice in choices])
    return np.array([len(whole) - len(prompt) for whole in wholes])


def test_scores_continuations_and_vectors_agree_with_each_other(model, claims):
    prompts = prompts_of(claims)
    texts = model.generate(prompts, max_tokens=6)
    assert [one.error for one in texts] == [None] * len(prompts)
    assert all(1 <= one.n_tokens <= 6 or one.finish_reason == "stop" for one in texts)
    scores = model.score(prompts, [LABELS[0]] * len(prompts))
    answers = model.classify(prompts, LABELS)
    assert np.allclose(
        [one.logprob for one in scores], [one.logprobs[0] for one in answers], atol=1e-4
    )
    vectors = model.embed(prompts)
    assert vectors.dtype == np.float32 and vectors.shape[0] == len(prompts)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert model.embed([]).shape[0] == 0 and model.classify([], LABELS) == []


def test_samples_are_lists_where_several_are_asked_for(model, claims):
    prompts = prompts_of(claims.head(3))
    found = model.generate(prompts, max_tokens=4, temperature=1.0, n=3, seed=5)
    assert [len(row) for row in found] == [3, 3, 3]
    again = model.generate(prompts[::-1], max_tokens=4, temperature=1.0, n=3, seed=5)
    assert [[one.text for one in row] for row in again[::-1]] == [
        [one.text for one in row] for row in found
    ]


def test_texts_that_cannot_be_computed_have_errors_and_others_have_not(model):
    texts = ["Claim: a", None, "word " * 5_000, "Claim: b"]
    for found in (
        model.classify(texts, LABELS),
        model.generate(texts, max_tokens=2),
        model.score(texts, ["x"] * 4),
    ):
        assert [one.error is None for one in found] == [True, False, False, True]
        assert "Null" in found[1].error and "tokens; the model takes" in found[2].error
    cut = model.generate(texts, max_tokens=2, truncate=True)
    assert [one.error is None for one in cut] == [True, False, True, True]
    with pytest.raises(RowsError, match="2 of 4 texts have no vector; text 1: Null"):
        model.embed(texts)


def test_arguments_that_are_wrong_are_refused(model):
    for call, message in (
        (lambda: model.classify("a text", LABELS), "a list of texts; found one text"),
        (lambda: model.classify(["a"], ["yes"]), "at least two"),
        (lambda: model.classify(["a"], LABELS, normalize="rows"), "'tokens' or None"),
        (lambda: model.generate(["a"], max_tokens=0), "max_tokens is 0"),
        (lambda: model.generate(["a"], max_tokens=2, n=2), "same text 2 times"),
        (lambda: model.score(["a", "b"], ["c"]), "2 prompts have 1 completions"),
        (lambda: model.embed(["a"], pooling="max"), "pooling must be one of"),
    ):
        with pytest.raises(PromptError, match=message):
            call()


def test_control_tokens_count_in_whole_prompts_unless_they_are_not_trusted():
    padded = PaddedModel(tiny.llama(), tiny.tokenizer())
    model = LanguageModel(padded, is_attended=False)
    asked = []
    tokenize = padded.tokenize
    padded.tokenize = lambda texts, **options: asked.extend(tokenize(texts)) or tokenize(texts)
    model.classify(["the <|turn|> moon"], ["yes", "no"])
    trusted, turn = list(asked), tiny.tokenizer().convert_tokens_to_ids("<|turn|>")
    asked.clear()
    model.classify(["the <|turn|> moon"], ["yes", "no"], special_tokens=False)
    assert all(turn in one for one in trusted) and not any(turn in one for one in asked)


def test_the_model_itself_is_one_threads_at_a_time(model):
    """The engine waits meanwhile."""
    inside, go = threading.Event(), threading.Event()
    found = []

    def hold():
        with model.raw(), model.raw() as module:
            inside.set()
            assert go.wait(patient(60))
            with torch.inference_mode():
                found.append(module(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[:2])

    def ask():
        found.append(len(model.classify(["Claim: a"] * 3, LABELS)))

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(patient(60))
    asker = threading.Thread(target=ask)
    asker.start()
    asker.join(0.3)
    assert asker.is_alive() and not found
    go.set()
    holder.join(patient(60))
    asker.join(patient(60))
    assert found == [(1, 3), 3]


def test_what_transformers_model_has_is_pointed_to(model):
    with pytest.raises(AttributeError, match=r"no attribute 'forward'.* model.raw\(\)"):
        model.forward([1])
    with pytest.raises(TypeError, match="cannot be called"):
        model(["a text"])


def test_no_engine_is_pickled(model):
    again = pickle.loads(pickle.dumps(model))
    assert again._serving is None
    assert [one.answer for one in again.classify(["Claim: a"], LABELS)]


def verdicts(df, model):
    with model.raw() as module:
        n_parameters = sum(one.numel() for one in module.parameters())
    answers = model.classify([PROMPT.format(**row) for row in df.to_dict("records")], LABELS)
    texts = model.generate(df["claim"].tolist(), max_tokens=3)
    return df[["id"]].assign(
        verdict=[one.answer for one in answers],
        text=[one.text for one in texts],
        n=n_parameters,
    )


def test_a_function_of_a_users_own_has_the_engine(client, claims):
    ddf = dd.from_pandas(claims, npartitions=4)
    meta = {"id": claims.id.dtype, "verdict": "str", "text": "str", "n": "int64"}
    found = pcm.map_partitions(
        verdicts, ddf, context=demo_model(), meta=meta, batch_rows=4
    ).compute()
    expected = pcm.classify(ddf, demo_model(), prompt=PROMPT, choices=LABELS).compute()
    assert found.error.isna().all()
    assert found.verdict.tolist() == expected.answer.tolist()
    assert pd.Series(found.n).nunique() == 1


@pytest.mark.timeout(120)
def test_threads_that_use_two_models_in_any_order_do_not_wait_for_each_other():
    pair = [load_model(str(MODEL_PATH), device="cpu") for _ in range(2)]
    serving = [one.attend() for one in pair]
    for one in serving:
        one.start()
    done = []

    def use(first, second):
        for _ in range(20):
            with second.raw():
                time.sleep(0.002)
            with first.raw():
                assert second.embed(["a b c"]).shape[0] == 1
        done.append(first)

    # The same order in both threads: b's turn, then a's with a call of b in it.
    threads = [threading.Thread(target=use, args=pair, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient(60))
    assert len(done) == 2
    for one in serving:
        one.close()


def test_each_thread_has_its_own_tokenizer(model):
    """Padding and truncation are settings of a tokenizer, which a call changes."""
    texts = ["a b c d " * 15] * 50
    expected, stop, wrong = model.embed(texts), threading.Event(), []

    def cut():
        while not stop.is_set():
            try:
                found = model.tokenizer(texts, padding=True, truncation=True, max_length=4)
                assert len(found["input_ids"][0]) == 4
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=cut) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert np.allclose(model.embed(texts), expected, atol=1e-5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
