from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_pcm.errors import PromptError
from dask_pcm.inference.prompts import (
    ScoringError,
    Template,
    check_choices,
    cut_to_fit,
    plan_scoring,
    separator,
)


def test_fields_and_filling():
    template = Template("Given {{json}} {evidence}: {claim} {claim}?")
    assert template.fields == ("evidence", "claim")
    assert template.fill({"evidence": "E", "claim": 3}) == "Given {json} E: 3 3?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no field", "has no field"),
        ("{}", "plain column name"),
        ("{claim!r}", "plain column name"),
        ("{claim:>10}", "plain column name"),
        ("{claim", "cannot be parsed"),
    ],
)
def test_prompts_that_cannot_be_used(text, message):
    with pytest.raises(PromptError, match=message):
        _ = Template(text).fields


def test_fields_are_filled_by_name_alone():
    """What a row holds is text, never a template."""
    assert Template("{a}").fill({"a": "{b}"}) == "{b}"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("yes", "list of strings"),
        (None, "list of strings"),
        ({"yes", "no"}, "list of strings"),
        ([1, 2], "list of strings"),
        (["yes"], "at least two"),
        ([], "at least two"),
        (["yes", " "], "empty string"),
        (["yes", "no", " yes "], "repeats 'yes'"),
    ],
)
def test_choices_that_cannot_be_told_apart(choices, message):
    with pytest.raises(PromptError, match=message):
        check_choices(choices)


def test_what_stands_between_prompt_and_answer():
    assert separator("Answer:") == " "
    assert separator("Answer:\n") == ""
    assert separator("") == ""


def test_one_run_shows_what_several_choices_share():
    scoring = plan_scoring([[1, 2, 7], [1, 2, 8], [1, 2, 9, 4, 5]], eos=0)
    assert scoring.shared == (1, 2)
    assert scoring.runs == ((9, 4),)
    assert scoring.n_tokens == 4


def test_the_end_is_scored_where_one_choice_begins_another():
    scoring = plan_scoring([[1, 2, 7], [1, 2, 7, 8]], eos=0)
    assert scoring.endings == ((0,), (8, 0))
    assert scoring.shared == (1, 2, 7)
    assert scoring.runs == ((8,),)


def test_a_prompt_whose_last_token_depends_on_the_choice():
    scoring = plan_scoring([[1, 20], [1, 21, 5]], eos=0)
    assert scoring.shared == (1,)
    assert scoring.endings == ((20,), (21, 5))
    assert scoring.runs == ((21,),)


tokens = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(prompt=tokens, endings=st.lists(tokens, min_size=2, max_size=5, unique_by=tuple))
def test_every_choice_can_be_read_off_a_run(prompt, endings):
    scoring = plan_scoring([prompt + ending for ending in endings], eos=0)
    assert len(set(scoring.endings)) == len(endings)
    assert scoring.shared
    for original, ending in zip(endings, scoring.endings, strict=True):
        assert ending
        whole = scoring.shared + ending
        assert whole in (tuple(prompt + original), (*prompt, *original, 0))
        assert any(run[: len(ending) - 1] == ending[:-1] for run in scoring.runs)
    assert len(scoring.runs) <= len(endings)


def test_cutting_keeps_as_many_words_as_fit():
    def count(row):
        return len((row["claim"] + " " + row["evidence"]).split())

    row = {"claim": "a b", "evidence": "cc dd ee ff gg"}
    assert cut_to_fit(row, "evidence", 5, count) == {"claim": "a b", "evidence": "cc dd ee"}
    assert cut_to_fit(row, "evidence", 3, count) == {"claim": "a b", "evidence": "cc"}
    assert cut_to_fit(row, "evidence", 2, count) is None
    assert cut_to_fit(row, "evidence", 1, count) is None


def test_text_without_words_is_cut_between_characters():
    def count(row):
        return len(row["x"])

    assert cut_to_fit({"x": "字" * 50}, "x", 20, count) == {"x": "字" * 20}
    assert cut_to_fit({"x": "one\ntwo\nthree"}, "x", 9, count) == {"x": "one\ntwo"}


@pytest.mark.parametrize(
    ("sequences", "eos", "message"),
    [
        ([[1, 2], [1, 2]], 0, "same tokens"),
        ([[1, 2], [1, 2, 3]], None, "no end-of-text token"),
        ([[1, 2], [3, 4]], 0, "No token precedes"),
    ],
)
def test_what_cannot_be_scored_says_why(sequences, eos, message):
    with pytest.raises(ScoringError, match=message):
        plan_scoring(sequences, eos)
