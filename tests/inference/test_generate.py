"""``generate`` and ``score``: as transformers does of each row alone, in any batch."""

from __future__ import annotations

import math

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch

import dask_pcm as pcm
from dask_pcm.errors import PromptError, SchemaError
from dask_pcm.inference.calls import Generate, Score
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.language_model import LanguageModel
from dask_pcm.inference.llm import LLM
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.prompts import Template
from dask_pcm.inference.served import attendant_of
from tests.conftest import patient
from tests.support import models as tiny

ROWS = pd.DataFrame(
    {
        "id": range(12),
        "text": ["the moon is round", "", "a b c", "é 🙂 مرحبا", None, "x" * 40] * 2,
        "answer": ["yes", "no", "maybe so", "yes", "no", ""] * 2,
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.llama(num_key_value_heads=2))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), device="cpu")


@pytest.fixture
def served(model):
    assert model.is_attended
    serving = attendant_of(model)
    serving.start()
    yield serving
    serving.close()


def generating(**options):
    given = {"max_tokens": 8, "prompt": "Q: {text} A:", **options}
    return Generate(
        template=Template(given.pop("prompt")),
        truncate_column=None,
        kept=("id",),
        batch_tokens=2048,
        **given,
    )


def scoring(completion="{answer}"):
    return Score(
        template=Template("Q: {text} A:"),
        truncate_column=None,
        kept=("id",),
        batch_tokens=2048,
        completion=Template(completion),
    )


@torch.inference_mode()
def alone(model, text, n):
    """Greedy tokens of transformers for one text."""
    ids = torch.tensor([model.tokenize([text])[0]])
    out = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :].tolist()
    end = next((k for k, token in enumerate(out) if token in model.stops), len(out))
    return out[:end]


def test_greedy_tokens_are_those_of_transformers_alone(model, served):
    found = generating().submit(ROWS, served).result(patient(60))
    assert found.columns.tolist() == ["id", "text", "n_tokens", "finish_reason", "error"]
    for text, row in zip(ROWS.text, found.itertuples(), strict=True):
        if pd.isna(text):
            assert pd.isna(row.text) and "Null" in row.error
            continue
        tokens = alone(model.padded, f"Q: {text} A:", 8)
        assert (row.text, row.n_tokens) == (model.padded.decode(tokens), len(tokens))
        assert row.finish_reason == ("length" if len(tokens) == 8 else "stop")


@pytest.mark.parametrize(
    "options", [{}, {"sampling": Sampling(1.0, seed=3), "n": 3}, {"stop": ("a", "e")}]
)
def test_padded_batches_say_the_same(model, served, options):
    call = generating(**options)
    by_engine = call.submit(ROWS, served).result(patient(60))
    pd.testing.assert_frame_equal(call(ROWS, model), by_engine)


def test_samples_depend_on_no_other_row(model, served):
    call = generating(sampling=Sampling(0.9, top_k=50, top_p=0.95, seed=1), n=2)
    whole = call.submit(ROWS, served).result(patient(60))
    order = ROWS.sample(frac=1, random_state=0)
    parts = [call.submit(order.iloc[k : k + 5], served) for k in (0, 5, 10)]
    found = pd.concat([part.result(patient(60)) for part in parts]).sort_values("id")
    assert found.text.tolist() == whole.text.tolist()
    first, second = whole.text[0]
    assert first != second and whole.text[0] == whole.text[6]  # equal prompts
    other = generating(sampling=Sampling(0.9, seed=2)).submit(ROWS, served).result(patient(60))
    assert other.text[0] not in (first, second)


def test_a_text_ends_before_a_stop_string(model, served):
    whole = generating(max_tokens=30).submit(ROWS.iloc[:1], served).result(patient(60)).text[0]
    assert len(whole) > 6
    stop = whole[4:6]
    call = generating(max_tokens=30, stop=(stop,))
    found = call.submit(ROWS.iloc[:1], served).result(patient(60))
    assert found.text[0] == whole[: whole.index(stop)]
    assert found.finish_reason[0] == "stop" and found.n_tokens[0] < 30


def test_a_text_ends_with_the_context_length(model, served):
    rows = pd.DataFrame({"id": [0, 1], "text": ["a " * 100, "a " * 400]})
    found = generating(max_tokens=1000).submit(rows, served).result(patient(60))
    n_prompt = len(model.padded.tokenize([f"Q: {rows.text[0]} A:"])[0])
    if found.finish_reason[0] == "length":
        assert found.n_tokens[0] == model.max_tokens - n_prompt
    assert "the model takes 256" in found.error[1]


def test_scores_are_those_of_each_text_alone(model, served):
    found = scoring().submit(ROWS, served).result(patient(60))
    padded = scoring()(ROWS, model)
    for row, given, other in zip(
        found.itertuples(), ROWS.itertuples(), padded.itertuples(), strict=True
    ):
        if pd.isna(given.text) or not given.answer:
            assert math.isnan(row.logprob) and row.error == other.error
            continue
        (before,), (whole,) = (
            model.padded.tokenize([text])
            for text in (f"Q: {given.text} A:", f"Q: {given.text} A: {given.answer}")
        )
        n = next(k for k in range(len(whole)) if before[k : k + 1] != whole[k : k + 1])
        with torch.inference_mode():
            logits = model.padded.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(logits[k - 1, whole[k]].item() for k in range(n, len(whole)))
        assert row.logprob == pytest.approx(expected, abs=1e-3)
        assert other.logprob == pytest.approx(expected, abs=1e-3)
        assert row.n_tokens == len(whole) - n


def test_on_a_cluster(client, folder, tmp_path):
    ddf = dd.from_pandas(ROWS, npartitions=3)
    llm = LLM(folder, device="cpu")
    made = pcm.generate(
        ddf, llm, prompt="Q: {text} A:", max_tokens=5, keep_columns=["id"], batch_rows=2
    )
    assert made.columns.tolist() == ["id", "text", "n_tokens", "finish_reason", "error"]
    found = made.compute()
    assert found.dtypes.astype(str).to_dict() == made.dtypes.astype(str).to_dict()
    assert found.error.isna().sum() == 10
    ROWS.to_parquet(tmp_path / "in.parquet")
    samples = pcm.generate(
        pcm.read_parquet(tmp_path / "in.parquet"),
        llm,
        prompt="Q: {text} A:",
        max_tokens=5,
        temperature=1.0,
        n=2,
        keep_columns=["id"],
    )
    report = pcm.write_parquet(samples, tmp_path / "out", progress=False).report
    out = pd.read_parquet(tmp_path / "out").sort_values("id")
    assert report.rows_failed == 2 and [len(one) for one in out.text.dropna()] == [2] * 10
    scores = pcm.score(ddf, llm, prompt="Q: {text} A:", completion="{answer}").compute()
    assert scores.logprob.notna().sum() == 8 and (scores.logprob.dropna() < 0).all()


def test_a_model_without_an_engine_continues_texts_of_a_length_together(served):
    mamba = tiny.random_model("MambaForCausalLM", "MambaConfig", **tiny.SMALL, state_size=8)
    padded = PaddedModel(mamba, tiny.tokenizer())
    found = generating()(ROWS, LanguageModel(padded, is_attended=False))
    for text, row in zip(ROWS.text, found.itertuples(), strict=True):
        if not pd.isna(text):
            assert row.text == padded.decode(alone(padded, f"Q: {text} A:", 8))


def test_without_an_engine_too_what_is_not_a_number_is_the_error_of_its_row():
    mamba = tiny.random_model(
        "MambaForCausalLM", "MambaConfig", **tiny.SMALL, tie_word_embeddings=False
    )
    padded = PaddedModel(mamba, tiny.tokenizer())
    rows = pd.DataFrame({"id": [0, 1], "text": ["q", "z"]})
    (first,), (second,) = (padded.tokenize([f"Q: {text} A:"]) for text in rows.text)
    assert len(first) == len(second)  # in one batch
    (bad,) = set(second) - set(first)
    expected = generating()(rows, LanguageModel(padded, is_attended=False)).text[0]
    with torch.no_grad():
        mamba.get_input_embeddings().weight[bad] = torch.nan
    found = generating()(rows, LanguageModel(padded, is_attended=False))
    assert "not a number" in found.error[1] and pd.isna(found.text[1])
    assert found.text[0] == expected and pd.isna(found.error[0])


class TestRefused:
    @pytest.fixture
    def ddf(self):
        return dd.from_pandas(ROWS, npartitions=1)

    @pytest.fixture
    def llm(self, folder):
        return LLM(folder, device="cpu")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_tokens": 0}, "max_tokens is 0; expected 1 or more"),
            ({"n": 2}, "temperature 0 gives the same text 2 times"),
            ({"temperature": -1.0}, "temperature is -1.0"),
            ({"top_p": 0.0}, "top_p is 0.0"),
            ({"stop": [""]}, "stop must be texts that are not empty"),
        ],
    )
    def test_arguments_out_of_range(self, ddf, llm, options, message):
        given = {"max_tokens": 4, "keep_columns": ["id"], **options}
        with pytest.raises(PromptError, match=message):
            pcm.generate(ddf, llm, prompt="{text}", **given)

    def test_columns_that_are_there(self, ddf, llm):
        with pytest.raises(SchemaError, match="already has 'text'"):
            pcm.generate(ddf, llm, prompt="{text}", max_tokens=4)

    def test_a_completion_of_unknown_columns(self, ddf, llm):
        with pytest.raises(SchemaError, match="The completion"):
            pcm.score(ddf, llm, prompt="{text}", completion="{label}", keep_columns=["id"])


@pytest.mark.parametrize("door", ["engine", "padded"])
def test_a_control_token_as_stop_string_ends_a_text(model, served, door, monkeypatch):
    """Decoded texts do not have it."""
    encoder = model.padded._encoder
    assert encoder.control_ids["<|turn|>"] == model.tokenizer.convert_tokens_to_ids("<|turn|>")
    rows = ROWS.iloc[:1]
    tokens = alone(model.padded, f"Q: {rows.text[0]} A:", 8)
    monkeypatch.setattr(encoder, "control_ids", {"<|turn|>": tokens[3]})  # as if it were one
    call = generating(stop=("<|turn|>",))
    found = call(rows, model) if door == "padded" else call.submit(rows, served).result(patient(60))
    assert found.n_tokens[0] == tokens.index(tokens[3]) and found.finish_reason[0] == "stop"


def test_numbers_of_numpy_and_no_stop_are_understood(folder):
    ddf, llm = dd.from_pandas(ROWS.head(3), npartitions=1), LLM(folder, device="cpu")
    options = {"max_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.int64(1)}
    found = pcm.generate(ddf, llm, prompt="Q: {text}", keep_columns=["id"], stop=None, **options)
    assert found.compute(scheduler="sync").n_tokens.dropna().max() <= 3
    with pytest.raises(PromptError, match="stop must be texts"):
        pcm.generate(ddf, llm, prompt="Q: {text}", keep_columns=["id"], max_tokens=3, stop=5)
