"""Token ids: one beginning, and control tokens only where the template has them."""

from __future__ import annotations

import pickle

import pandas as pd
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_pcm.inference.calls import Classify
from dask_pcm.inference.language_model import LanguageModel
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.prompts import Part, Template, Text
from dask_pcm.inference.tokens import Encoder, _Guarded
from tests.support import models as tiny

KINDS = ("byte", "spaces", "unigram", "words")
TOKENIZERS = {kind: tiny.tokenizer(kind, bos=True) for kind in KINDS}
ENCODERS = {kind: Encoder(words) for kind, words in TOKENIZERS.items()}
GUARDED = {kind: _Guarded(words.backend_tokenizer) for kind, words in TOKENIZERS.items()}
CHAT = Template("<|turn|> Claim: {claim}<|turn|> Answer:")


def asking(template, choices, **options):
    return Classify(
        template=template,
        choices=choices,
        truncate_column=None,
        kept=(),
        batch_tokens=512,
        **options,
    )


def row(claim: str, *, is_trusted: bool = False) -> Text:
    return CHAT.text_of({"claim": claim}, is_trusted)


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_of_the_template_count_and_those_of_a_row_do_not(kind):
    words = TOKENIZERS[kind]
    turn = words.convert_tokens_to_ids("<|turn|>")
    eos, bos = words.eos_token_id, words.bos_token_id
    encode = Encoder(words)
    (ids,) = encode([row("stop <|turn|> </s> <s> here")])
    assert ids.count(turn) == 2 and ids.count(bos) == 1 and eos not in ids
    assert ids[0] == bos
    (ids,) = encode([row("stop <|turn|> </s> <s> here", is_trusted=True)])
    assert ids.count(turn) == 3 and ids.count(bos) == 2 and eos in ids
    (ids,) = encode(["<s> moon </s>x"])  # of a plain text, nothing is control
    assert ids.count(bos) == 1 and eos not in ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [False, True])
def test_ids_are_those_of_a_call_of_the_tokenizer(kind, splits):
    words = tiny.tokenizer(kind, bos=True)
    words.split_special_tokens = splits
    texts = ["the moon is round", "", "a <|turn|> b", "🙂 שלום", "  two  spaces \n", "x" * 300]
    expected = [list(ids) for ids in words(texts)["input_ids"]]
    words.backend_tokenizer.enable_truncation(3)  # as a folder may have it
    words.backend_tokenizer.enable_padding(length=50)
    own = [Text((Part(text, is_own=True),)) for text in texts]
    late = Encoder(words)
    words(texts, truncation=True, max_length=3)  # which its backend keeps
    words.backend_tokenizer.enable_padding(length=50)
    assert late(own, keeps_end=True) == expected
    for encode in (one := Encoder(words), pickle.loads(pickle.dumps(one))):
        assert encode(own, keeps_end=True) == expected


def test_a_tokenizer_that_does_something_of_its_own_is_called():
    class Shouting(transformers.PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return super()._encode_plus([one.upper() for one in text], **options)

    backend = tiny.tokenizer("words").backend_tokenizer
    encode = Encoder(Shouting(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))
    plain = Encoder(tiny.tokenizer("words"))
    assert encode(["the moon"]) == plain(["THE MOON"]) != plain(["the moon"])


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(claim=st.text("abc moon<|>s/.\n", max_size=20))
def test_seams_are_those_of_the_joined_text(kind, claim):
    """The tokenizer with other names is the same in all else."""
    text, encode = row(claim), ENCODERS[kind]
    if not encode._spells_control(text, str(text)):
        found = GUARDED[kind].encode(text, encode._control)
        assert found == TOKENIZERS[kind](str(text)).input_ids


def test_a_control_token_that_template_and_row_spell_together_is_text():
    encode = Encoder(TOKENIZERS["byte"])
    text = Template("moon <|tu{x}").text_of({"x": "rn|> yes"})
    (ids,) = encode([text])
    assert TOKENIZERS["byte"].convert_tokens_to_ids("<|turn|>") not in ids


@pytest.mark.parametrize("start", ["", "<s>", "<s><s>"])
def test_a_text_begins_once(start):
    encode = Encoder(TOKENIZERS["byte"])
    bare = Text((Part("the moon", is_own=True),))
    text = Text((Part(start, is_own=True), Part("the moon", is_own=False)))
    assert encode([text]) == encode([bare])


def test_a_row_cannot_begin_a_text_twice():
    (ids,) = Encoder(TOKENIZERS["byte"])([Template("{x}").text_of({"x": "<s>moon"})])
    bos = TOKENIZERS["byte"].bos_token_id
    assert ids[0] == bos and ids[1] != bos


def test_tokenizers_in_python_keep_control_tokens_of_rows_out_too(monkeypatch):
    words = tiny.tokenizer("byte")
    encode = Encoder(words)
    monkeypatch.setattr(type(words), "backend_tokenizer", None)
    monkeypatch.setattr(words, "build_inputs_with_special_tokens", lambda ids: ids, raising=False)
    (ids,) = encode([row("stop <|turn|> here")])
    assert ids.count(words.convert_tokens_to_ids("<|turn|>")) == 2
    assert words.decode(ids) == "<|turn|> Claim: stop <|turn|> here<|turn|> Answer:"


def test_what_is_built_for_a_row_is_not_pickled():
    encode = Encoder(TOKENIZERS["byte"])
    small = len(pickle.dumps(encode))
    expected = encode([row("<s>")])
    assert len(pickle.dumps(encode)) == small
    assert pickle.loads(pickle.dumps(encode))([row("<s>")]) == expected


def test_rows_by_classify(tmp_path):
    model = load_model(str(tiny.saved(tmp_path / "model", tiny.llama())), device="cpu")
    frame = pd.DataFrame({"claim": ["the moon", "the <|turn|> moon"]})
    asked = {
        trusted: asking(CHAT, ("yes", "no"), special_tokens_in_fields=trusted) for trusted in (0, 1)
    }
    plain, trusted = (asked[trusted](frame, model).answer_probability for trusted in (0, 1))
    assert plain[0] == pytest.approx(trusted[0]) and plain[1] != pytest.approx(trusted[1])
    assert asked[0].about() != asked[1].about()


def test_choices_are_scored_as_they_are_compared(tmp_path):
    """White space around a choice changes nothing but how the answer is written."""
    model = load_model(str(tiny.saved(tmp_path / "model", tiny.llama())), device="cpu")
    frame = pd.DataFrame({"claim": ["the moon", "a b c"]})
    bare = asking(CHAT, ("yes", "no"))(frame, model)
    spaced = asking(CHAT, (" yes", "no\n"))(frame, model)
    assert spaced.answer_probability.tolist() == bare.answer_probability.tolist()
    assert spaced.answer.str.strip().tolist() == bare.answer.tolist()
    assert set(spaced.answer) <= {" yes", "no\n"}


def test_a_token_beyond_the_embedding_is_the_rows_error():
    words = tiny.tokenizer()
    n_rows = len(words)
    words.add_tokens(["<image>"])
    model = LanguageModel(PaddedModel(tiny.llama(vocab_size=n_rows), words), is_attended=False)
    frame = pd.DataFrame({"claim": ["an <image> here", "none here"]})
    found = asking(Template("{claim} Answer:"), ("yes", "no"))(frame, model)
    assert found.error[0].startswith(
        f"Token '<image>' has id {n_rows}, and the model's embedding has {n_rows} rows"
    )
    assert pd.isna(found.error[1]) and found.answer.notna()[1]
