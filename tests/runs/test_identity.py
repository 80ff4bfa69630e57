"""Two jobs are held against each other; what differs is said so that its cause is found."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest

import dask_pcm as pcm
from dask_pcm.context.identity.digest import identify
from dask_pcm.runs.identity import Manifest, _differences
from dask_pcm.runs.identity import identify as identify_job

META = {"id": "i8", "verdict": "str"}
LIMIT = 3


def load(name="model"):
    return name


def helper(frame):
    return frame.id > LIMIT


def verify(frame, model, threshold=1):
    return frame.assign(verdict=helper(frame))


class Vocabulary:
    n_made = 0

    def __init__(self, words):
        self.words = words
        Vocabulary.n_made += 1


@pytest.fixture
def differences(claims):
    """What is said where another job is given; its own words on every call."""
    frame = pcm.read_parquet(claims())

    def found(func=verify, context=None, **options):
        context = context or pcm.Context(load)
        mapped = pcm.map_partitions(
            func, frame, context=context, meta=META, batch_rows=8, **options
        )
        manifest = identify_job(mapped.expr, is_splittable=True)
        return Manifest(**json.loads(json.dumps(dataclasses.asdict(manifest))))

    return lambda one, other: list(_differences(found(**one), found(**other), extend=False))


@functools.wraps(verify)
def wrapped(frame, model):
    return verify(frame, model)


def test_the_same_job(differences):
    assert differences({}, {}) == []


def test_only_what_differs_is_named(differences):
    assert differences({}, {"func": wrapped}) == [
        "its function changed (the code of wrapped is new)"
    ]
    assert differences({"func": wrapped}, {}) == [
        "its function changed (the code of wrapped is gone)"
    ]
    options = " (in its arguments or options)"
    assert differences({}, {"threshold": 2}) == [f"its function changed{options}"]
    other = {"context": pcm.Context(load, "b")}
    assert differences({}, other) == [f"its context changed{options}"]


def test_two_maps_in_another_order(claims):
    frame = pcm.read_parquet(claims())

    def job(*functions):
        mapped = frame
        for func in functions:
            mapped = pcm.map_partitions(func, mapped, context=pcm.Context(load), meta=META)
        return identify_job(mapped.expr, is_splittable=False).identity

    assert job(verify, wrapped) == job(verify, wrapped)
    assert job(verify, wrapped)["function"] != job(wrapped, verify)["function"]
    assert job(verify, wrapped)["frame"] == job(wrapped, verify)["frame"]


def identified(func):
    found = identify(func)
    parts = {"function": [dict(found.parts)], "contexts": []}
    return Manifest({"function": [found.digest]}, {"parts": parts})


def test_the_global_that_has_changed_is_named(monkeypatch):
    before = identified(verify)
    assert list(_differences(before, identified(verify), extend=False)) == []
    monkeypatch.setitem(globals(), "LIMIT", 4)
    (said,) = _differences(before, identified(verify), extend=False)
    assert said.startswith("its function changed (the global 'LIMIT' of helper has changed; if")
    assert "filled a cache or a counter there" in said


def test_the_counter_of_a_class_is_named():
    def count(frame, model):
        return Vocabulary(["a"])

    before = identified(count)
    count(None, None)
    (said,) = _differences(before, identified(count), extend=False)
    assert "the attribute 'n_made' of Vocabulary has changed; if trying the function" in said


def test_a_manifest_without_parts(differences):
    old = Manifest({"function": ["a"]}, {})
    assert list(_differences(old, identified(verify), extend=False)) == ["its function changed"]
