"""Vectors of texts against those of each text alone, by transformers."""

from __future__ import annotations

import json

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import dask_pcm as pcm
from dask_pcm.errors import PromptError
from dask_pcm.inference.calls import Embed
from dask_pcm.inference.engine.rows import Pooling
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.model_folder import is_encoder
from dask_pcm.inference.options import checked_pooling
from dask_pcm.inference.prompts import Template
from tests.conftest import patient
from tests.support import models as tiny

ROWS = pd.DataFrame(
    {
        "id": range(9),
        "text": [
            "the moon is round",
            "yes",
            "Answer: no maybe " * 12,
            "",
            "a b c d e f g",
            None,
            "🙂 שלום عالم",
            "moon " * 3_000,
            "m n",
        ],
    }
)
LIMIT = {"max_position_embeddings": 512}
#: Encoders of an engine, by class and options; some count positions from that of padding.
ENCODERS = {
    "bert": ("BertModel", "BertConfig", {**tiny.ATTENTION, **LIMIT}),
    "roberta": ("RobertaModel", "RobertaConfig", {**tiny.ATTENTION, **LIMIT, "pad_token_id": 3}),
    "xlm-roberta": (
        "XLMRobertaModel",
        "XLMRobertaConfig",
        {**tiny.ATTENTION, **LIMIT, "pad_token_id": 3},
    ),
    "electra": ("ElectraModel", "ElectraConfig", {**tiny.ATTENTION, **LIMIT}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 600, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, **LIMIT},
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {
            **tiny.ATTENTION,
            **LIMIT,
            "num_hidden_layers": 4,
            "local_attention": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
}
#: … and encoders with an attention of their own.
OTHERS = {
    "deberta": ("DebertaV2Model", "DebertaV2Config", {**tiny.ATTENTION, **LIMIT}),
    "mpnet": ("MPNetModel", "MPNetConfig", {**tiny.ATTENTION, **LIMIT, "pad_token_id": 3}),
}


def words():
    """A tokenizer that adds a token at both ends."""
    from tokenizers import processors

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def embedding(pooling, **options):
    given = {"truncate_column": None, "normalize": False, **options}
    return Embed(
        template=Template("{text}"), kept=("id",), batch_tokens=600, pooling=pooling, **given
    )


def alone(model, tokenizer, text, pooling):
    """The vector of a text by itself; of a text that fits."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        hidden = model(input_ids=ids).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}
    return pooled[pooling.value].numpy()


@pytest.mark.parametrize("family", [*ENCODERS, *OTHERS])
def test_vectors_of_encoders_are_those_of_each_text_alone(family, tmp_path):
    kind, config, options = {**ENCODERS, **OTHERS}[family]
    plain, tokenizer = tiny.random_model(kind, config, **options), words()
    folder = tiny.saved(tmp_path / "model", plain, tokenizer)
    assert is_encoder(folder)
    model = load_model(str(folder), device="cpu", is_encoder=True)
    assert model.is_attended == (family in ENCODERS)
    serving = model.attend() if model.is_attended else model
    if model.is_attended:
        serving.start()
    try:
        for pooling in Pooling:
            call = embedding(pooling)
            by_engine = call.submit(ROWS, serving).result(patient(60))
            padded = call(ROWS, model)
            for k, text in enumerate(ROWS.text):
                found = by_engine.embedding[k], padded.embedding[k]
                if pd.isna(text) or len(text) > 1_000:
                    assert all(pd.isna(one) for one in found)
                    assert by_engine.error[k] == padded.error[k]
                    continue
                expected = alone(plain, tokenizer, text, pooling)
                for one in found:
                    assert np.abs(np.asarray(one) - expected).max() < 1e-4
            assert "Null" in by_engine.error[5] and "the model takes" in by_engine.error[7]
    finally:
        if model.is_attended:
            serving.close()


def test_a_text_is_cut_where_that_is_asked_for(tmp_path):
    plain = tiny.random_model("RobertaModel", "RobertaConfig", **ENCODERS["roberta"][2])
    folder = tiny.saved(tmp_path / "model", plain, words())
    llm = pcm.LLM(folder, device="cpu")
    ddf = dd.from_pandas(ROWS, npartitions=2)
    with dask.config.set(scheduler="sync"):
        found = pcm.embed(ddf, llm, prompt="{text}", truncate_column="text").compute()
    assert found.error.notna().tolist() == [k == 5 for k in range(9)]
    lengths = [np.linalg.norm(np.asarray(one)) for one in found.embedding.dropna()]
    assert np.allclose(lengths, 1, atol=1e-5)


def test_a_causal_model_has_the_vector_of_its_last_token(tmp_path):
    plain, tokenizer = tiny.llama(), words()
    folder = tiny.saved(tmp_path / "model", plain, tokenizer)
    ddf = dd.from_pandas(ROWS.head(5), npartitions=2)
    with dask.config.set(scheduler="sync"):
        found = ddf.pcm.embed(pcm.LLM(folder), prompt="{text}", normalize=False).compute()
    for text, vector in zip(ROWS.text.head(5), found.embedding, strict=True):
        expected = alone(plain.model, tokenizer, text, Pooling.LAST)
        assert np.abs(np.asarray(vector) - expected).max() < 1e-4


def test_vectors_go_through_a_file(tmp_path, client):
    plain = tiny.random_model("BertForMaskedLM", "BertConfig", **ENCODERS["bert"][2])
    folder = tiny.saved(tmp_path / "model", plain, words())
    llm = pcm.LLM(folder, device="cpu")
    ROWS.head(6).to_parquet(tmp_path / "in.parquet")
    ddf = pcm.embed(pcm.read_parquet(tmp_path / "in.parquet"), llm, prompt="{text}")
    report = pcm.write_parquet(ddf, tmp_path / "out").report
    out = pd.read_parquet(tmp_path / "out").sort_values("id")
    assert report.rows_failed == 1 and out.embedding.isna().tolist() == [k == 5 for k in range(6)]
    vectors = np.stack(out.embedding.dropna())
    assert vectors.shape == (5, 32) and vectors.dtype == np.float32
    assert ddf.compute().embedding.isna().sum() == 1


def test_what_is_not_a_number_is_the_error_of_its_row(tmp_path):
    plain = tiny.random_model("BertModel", "BertConfig", **ENCODERS["bert"][2])
    folder = tiny.saved(tmp_path / "model", plain, words())
    model = load_model(str(folder), device="cpu", is_encoder=True)
    rows = pd.DataFrame({"id": [0, 1], "text": ["q", "z"]})
    (bad,) = set(model.padded.tokenize(["z"])[0]) - set(model.padded.tokenize(["q"])[0])
    with torch.no_grad():
        model.padded.model.get_input_embeddings().weight[bad] = torch.nan
    serving = model.attend()
    serving.start()
    try:
        for found in (
            embedding(Pooling.MEAN).submit(rows, serving).result(patient(60)),
            embedding(Pooling.MEAN)(rows, model),
        ):
            assert found.embedding.isna().tolist() == [False, True]
            assert "not a number" in found.error[1]
    finally:
        serving.close()


class TestPooling:
    def told(self, folder, **modes):
        kinds = ("Transformer", "Pooling", "Normalize")
        modules = [
            {"path": f"{k}_{kind}", "type": f"sentence_transformers.models.{kind}"}
            for k, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        about = {"word_embedding_dimension": 32, **modes}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(about))
        return modules

    def test_is_as_the_folder_says(self, tmp_path):
        self.told(tmp_path, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
        assert checked_pooling(None, tmp_path, is_causal=False) is Pooling.CLS
        assert checked_pooling("last", tmp_path, is_causal=False) is Pooling.LAST

    def test_is_as_usual_for_other_folders(self, tmp_path):
        assert checked_pooling(None, tmp_path, is_causal=False) is Pooling.MEAN
        assert checked_pooling(None, tmp_path, is_causal=True) is Pooling.LAST

    def test_what_is_not_known_is_refused(self, tmp_path):
        modules = self.told(tmp_path, pooling_mode_max_tokens=True)
        with pytest.raises(PromptError, match="pools by pooling_mode_max_tokens"):
            checked_pooling(None, tmp_path, is_causal=False)
        modules.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(PromptError, match=r"further layers .*Dense"):
            checked_pooling(None, tmp_path, is_causal=False)
        with pytest.raises(PromptError, match="one of 'mean', 'cls', 'last'; found 'max'"):
            checked_pooling("max", tmp_path, is_causal=False)


def test_an_encoder_answers_nothing(tmp_path):
    plain = tiny.random_model("BertModel", "BertConfig", **ENCODERS["bert"][2])
    llm = pcm.LLM(tiny.saved(tmp_path / "model", plain, words()), device="cpu")
    ddf = dd.from_pandas(ROWS, npartitions=1)
    with pytest.raises(PromptError, match=r"classify needs a causal .* use embed"):
        pcm.classify(ddf, llm, prompt="{text}", choices=["yes", "no"])
    with pytest.raises(PromptError, match="generate needs a causal language model"):
        pcm.generate(ddf, llm, prompt="{text}", max_tokens=3)


def test_it_is_loaded_without_the_layer_that_is_not_used(tmp_path):
    plain = tiny.random_model("BertForMaskedLM", "BertConfig", **ENCODERS["bert"][2])
    folder = tiny.saved(tmp_path / "model", plain, words())
    model = load_model(str(folder), device="cpu", is_encoder=True)
    assert type(model.padded.model) is transformers.BertModel
    assert model.padded.model.pooler is None
