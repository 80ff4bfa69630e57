from __future__ import annotations

from itertools import islice
from pathlib import Path

import pandas as pd
import pytest

from dask_pcm.factcheck import LABELS, PROMPT, generate
from dask_pcm.factcheck import train as training
from dask_pcm.factcheck.claims import Claim, stream, vocabulary
from dask_pcm.factcheck.demo import MODEL_PATH, SEED
from dask_pcm.inference.calls import Classify
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.prompts import Template

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def model():
    return load_model(str(MODEL_PATH))


@pytest.fixture(scope="module")
def unseen():
    """3,000 generated rows, none of which the model was trained on."""
    trained = {claim for batch in training.batches() for claim in batch}
    rows = (claim for claim in stream(SEED) if claim not in trained)
    return pd.DataFrame(list(islice(rows, 3_000)), columns=list(Claim._fields))


def test_generated_claims_are_the_same_each_time():
    first = generate(500, seed=4)
    pd.testing.assert_frame_equal(first, generate(500, seed=4))
    assert not first.equals(generate(500, seed=5))
    assert set(first.label) == set(LABELS)
    assert first.label.value_counts().min() > 120
    assert first.id.tolist() == list(range(500))


def test_labels_follow_from_the_evidence():
    claims = generate(2_000, seed=6)
    words = claims.claim.str.split()
    overlap = [
        len(set(claim) & set(evidence.split())) / len(set(claim))
        for claim, evidence in zip(words, claims.evidence, strict=True)
    ]
    by_label = pd.Series(overlap).groupby(claims.label).mean()
    assert by_label["SUPPORTED"] > by_label["REFUTED"] > by_label["NOT ENOUGH INFO"]


def test_the_vocabulary_covers_every_row():
    known = set(vocabulary())
    for row in generate(500, seed=8).itertuples():
        text = PROMPT.format(claim=row.claim, evidence=row.evidence) + " " + row.label
        assert set(text.split()) <= known


def test_the_model_answers_at_least_95_percent(model, unseen):
    call = Classify(
        template=Template(PROMPT),
        choices=LABELS,
        truncate_column=None,
        kept=("label",),
        batch_tokens=16_384,
    )
    verdicts = call(unseen, model)
    assert verdicts.error.isna().all()
    assert (verdicts.answer == verdicts.label).mean() >= 0.95


def test_the_likeliest_of_all_tokens_is_the_answers_first(model, unseen):
    import torch

    n_right = 0
    for start in range(0, len(unseen), 250):
        batch = [Claim(*row) for row in unseen.iloc[start : start + 250].itertuples(index=False)]
        tokens, is_answer = training.encode(model.tokenizer, batch)
        with torch.inference_mode():
            likeliest = model.padded.model(input_ids=tokens[:, :-1]).logits.argmax(-1)
        first = is_answer[:, 1:].float().argmax(1)
        rows = torch.arange(len(batch))
        n_right += int((likeliest[rows, first] == tokens[:, 1:][rows, first]).sum())
    assert n_right / len(unseen) >= 0.95


def test_the_model_is_small_and_its_tokenizer_is_the_generators(model):
    assert sum(file.stat().st_size for file in MODEL_PATH.iterdir()) < 1_000_000
    again = training.make_tokenizer()
    assert model.tokenizer.get_vocab() == again.get_vocab()


def test_training_is_deterministic(monkeypatch):
    """Two times twenty steps; the whole takes minutes."""
    import torch

    monkeypatch.setattr(training, "CURRICULUM", ((20, 1, LABELS),))
    monkeypatch.setattr(training, "N_STEPS", 20)
    n_threads = torch.get_num_threads()
    try:
        first, _ = training.train()
        second, _ = training.train()
    finally:
        torch.set_num_threads(n_threads)
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_sample_of_real_claims():
    sample = pd.read_parquet(DATA / "fever-sample.parquet")
    assert len(sample) == 500
    assert sample.columns.tolist() == ["id", "claim", "evidence", "label"]
    assert set(sample.label) < set(LABELS)
    assert "Attribution-ShareAlike" in (DATA / "README.md").read_text()
