from __future__ import annotations

import math

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import dask_pcm as pcm
from dask_pcm.errors import PromptError, SchemaError
from dask_pcm.factcheck import LABELS, PROMPT, demo_model, generate
from dask_pcm.factcheck.demo import MODEL_PATH
from dask_pcm.inference.calls import Classify
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.prompts import Template


@pytest.fixture(scope="module")
def llm():
    return demo_model()


@pytest.fixture(scope="module")
def model():
    return load_model(str(MODEL_PATH))


def classify(frame, llm, **options):
    ddf = dd.from_pandas(frame, npartitions=2) if isinstance(frame, pd.DataFrame) else frame
    return pcm.classify(ddf, llm, **{"prompt": PROMPT, "choices": LABELS, **options})


def test_answers_on_a_cluster(client, llm):
    verdicts = classify(generate(300, seed=7), llm, batch_rows=64)
    found = verdicts.compute()
    assert found.columns.tolist() == [
        "id",
        "claim",
        "evidence",
        "label",
        "answer",
        "answer_probability",
        "error",
    ]
    assert (found.answer == found.label).mean() >= 0.95
    assert found.error.isna().all()
    assert found.answer_probability.between(1 / 3, 1).all()
    assert found.dtypes.astype(str).to_dict() == verdicts.dtypes.astype(str).to_dict()


def test_batches_and_order_change_no_answer(model):
    frame = generate(40, seed=3)
    call = Classify(
        template=Template(PROMPT),
        choices=LABELS,
        truncate_column=None,
        kept=("id",),
        batch_tokens=512,
    )
    whole = call(frame, model)
    alone = pd.concat([call(frame.iloc[i : i + 1], model) for i in range(40)])
    assert whole.answer.tolist() == alone.answer.tolist()
    assert np.allclose(whole.answer_probability, alone.answer_probability, atol=1e-5)
    back = call(frame.iloc[::-1], model)
    assert back.answer.tolist() == whole.answer.tolist()[::-1]


def test_the_probability_is_the_softmax_of_the_scores():
    call = Classify(
        template=Template("{x}"),
        choices=("a", "b", "c"),
        truncate_column=None,
        kept=(),
        batch_tokens=1,
    )
    found = call.value(([-1.0, -2.0, -800.0], [-1.0, -2.0, -800.0]))
    assert found.answer == "a" and found.error is None and found.logprobs == [-1.0, -2.0, -800.0]
    assert found.probability == pytest.approx(math.exp(-1) / (math.exp(-1) + math.exp(-2)))
    assert call.value(([-5.0, -3.0, -3.0],) * 2).answer == "b"  # a tie goes to the first listed


def test_scores_that_are_no_numbers_are_the_rows_error(model, monkeypatch):
    monkeypatch.setattr(
        model.padded, "score", lambda scorings, n: [[math.nan] * 3 for _ in scorings]
    )
    found = Classify(
        template=Template(PROMPT),
        choices=LABELS,
        truncate_column=None,
        kept=("id",),
        batch_tokens=512,
    )(generate(3), model)
    assert found.answer.isna().all() and found.answer_probability.isna().all()
    assert found.error.str.startswith("The model's scores are not finite").all()


def test_choices_that_the_model_cannot_tell_apart_end_the_job(model):
    call = Classify(
        template=Template(PROMPT),
        choices=("oui", "non", "SUPPORTED"),
        truncate_column=None,
        kept=("id",),
        batch_tokens=512,
    )
    with pytest.raises(PromptError, match="choices 'oui', 'non' have the same tokens"):
        call(generate(3), model)


def test_an_empty_prompt_is_the_rows_error(model):
    frame = generate(3).assign(claim=["", "Ada", ""])
    found = Classify(
        template=Template("{claim}"),
        choices=("REFUTED", "SUPPORTED"),
        truncate_column=None,
        kept=("id",),
        batch_tokens=512,
    )(frame, model)
    assert found.error.notna().tolist() == [True, False, True]


def test_kept_columns_and_the_index(client, llm):
    frame = generate(20).set_index(pd.Index(range(100, 120), name="key"))
    found = classify(frame, llm, keep_columns=["id", "label"]).compute()
    assert found.columns.tolist() == ["id", "label", "answer", "answer_probability", "error"]
    assert found.index.tolist() == list(range(100, 120))
    nothing = classify(frame, llm, keep_columns=[]).compute()
    assert nothing.columns.tolist() == ["answer", "answer_probability", "error"]


def test_a_null_in_a_field_is_the_rows_error(client, llm):
    frame = generate(20)
    frame.loc[3, "claim"] = None
    frame.loc[5, ["claim", "evidence"]] = None
    found = classify(frame, llm).compute()
    assert found.error.dropna().to_dict() == {
        3: "Null in prompt field 'claim'.",
        5: "Null in prompt field 'evidence', 'claim'.",
    }
    assert found.answer.isna().sum() == 2 and found.answer_probability.isna().sum() == 2


class TestLongRows:
    def frame(self):
        frame = generate(6)
        frame.loc[2, "evidence"] = frame.evidence[2] + " tennis" * 600
        return frame

    def test_an_error_with_both_numbers(self, client, llm):
        found = classify(self.frame(), llm).compute()
        assert found.error.notna().sum() == 1
        assert found.error[2].startswith("The row has 6")
        assert found.error[2].endswith("tokens; the model takes 512.")

    def test_or_the_field_named_is_cut(self, client, llm):
        found = classify(self.frame(), llm, truncate_column="evidence").compute()
        assert found.error.isna().all()
        assert found.answer.notna().all()
        assert found.evidence[2].endswith("tennis")  # the output keeps what came in
        whole = classify(generate(6), llm).compute()
        others = [0, 1, 3, 4, 5]
        assert found.answer[others].tolist() == whole.answer[others].tolist()

    def test_where_cutting_does_not_help_it_is_an_error(self, client, llm):
        frame = self.frame()
        found = classify(frame, llm, truncate_column="claim").compute()
        assert found.error.notna().sum() == 1


class TestRefusedAtOnce:
    def test_fields_and_columns(self, llm):
        frame = dd.from_pandas(generate(4), npartitions=1)
        with pytest.raises(SchemaError, match=r"prompt names 'proof'.*'id', 'claim', 'evidence'"):
            classify(frame, llm, prompt="{claim} {proof}")
        with pytest.raises(PromptError, match="has no field"):
            classify(frame, llm, prompt="Is it true?")
        with pytest.raises(PromptError, match="not a field of the prompt"):
            classify(frame, llm, truncate_column="label")
        with pytest.raises(SchemaError, match="keep_columns names 'x'"):
            classify(frame, llm, keep_columns=["x"])

    def test_choices(self, llm):
        with pytest.raises(PromptError, match="repeats"):
            classify(dd.from_pandas(generate(4), npartitions=1), llm, choices=["a", "a"])

    @pytest.mark.parametrize("name", ["answer", "answer_probability", "error"])
    def test_columns_that_we_add(self, llm, name):
        frame = dd.from_pandas(generate(4).assign(**{name: "x"}), npartitions=1)
        with pytest.raises(SchemaError, match=rf"already has '{name}'.*keep_columns="):
            classify(frame, llm)
        assert classify(frame, llm, keep_columns=["id"]).columns.tolist()[0] == "id"

    def test_a_context_that_is_no_llm(self):
        frame = dd.from_pandas(generate(4), npartitions=1)
        with pytest.raises(PromptError, match=r"needs a dask_pcm\.LLM"):
            classify(frame, pcm.Context(dict))


def test_the_job_is_named_in_the_manifest(client, llm, tmp_path):
    import json
    from pathlib import Path

    generate(20).to_parquet(tmp_path / "claims.parquet", index=False)
    frame = pcm.read_parquet(str(tmp_path / "claims.parquet"))
    out = tmp_path / "out"
    pcm.write_parquet(classify(frame, llm, batch_rows=8), out, progress=False)
    identity = json.loads(Path(out, "_pcm", "manifest.json").read_text())["identity"]
    assert identity["prompt"] == PROMPT and identity["choices"] == list(LABELS)
    recorded = json.loads(Path(out, "_pcm", "manifest.json").read_text())["recorded"]
    assert recorded["ran_on"] == ["cpu/torch.float32"]
    assert recorded["models"][llm.name]["commit"] == llm.commit
    with pytest.raises(pcm.PCMError, match=r"its prompt is 'Evidence.*, not 'Claim"):
        other = classify(frame, llm, prompt="Claim : {claim} Answer :", batch_rows=8)
        pcm.write_parquet(other, out, progress=False)
