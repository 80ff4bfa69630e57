"""Real models say what transformers says of each row alone; see ``tests/support/weights.py``."""

from __future__ import annotations

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import dask_pcm as pcm
from dask_pcm.factcheck import LABELS, PROMPT
from dask_pcm.factcheck import generate as generate_claims
from dask_pcm.inference.calls import Classify, Generate
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.prompts import Template
from dask_pcm.inference.served import attendant_of
from tests.support.patience import patient

#: Weights are converted once, and a model of 135 million parameters takes its time on a CPU.
pytestmark = pytest.mark.timeout(patient(400))
DEADLINE_S = 200
N_NEW = 6
STORY = "Once upon a time there was a small robot who lived by the sea and counted the ships. "
#: Of one token to some two hundred, two of them equal, in several scripts.
TEXTS = [
    "The",
    "The capital of France is",
    "The capital of France is",
    "Water is made of hydrogen and",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
    "Le chat est sur la",
    "Die Hauptstadt von Österreich ist",
    "東京は日本の",
    "🙂 means that",
    "Monday, Tuesday, Wednesday,",
    "   spaces   and\ttabs\n\n",
    "Q: Who wrote Hamlet?\nA:",
    STORY,
    STORY * 3,
    STORY * 9,
]
ROWS = pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS})
CHAT = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tests run in a process per core: more threads would wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def model(smollm2_folder):
    return load_model(str(smollm2_folder), "float32", "cpu")


@pytest.fixture(scope="module")
def served(model):
    assert model.is_attended
    serving = attendant_of(model)
    serving.start()
    yield serving
    serving.close()


@pytest.fixture
def generated(served):
    """Continue the texts of rows by the engine."""

    def run(rows=ROWS, prompt="{text}", max_tokens=N_NEW, **options):
        call = Generate(
            template=Template(prompt),
            truncate_column=None,
            kept=("id",),
            batch_tokens=2048,
            max_tokens=max_tokens,
            **options,
        )
        found = call.submit(rows, served).result(patient(DEADLINE_S))
        assert found.error.isna().all()
        return found

    return run


def test_greedy_tokens_are_those_of_transformers_alone(model, generated):
    found = generated()
    for text, row in zip(TEXTS, found.itertuples(), strict=True):
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.padded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False
            )
        tokens = [
            int(token) for token in out[0, ids.shape[1] :] if int(token) not in model.padded.stops
        ]
        assert (row.text, row.n_tokens) == (model.padded.decode(tokens), len(tokens)), text


def test_it_knows_something(generated):
    """What random weights cannot show: weights and tokenizer belong together."""
    assert generated(ROWS.iloc[1:2]).text.iloc[0].startswith(" Paris")


def test_a_chat_ends_with_its_turn(generated):
    rows = pd.DataFrame({"id": [0], "text": ["What is the capital of Japan? One word."]})
    (row,) = generated(rows, CHAT, max_tokens=30).itertuples()
    assert "Tokyo" in row.text and row.finish_reason == "stop" and row.n_tokens < 30


def test_a_text_ends_before_a_stop_string(generated):
    rows = ROWS.iloc[[1, 3, 10, 13]]
    whole = generated(rows, max_tokens=16).text
    # Within a token, across two of them, and one that never comes.
    stops = (whole.iloc[0][3:5], whole.iloc[2][5:12], "\x00")
    found = generated(rows, max_tokens=16, stop=stops)
    for text, row in zip(whole, found.itertuples(), strict=True):
        ends = [text.index(stop) for stop in stops if stop in text]
        assert row.text == text[: min(ends, default=None)]
        assert row.finish_reason == ("stop" if ends else "length")
    assert set(found.finish_reason) == {"stop", "length"}


def test_samples_depend_on_no_other_row(generated):
    rows, sampling = ROWS.iloc[:6], Sampling(0.9, top_p=0.95, seed=5)
    whole = generated(rows, sampling=sampling, n=2)
    parts = [generated(rows.iloc[k], sampling=sampling, n=2) for k in ([5, 0, 3], [2], [4, 1])]
    again = pd.concat(parts).sort_values("id")
    assert again.text.tolist() == whole.text.tolist()
    first, second = whole.text[1]
    assert first != second and whole.text[1] == whole.text[2]  # equal prompts


def test_probabilities_are_those_of_each_choice_alone(model, served):
    claims = generate_claims(4, seed=3)
    claims.loc[4] = [4, "Nikolaj Coster-Waldau", "He worked with Fox.", LABELS[0]]
    claims.loc[5] = [5, "", STORY * 4, LABELS[1]]
    call = Classify(
        template=Template(PROMPT),
        choices=LABELS,
        truncate_column=None,
        kept=("id",),
        batch_tokens=2048,
    )
    found = call.submit(claims, served).result(patient(DEADLINE_S))
    for row, answered in zip(claims.itertuples(), found.itertuples(), strict=True):
        prompt = PROMPT.format(claim=row.claim, evidence=row.evidence)
        expected = torch.softmax(torch.stack([alone(model, f"{prompt} {c}") for c in LABELS]), 0)
        assert answered.answer == LABELS[int(expected.argmax())]
        assert answered.answer_probability == pytest.approx(expected.max().item(), abs=1e-4)


@torch.inference_mode()
def alone(model, text):
    """The log-probability of a text's tokens after its first; the prompt's share cancels."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    logprobs = (
        model.padded.model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    )
    return logprobs.gather(1, ids[0, 1:, None]).sum()


@pytest.mark.parametrize("door", ["engine", "padded"])
def test_vectors_are_those_of_plain_transformers(minilm_folder, door):
    words = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    plain = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    model = load_model(str(minilm_folder), device="cpu", is_encoder=True)
    assert model.is_attended
    serving = model.attend() if door == "engine" else None
    if serving is not None:
        serving.start()
    try:
        found = model.embed(TEXTS)  # pooled and normalised as the folder says
    finally:
        if serving is not None:
            serving.close()
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            hidden = plain(**words(text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        assert np.abs(vector - expected).max() < 1e-5, text


def test_an_encoder_finds_what_is_related(client, minilm_folder):
    texts = [
        "A cat sleeps on the sofa.",
        "The stock market fell sharply today.",
        "A kitten is napping on the couch.",
        "Shares lost much of their value this morning.",
    ]
    ddf = dd.from_pandas(pd.DataFrame({"id": range(4), "text": texts}), npartitions=2)
    llm = pcm.LLM(minilm_folder, device="cpu")
    found = pcm.embed(ddf, llm, prompt="{text}", batch_rows=2).compute()
    vectors = np.stack(found.sort_values("id").embedding)
    cosines = vectors @ vectors.T
    assert cosines[0, 2] > 0.5 and cosines[1, 3] > 0.5
    assert cosines[[0, 0, 2, 2], [1, 3, 1, 3]].max() < 0.2
